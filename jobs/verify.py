#!/usr/bin/env python
"""Prove that a corpus is what its records say; exit code 4 on the first lie.

python jobs/verify.py --corpus s3://bucket/corpus
"""

from pipeline.command import command
from pipeline.verify import VerifyConfig, verify

if __name__ == "__main__":
    command(verify, VerifyConfig)
