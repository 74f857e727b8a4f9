#!/usr/bin/env python
"""Restore a folder of pictures with a registered model or a checkpoint.

python jobs/restore.py --model models:/iqpir@champion --input photos --output restored --quality 0.95
"""

from pipeline.command import command
from pipeline.restore import RestoreConfig, restore

if __name__ == "__main__":
    command(restore, RestoreConfig)
