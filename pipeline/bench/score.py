"""Row ``score``: three metrics for every picture of a corpus, images a second."""

import itertools
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import torch

from iqpir.quality_prior import load_rank_network
from pipeline.bench.measure import Measured, Options, alternate, require_equal
from pipeline.bench.peers import peer
from pipeline.bench.pictures import write_pictures
from pipeline.metrics.pyiqa_adapter import NIQE_MODEL
from pipeline.score import ScoreConfig, score
from pipeline.shard import ShardConfig, shard
from pipeline.torchvision_ops import ensure_torchvision_operators

CLASSIC = ["piqe", "niqe"]
"""pyiqa's without weights to fetch; ``niqe`` with the pristine model of this project on both sides."""
METRICS = [*CLASSIC, "rank"]
"""What ``score`` computes by default; ``rank`` is this project's network, so the peer calls the same weights."""
TOLERANCE = 2e-3
"""Of the largest difference of a score, relative to the score."""


def run(options: Options) -> Measured:
    """The verb in one process, with its reading, checks and commits; the peer calls each metric with each path."""
    torch.set_num_threads(options.threads)
    ensure_torchvision_operators()
    source = options.folder / "pictures"
    paths = write_pictures(source, options.count, options.size, options.source)
    made = options.folder / "corpus"
    shard(ShardConfig(input=str(source), corpus=str(made), workers=0))
    number = itertools.count()
    classic = peer("score")
    metrics = classic.load(CLASSIC, str(NIQE_MODEL), {"rank": load_rank_network("rank", "cpu")})

    def ours() -> Path:
        # A fresh corpus each time: scores that are there are not computed again.
        corpus = options.folder / f"scored-{next(number)}"
        shutil.copytree(made, corpus)
        score(ScoreConfig(corpus=str(corpus), metrics=METRICS))
        return corpus

    def theirs() -> dict[str, list[float]]:
        scores: dict[str, list[float]] = classic.scores(metrics, paths)
        return scores

    checked: dict[str, float] = {}
    mine, other = _scores(ours()), theirs()
    for metric in METRICS:
        wanted = [other[metric][index] for index in range(options.count)]
        pairs = zip(mine[metric], wanted, strict=True)
        largest = max(abs(one - two) / max(1.0, abs(two)) if math.isfinite(two) else 0.0 for one, two in pairs)
        require_equal(checked, f"largest relative difference of {metric}", largest, TOLERANCE)
    rates = alternate(ours, theirs, options.count, options.runs)
    facts = {"metrics": METRICS}
    return Measured(ours=rates[0], peer=rates[1], unit="images/s", checked=checked, facts=facts)


def _scores(corpus: Path) -> dict[str, list[float]]:
    """metric -> raw scores in the order of the pictures' names."""
    names = {
        row["key"]: row["relpath"]
        for path in corpus.glob("samples/*.parquet")
        for row in pq.read_table(path, columns=["key", "relpath"]).to_pylist()
    }
    found = {}
    for metric in METRICS:
        rows = [row for path in corpus.glob(f"scores/{metric}/*/*.parquet") for row in pq.read_table(path).to_pylist()]
        found[metric] = [row["raw"] for row in sorted(rows, key=lambda row: names[row["key"]])]
    return found
