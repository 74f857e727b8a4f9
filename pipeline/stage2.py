"""Train stage 2 from a view: predict the codes of the good picture from the degraded one and a wanted quality."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from iqpir.degradation.parameters import DegradationConfig, degradation_preset, scaled
from iqpir.errors import UsageError, VerificationError
from iqpir.networks.restoration_network import RestorationNetwork, build
from iqpir.stages.stage2 import Stage2, Stage2Config
from iqpir.training import checkpoint
from iqpir.training.distributed import Distributed
from pipeline.corpus import Corpus
from pipeline.encode import codes_digest, codes_fingerprint
from pipeline.storage import Storage
from pipeline.training.checkpoints import fetch_checkpoint, load_stage1
from pipeline.training.config import Parts, Prepared, Training, TrainResult, degraded_by, lineage_of, network_config
from pipeline.training.driver import run_training
from pipeline.training.pairs import PairsConfig
from pipeline.training.prior import PriorConfig, build_prior, check_prior
from pipeline.training.scores import SCORES, bins_of, check_scores, scores_of_metrics
from pipeline.training.worker import run_worker, training_feed
from pipeline.view import View

SMALLEST_JUDGED = 32
"""Pixels: what the rank networks and the metrics of pyiqa take at least."""


@dataclass(frozen=True, kw_only=True)
class Stage2Training(Training):
    """Stage 2: degraded pictures and their quality to the codes of stage 1."""

    stage1: str
    """Stage-1 checkpoint, or its run's folder (the newest checkpoint)."""
    stage: Stage2Config = field(default_factory=Stage2Config)
    """Losses and schedule."""
    codes: Literal["cached", "online"] = "cached"
    """``cached``: what jobs/encode.py wrote for this stage 1; ``online``: encode in every step."""
    degradation: str = "faces"
    """Preset of the degradation, scaled to the network's size."""
    pairs: PairsConfig = field(default_factory=PairsConfig)
    """Degraded pictures that exist, in place of ``degradation``."""
    prior: list[str] = field(default_factory=lambda: ["rank"])
    """Differentiable metrics of the quality loss, calibrated as the view's labels are."""
    scores: list[str] = field(default_factory=list)
    """Metrics of the labels whose calibrated scores are the condition, a quality map of the network for each; the one
    quality by default."""
    prior_max_side: int = 0
    """Largest side in pixels that the metrics of the quality loss see, which bounds their cost; 0: all of them."""
    prior_bound: Literal["crop", "resize"] = "crop"
    """How ``prior_max_side`` is kept: a part of the picture, at another place in each step, or all of it smaller."""
    weights_uri: str = ""
    """Folder or URL with weight files of the prior's metrics, as in jobs/score.py."""
    stage_name: ClassVar[str] = "stage2"
    operational: ClassVar[frozenset[str]] = Training.operational | {"weights_uri"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_max_side and self.prior_max_side < SMALLEST_JUDGED:
            raise UsageError(
                f"prior_max_side {self.prior_max_side} is below {SMALLEST_JUDGED} pixels, which metrics need.",
                "Give more, or 0 for no bound.",
            )
        if self.scores and self.stage.quality_target == "match" and not set(self.prior) <= set(self.scores):
            raise UsageError(
                f"{', '.join(sorted(set(self.prior) - set(self.scores)))} of the prior is none of the scores: nothing "
                "says what it should measure.",
                "Name each metric of --prior in --scores, or set stage.quality_target to maximise.",
            )


def train_stage2(training: Stage2Training) -> TrainResult:
    """Learn to predict codes from a degraded picture and a wanted quality."""
    return run_training(training, prepare, worker)


def prepare(training: Stage2Training, corpus: Corpus, view: View) -> Prepared:
    """In the driver: stage 1 and its codes belong to this view's calibration; the prior has gradients."""
    found = load_stage1(training.stage1)
    lineage = lineage_of(corpus, view)
    require_same_calibration(found, lineage, view, training.network)
    lineage["stage1"] = str(found.metadata["stage1_digest"])
    network = network_config(training, found.network_config, **bins_of(training.scores))
    check_scores(training.scores, network, view)
    if training.scores:
        lineage[SCORES] = " ".join(training.scores)
    facts = {"stage1": Storage.open(training.stage1).url}
    if training.codes == "cached":
        facts["codes"] = codes_fingerprint(lineage["stage1"], training.feed.fit, training.feed.pixels)
        lineage["codes"] = codes_digest(corpus, facts["codes"], lineage["stage1"])
    if training.stage.quality_weight > 0:
        check_prior(corpus, view, prior_of(training))
        lineage["prior"] = " ".join(training.prior)
    lineage |= degraded_by(training.pairs, training.degradation, training.feed, corpus, view)
    degradation_for(training.degradation, found.network_config.image_size)
    return Prepared(network, lineage, facts)


def require_same_calibration(
    found: checkpoint.Checkpoint, lineage: Mapping[str, str], view: View, network: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint for which quality, or high quality, means something else than for the view.

    Args:
        found: of an earlier stage.
        lineage: of this training.
        view: what it trains on.
        network: the user's own fields of the network, which win over the view's labels (``network_config``).

    Raises:
        VerificationError: the calibration digests, or the thresholds of the HQ+ codebook, differ.
    """
    theirs = found.metadata["lineage"].get("calibration")
    if theirs != lineage["calibration"]:
        raise VerificationError(
            f"{found.stage} was trained with calibration {theirs}, the view {view.reference} has "
            f"{lineage['calibration']}: quality would mean two things.",
            "Use a checkpoint of the view's own labels, or curate a view from the labels it was trained with.",
        )
    wanted = view.facts["hq_threshold"]
    if "hq_threshold" not in network and found.network_config.hq_threshold != wanted:
        raise VerificationError(
            f"{found.stage} took qualities above {found.network_config.hq_threshold} for high, the view "
            f"{view.reference} those above {wanted}.",
            "Use a checkpoint of the view's own labels, or give --network.hq_threshold the value of the checkpoint.",
        )


def degradation_for(name: str, image_size: int) -> DegradationConfig:
    """The degradation preset called ``name``, scaled to pictures of ``image_size``."""
    return scaled(degradation_preset(name), image_size)


def prior_of(training: Stage2Training) -> PriorConfig:
    """The quality loss's metrics and their bound."""
    side = training.prior_max_side or None
    return PriorConfig(
        metrics=training.prior, max_side=side, bound=training.prior_bound, weights_uri=training.weights_uri
    )


def worker(plan: Mapping[str, Any]) -> None:
    """What each worker runs."""
    run_worker(plan, Stage2Training, assemble)


def assemble(training: Stage2Training, prepared: Prepared, distributed: Distributed) -> Parts:
    """In a worker: stage, state with stage 1's weights, and feed."""
    network = build(prepared.network).to(distributed.device)
    take_stage1(network, prepared)
    teacher = None
    if training.codes == "online":
        teacher = build(prepared.network).to(distributed.device)
        take_stage1(teacher, prepared)
    prior = None
    if training.stage.quality_weight > 0:
        prior = build_prior(Corpus(training.corpus), training.view, prior_of(training), distributed.device)
    stage = Stage2(
        training.stage,
        quality_prior=prior,
        prior_scores=scores_of_metrics(training.prior, training.scores),
        teacher=teacher,
        precision=training.precision,
        distributed=distributed,
    )
    state = stage.initial_state(network, seed=training.seed)
    degradation = degradation_for(training.degradation, prepared.network.image_size)
    return Parts(stage, state, training_feed(training, prepared, distributed, degradation, pairs=training.pairs))


def take_stage1(network: RestorationNetwork, prepared: Prepared) -> None:
    """Give ``network`` the autoencoder of stage 1.

    Raises:
        VerificationError: the checkpoint there now is not the one that the driver saw.
    """
    found = checkpoint.load(fetch_checkpoint(prepared.facts["stage1"]))
    if found.metadata["stage1_digest"] != prepared.lineage["stage1"]:
        raise VerificationError(
            f"{prepared.facts['stage1']} has other weights ({found.metadata['stage1_digest'][:12]}) than at the start "
            f"({prepared.lineage['stage1'][:12]}).",
            "Name one checkpoint directory instead of a run that is still training.",
        )
    network.load_autoencoder(found.model)
