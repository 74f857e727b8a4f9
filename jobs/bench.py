#!/usr/bin/env python
"""Measure one row of docs/results/bench.md: ours against a peer, equal results first.

python jobs/bench.py feed --json
python jobs/bench.py plan --sizes "[10000, 100000, 1000000]"
"""

from pipeline.bench.bench import BenchConfig, bench
from pipeline.command import command

if __name__ == "__main__":
    command(bench, BenchConfig)
