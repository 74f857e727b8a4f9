#!/usr/bin/env python
"""Write one HTML page about a corpus, its labels, a view and the models evaluated on it.

python jobs/report.py --corpus corpus --view hq-v1 --output report.html
"""

from pipeline.command import command
from pipeline.report import ReportConfig, report

if __name__ == "__main__":
    command(report, ReportConfig)
