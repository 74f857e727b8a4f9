#!/usr/bin/env python
"""Cut a folder or bucket of pictures into the shards of a corpus.

python jobs/shard.py --input s3://bucket/pictures --corpus s3://bucket/corpus
"""

from pipeline.command import command
from pipeline.shard import ShardConfig, shard

if __name__ == "__main__":
    command(shard, ShardConfig)
