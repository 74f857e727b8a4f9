#!/usr/bin/env python
"""Check storage, MLflow, the cluster, the network and versions before a run takes GPUs.

python jobs/preflight.py --corpus s3://bucket/corpus --preset iqpir512 --workers.count 8
"""

from pipeline.command import command
from pipeline.preflight import PreflightConfig, preflight

if __name__ == "__main__":
    command(preflight, PreflightConfig)
