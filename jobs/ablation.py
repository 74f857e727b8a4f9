#!/usr/bin/env python
"""Which part of the method does what: variants trained from several seeds, compared on held-back pictures.

python jobs/ablation.py --config jobs/recipes/ablation_tiny.yaml
"""

from pipeline.ablation import AblationConfig, ablation
from pipeline.command import command

if __name__ == "__main__":
    command(ablation, AblationConfig)
