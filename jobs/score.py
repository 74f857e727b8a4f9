#!/usr/bin/env python
"""Score every sample of a corpus with no-reference quality metrics.

python jobs/score.py --corpus s3://bucket/corpus --metrics "[piqe,niqe,rank]"
"""

from pipeline.command import command
from pipeline.score import ScoreConfig, score

if __name__ == "__main__":
    command(score, ScoreConfig)
