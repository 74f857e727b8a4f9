#!/usr/bin/env python
"""Put a checkpoint into the model registry, check it in a clean process, make it the candidate.

python jobs/register.py --checkpoint RUN --evaluation RUN/evaluation.json
python jobs/register.py --official.file codeformer.pth --name codeformer
"""

from pipeline.command import command
from pipeline.register import RegisterConfig, register

if __name__ == "__main__":
    command(register, RegisterConfig)
