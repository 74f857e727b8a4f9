#!/usr/bin/env python
"""Calibrate scores into one quality a sample.

python jobs/label.py --corpus s3://bucket/corpus --name default
"""

from pipeline.command import command
from pipeline.label import LabelConfig, label

if __name__ == "__main__":
    command(label, LabelConfig)
