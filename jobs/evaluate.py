#!/usr/bin/env python
"""Restore held-back pictures at every dial setting and measure quality and fidelity.

python jobs/evaluate.py --corpus s3://bucket/corpus --view hq-v1 --checkpoint s3://bucket/runs/faces-stage2
"""

from pipeline.command import command
from pipeline.evaluate import EvaluateConfig, evaluate

if __name__ == "__main__":
    command(evaluate, EvaluateConfig)
