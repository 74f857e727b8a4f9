"""What the training of every stage has in common: its configuration, what a stage adds, how it ended."""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from iqpir.config import FIXED_BY_STAGE_1, NetworkConfig, preset
from iqpir.errors import UsageError
from iqpir.training.distributed import Distributed
from iqpir.training.loop import BatchSource, FitConfig
from iqpir.training.precision import PrecisionConfig
from pipeline.command import workspace
from pipeline.corpus import Corpus
from pipeline.training.feed import FeedConfig
from pipeline.training.launch import Launcher, Workers
from pipeline.training.pairs import Pairs, PairsConfig, find_pairs
from pipeline.view import View

RESULT = "result.json"
"""In the folder of a run: how it ended, written by its first worker and read by the driver."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every stage's training needs to know."""

    corpus: str
    """Folder or URL of the corpus."""
    view: str
    """View that is trained on: name or name@v0001."""
    name: str
    """Name of the run; its folder is ``runs``/``name``."""
    runs: str = field(default_factory=lambda: f"{workspace()}/runs")
    """Folder or URL for runs."""
    preset: str = "iqpir512"
    """Network sizes: tiny32, tiny64, small128, mid256, iqpir512 or codeformer512."""
    network: dict[str, Any] = field(default_factory=dict)
    """Fields of the network configuration that differ from the preset's."""
    steps: int = 10000
    """Optimisation steps in all."""
    batch_size: int = 16
    """Samples of one step, over all workers."""
    seed: int = 2603
    """Of weights, order, flips and degradations."""
    log_every: int = 50
    """Steps between two log entries."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    preview_every: int = 0
    """Steps between two preview pictures; 0: none."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number format, memory layout, compilation."""
    feed: FeedConfig = field(default_factory=FeedConfig)
    """How samples reach the loop."""
    launcher: Launcher = "ray"
    """``ray``: many nodes; ``torchrun``: started by it; ``local``: this process."""
    workers: Workers = field(default_factory=Workers)
    """How many training processes."""
    tracking_uri: str = ""
    """MLflow server or database; $MLFLOW_TRACKING_URI or the workspace's mlflow.db by default."""
    experiment: str = "iqpir"
    """MLflow experiment."""

    stage_name: ClassVar[str]
    operational: ClassVar[frozenset[str]] = frozenset(
        [
            "corpus",
            "view",
            "runs",
            "name",
            "log_every",
            "checkpoint_every",
            "preview_every",
            "keep",
            "launcher",
            "workers",
            "tracking_uri",
            "experiment",
            "feed",
            "pairs",
            "stage1",
            "preset",
            "network",
        ]
    )
    """Fields that may change when a run goes on; what they lead to is in its lineage."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise UsageError(f"{self.name!r} is no name for a run.", "Use letters, digits, - and _.")
        counts = range(self.workers.min_count or self.workers.count, self.workers.count + 1)
        odd = [count for count in counts if self.batch_size < 1 or self.batch_size % count]
        if odd:
            shared = [count for count in range(1, self.batch_size + 1) if self.batch_size % count == 0]
            raise UsageError(
                f"batch_size {self.batch_size} cannot be shared evenly by {odd[0]} workers, and "
                f"workers.min_count {self.workers.min_count} to workers.count {self.workers.count} allows as many.",
                f"Take a multiple of {math.lcm(*counts)}, or numbers of workers between which all are of {shared}.",
            )
        self.fit_config()

    def fit_config(self) -> FitConfig:
        """How long and how often, for the loop."""
        return FitConfig(
            steps=self.steps,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
            preview_every=self.preview_every,
        )

    @property
    def run_url(self) -> str:
        """Folder of the run."""
        return f"{self.runs.rstrip('/')}/{self.name}"


@dataclass(frozen=True)
class TrainResult:
    """How a training ended, and where its checkpoint is."""

    run: str
    checkpoint: str
    status: str
    step: int
    resumed_from: int
    metrics: dict[str, float]
    mlflow_run: str
    lineage: dict[str, str]
    seconds: float

    @property
    def exit_code(self) -> int:
        """3 when it was stopped before its end; the same command goes on."""
        return 0 if self.status in ("done", "done earlier") else 3

    @property
    def speaks(self) -> bool:
        """Whether this process prints the result: torchrun starts many, of which the first does."""
        return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Prepared:
    """What the driver found and every worker gets."""

    network: NetworkConfig
    lineage: dict[str, str]
    facts: dict[str, Any]
    """JSON values of the stage's own: digests, paths."""


@dataclass(frozen=True)
class Parts:
    """What a stage adds to the common training, in a worker."""

    stage: Any
    state: Any
    source: BatchSource


Prepare = Callable[[Any, Corpus, View], Prepared]
Build = Callable[[Any, Prepared, Distributed], Parts]


def network_config(training: Training, base: NetworkConfig | None = None, **derived: Any) -> NetworkConfig:
    """The network of a training: the preset (or ``base``, of a checkpoint), then derived values, then the user's.

    Raises:
        UsageError: an unknown field, or one that the checkpoint's stage 1 has fixed to another value.
    """
    values = (preset(training.preset) if base is None else base).to_dict()
    known = [field.name for field in dataclasses.fields(NetworkConfig)]
    unknown = sorted(training.network.keys() - set(known))
    if unknown:
        raise UsageError(f"A network has no field {unknown[0]!r}.", f"Known: {', '.join(known)}.")
    config = NetworkConfig.from_dict({**values, **derived, **training.network})
    for name in FIXED_BY_STAGE_1 if base is not None else ():
        if getattr(config, name) != getattr(base, name):
            raise UsageError(
                f"network.{name} is {getattr(config, name)}; the checkpoint was trained with {getattr(base, name)}.",
                "Leave it out, or train stage 1 with it.",
            )
    return config


def lineage_of(corpus: Corpus, view: View) -> dict[str, str]:
    """Digests of what a training on ``view`` is made from."""
    return {
        "manifest": corpus.manifest().digest,
        "view": view.digest,
        "view_name": view.reference,
        "calibration": str(view.facts["calibration"]),
    }


def partners_of(pairs: PairsConfig, feed: FeedConfig, corpus: Corpus, keys: list[str]) -> Pairs:
    """The degraded partner of each training sample.

    Raises:
        UsageError: they cannot be had: see ``find_pairs``; or the feed is one that holds good pictures only.
    """
    if feed.kind != "indexed":
        raise UsageError(f"feed.kind {feed.kind} holds no degraded pictures.", "Set feed.kind to indexed for pairs.")
    return find_pairs(pairs, corpus, keys, feed.pixels, feed.cache, feed.cache_gib)


def degraded_by(pairs: PairsConfig, degradation: str, feed: FeedConfig, corpus: Corpus, view: View) -> dict[str, str]:
    """What of a run's lineage says where its degraded pictures come from.

    Raises:
        UsageError: there are no such pairs.
    """
    if not pairs.lq:
        return {"degradation": degradation}
    return {"pairs": partners_of(pairs, feed, corpus, view.split("train")["key"].to_pylist()).digest}
