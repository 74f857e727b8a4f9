#!/usr/bin/env python
"""Stage 1: learn the autoencoder and both codebooks.

ray job submit --working-dir . -- python jobs/stage1.py --config jobs/recipes/faces512.yaml
"""

from pipeline.command import command
from pipeline.stage1 import Stage1Training, train_stage1

if __name__ == "__main__":
    command(train_stage1, Stage1Training)
