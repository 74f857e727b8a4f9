#!/usr/bin/env python
"""Fit a metric of this project: jobs/fit_metric.py --metric rank --input FOLDER --output FILE ..."""

from pipeline.command import command
from pipeline.fit_metric import FitMetricConfig, fit_metric

if __name__ == "__main__":
    command(fit_metric, FitMetricConfig)
