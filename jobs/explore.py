#!/usr/bin/env python
"""Look at a corpus by its quality, and try a model on its pictures, in the browser.

python jobs/explore.py --corpus s3://bucket/corpus --labels default --model models:/iqpir@champion
"""

from pipeline.command import command
from pipeline.explore import ExploreConfig, explore

if __name__ == "__main__":
    command(explore, ExploreConfig)
