#!/usr/bin/env python
"""Say what of a corpus is done, and what is missing.

python jobs/status.py --corpus s3://bucket/corpus
"""

from pipeline.command import command
from pipeline.status import StatusConfig, status

if __name__ == "__main__":
    command(status, StatusConfig)
