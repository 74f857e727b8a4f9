#!/usr/bin/env python
"""Write a view as an ffcv .beton, webdataset tars or plain files.

python jobs/export.py --corpus corpus --view hq-v1 --format ffcv --size 512 --output /nvme/train.beton
"""

from pipeline.command import command
from pipeline.export import ExportConfig, export

if __name__ == "__main__":
    command(export, ExportConfig)
