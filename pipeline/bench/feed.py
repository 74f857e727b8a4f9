"""Row ``feed``: from tars to (HQ, LQ) batches, images a second on one core."""

import time

import cv2
import numpy as np
import pyarrow as pa
import torch

from iqpir.config import NetworkConfig
from iqpir.degradation.parameters import degradation_preset, sample_parameters, scaled
from iqpir.stages.batch import Batch
from iqpir.training.order import sample_at
from pipeline.bench.measure import Measured, Options, alternate, require_equal
from pipeline.bench.peers import peer
from pipeline.bench.pictures import write_pictures
from pipeline.corpus import Corpus
from pipeline.shard import ShardConfig, shard
from pipeline.training.feed import FeedConfig, IndexedFeed, Samples

SEED = 2603
TOLERANCE = 1.0 / 255
"""Of the mean absolute difference, of pictures in [0, 1]."""


def run(options: Options) -> Measured:
    """Read, decode, degrade and stack ``count`` pictures of a corpus, in training order, without mirroring."""
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    write_pictures(options.folder / "pictures", options.count, options.size, options.source)
    url = str(options.folder / "corpus")
    shard(ShardConfig(input=str(options.folder / "pictures"), corpus=url, workers=0))
    rows = Corpus(url).samples()
    rows = rows.append_column("quality", pa.array(np.full(rows.num_rows, 0.5, np.float32)))
    degradation = scaled(degradation_preset("faces"), options.size)
    samples = Samples(
        url,
        rows,
        FeedConfig(flip=False),
        NetworkConfig(image_size=options.size, connect_sizes=()),
        degradation,
        None,
        SEED,
    )
    feed = IndexedFeed(samples, options.batch, 0, 1, torch.device("cpu"))
    batches = options.count // options.batch
    if batches < 1:
        batches, feed = 1, IndexedFeed(samples, options.count, 0, 1, torch.device("cpu"))
    count = batches * feed.batch_size
    places = [sample_at(position, rows.num_rows, SEED) for position in range(count)]
    table = rows.to_pylist()
    wanted = [
        (str(options.folder / "corpus" / table[index]["shard"]), table[index]["byte_offset"], table[index]["byte_size"])
        for _, index in places
    ]
    parameters = [sample_parameters(degradation, SEED, epoch, index) for epoch, index in places]
    classic = peer("feed")

    def ours() -> list[Batch]:
        stream = feed.batches(0)
        return [next(stream) for _ in range(batches)]

    def theirs() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(classic.batches(wanted, parameters, feed.batch_size))

    checked: dict[str, float] = {}
    for mine, (hq, lq) in zip(ours(), theirs(), strict=True):
        # In [-1, 1] a difference is twice that of [0, 1].
        require_equal(checked, "mean difference of HQ", (mine.hq - hq).abs().mean().item() / 2, TOLERANCE)
        require_equal(checked, "mean difference of LQ", (mine.degraded - lq).abs().mean().item() / 2, TOLERANCE)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    rates = alternate(ours, theirs, count, options.runs, clock)
    unit = "images per core second" if options.threads == 1 else "images/s"
    return Measured(ours=rates[0], peer=rates[1], unit=unit, checked=checked)
