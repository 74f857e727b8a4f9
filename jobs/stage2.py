#!/usr/bin/env python
"""Stage 2: learn to predict codes from a degraded picture and a wanted quality.

ray job submit --working-dir . -- python jobs/stage2.py --config jobs/recipes/faces512.yaml
"""

from pipeline.command import command
from pipeline.stage2 import Stage2Training, train_stage2

if __name__ == "__main__":
    command(train_stage2, Stage2Training)
