#!/usr/bin/env python
"""Turn every sample into codebook indices, for stage 2.

python jobs/encode.py --corpus s3://bucket/corpus --stage1 s3://bucket/runs/faces-stage1
"""

from pipeline.command import command
from pipeline.encode import EncodeConfig, encode

if __name__ == "__main__":
    command(encode, EncodeConfig)
