#!/usr/bin/env python
"""Choose samples by a SQL condition, as a view.

python jobs/curate.py --corpus s3://bucket/corpus --where "quality > 0.8 and width >= 512" --name hq-v1
"""

from pipeline.command import command
from pipeline.curate import CurateConfig, curate_or_count

if __name__ == "__main__":
    command(curate_or_count, CurateConfig)
