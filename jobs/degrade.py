#!/usr/bin/env python
"""Replay the degradation of one training sample, or write a view's fixed LQ/HQ pairs.

python jobs/degrade.py --corpus corpus --run runs/stage2 --key 0123abcd... --epoch 3 --output replay
python jobs/degrade.py --corpus corpus --view hq-v1 --preset tiny32 --degradation tiny32 --output pairs
"""

from pipeline.command import command
from pipeline.degrade import DegradeConfig, degrade

if __name__ == "__main__":
    command(degrade, DegradeConfig)
