#!/usr/bin/env python
"""Find exact and near duplicates of a corpus, and choose which one of each cluster stays.

python jobs/dedup.py --corpus s3://bucket/corpus --name default --keep best
"""

from pipeline.command import command
from pipeline.dedup import DedupConfig, dedup

if __name__ == "__main__":
    command(dedup, DedupConfig)
