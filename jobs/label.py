#!/usr/bin/env python
"""Calibrate scores into one quality a sample.

python jobs/label.py --corpus s3://bucket/corpus --name default
python jobs/label.py --corpus s3://bucket/corpus --name default --check
"""

from pipeline.command import command
from pipeline.label import LabelConfig, label_or_check

if __name__ == "__main__":
    command(label_or_check, LabelConfig)
