#!/usr/bin/env python
"""The whole chain on one machine: pictures in, a registered model and a report out.

python jobs/demo.py --input ~/Pictures
"""

from pipeline.command import command
from pipeline.demo import DemoConfig, demo

if __name__ == "__main__":
    command(demo, DemoConfig)
