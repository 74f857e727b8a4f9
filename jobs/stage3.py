#!/usr/bin/env python
"""Stage 3: learn to fuse encoder features, for fidelity to the input.

ray job submit --working-dir . -- python jobs/stage3.py --config jobs/recipes/faces512.yaml
"""

from pipeline.command import command
from pipeline.stage3 import Stage3Training, train_stage3

if __name__ == "__main__":
    command(train_stage3, Stage3Training)
