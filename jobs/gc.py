#!/usr/bin/env python
"""Find, and with --no-dry-run remove, what no manifest and no commit record names.

python jobs/gc.py --corpus s3://bucket/corpus
"""

from pipeline.command import command
from pipeline.gc import GcConfig, gc

if __name__ == "__main__":
    command(gc, GcConfig)
