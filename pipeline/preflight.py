"""Find what would stop a run before it takes a GPU: storage, MLflow, cluster, network, versions.

Every check runs, whatever the others found; each is one line on stderr and one entry of the result.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from iqpir.config import preset
from iqpir.errors import IqpirError
from pipeline.command import sections_of, workspace
from pipeline.preflight_checks import (
    check_cluster,
    check_corpus,
    check_imports,
    check_metrics,
    check_network,
    check_registry,
    check_samples,
    check_storage,
    check_tracking,
    check_versions,
)
from pipeline.preflight_recipe import check_section
from pipeline.training.feed import FeedConfig
from pipeline.training.launch import Launcher, Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What the run will use; what is left empty is not checked."""

    RECIPE: ClassVar[str] = "recipe"
    recipe: str = ""
    """Recipe whose every section is checked; the one of --config by default."""

    corpus: str = ""
    """Folder or URL of the corpus."""
    view: str = ""
    """View of the corpus whose samples are tried: name or name@v0001."""
    corpus_writable: bool = True
    """Also prove that the corpus can be written: what makes shards, scores, labels or codes needs it."""
    metrics: list[str] = field(default_factory=list)
    """Metrics that will score: their weights are proved to be at hand, each is built."""
    weights_uri: str = ""
    """Folder or URL with weight files, as in jobs/score.py."""
    runs: str = field(default_factory=lambda: f"{workspace()}/runs")
    """Folder or URL for runs."""
    preset: str = "iqpir512"
    """Network sizes: tiny32, tiny64, small128, mid256, iqpir512 or codeformer512."""
    network: dict[str, Any] = field(default_factory=dict)
    """Fields of the network configuration that differ from the preset's."""
    feed: FeedConfig = field(default_factory=FeedConfig)
    """How samples will reach the loop."""
    launcher: Launcher = "ray"
    """``ray``: the cluster is checked for room; ``torchrun``, ``local``: it is not."""
    workers: Workers = field(default_factory=Workers)
    """How many training processes."""
    tracking_uri: str = ""
    """MLflow server or database; $MLFLOW_TRACKING_URI or the workspace's mlflow.db by default."""
    registry: bool = True
    """Also prove that models may be registered, by creating and deleting one."""


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class PreflightResult:
    """Every check, in the order they ran."""

    checks: list[Check]

    @property
    def exit_code(self) -> int:
        """1 when a check failed."""
        return 0 if all(check.ok for check in self.checks) else 1


def preflight(config: PreflightConfig) -> PreflightResult:
    """Check storage, MLflow, cluster, network and versions before a run takes GPUs."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", check_versions),
        ("imports", check_imports),
        ("network", lambda: check_network(config.preset, config.network)),
    ]
    if config.corpus:
        checks.append(("corpus", lambda: check_corpus(config.corpus)))
        if config.corpus_writable:
            checks.append(("corpus storage", lambda: check_storage(config.corpus)))
    if config.corpus and config.view:
        checks.append(("samples", lambda: _samples(config)))
    if config.metrics:
        checks.append(("metrics", lambda: check_metrics(config.metrics, config.weights_uri)))
    checks.append(("runs storage", lambda: check_storage(config.runs)))
    checks.append(("tracking", lambda: check_tracking(config.tracking_uri)))
    if config.registry:
        checks.append(("registry", lambda: check_registry(config.tracking_uri)))
    if config.launcher == "ray":
        checks.append(("cluster", lambda: check_cluster(config.workers)))
    for job in sections_of(config.recipe) if config.recipe else ():
        on_ray = config.launcher == "ray"
        checks.append((f"recipe: {job}", partial(check_section, config.recipe, job, cluster=on_ray)))
    return PreflightResult([_run(name, check) for name, check in checks])


def _samples(config: PreflightConfig) -> str:
    size = int({**preset(config.preset).to_dict(), **config.network}["image_size"])
    return check_samples(config.corpus, config.view, size, config.feed)


def _run(name: str, check: Callable[[], str]) -> Check:
    try:
        found = Check(name, True, check())
    except (IqpirError, OSError, ImportError, RuntimeError) as error:
        found = Check(name, False, " ".join(str(error).split()) or type(error).__name__)
    log.log(
        logging.INFO if found.ok else logging.ERROR,
        "%-6s %-18s %s",
        "ok" if found.ok else "FAILED",
        name,
        found.detail,
    )
    return found
