#!/usr/bin/env python
"""Make the candidate the champion, if it is not worse on the same evaluation.

python jobs/promote.py --name iqpir
"""

from pipeline.command import command
from pipeline.promote import PromoteConfig, promote

if __name__ == "__main__":
    command(promote, PromoteConfig)
