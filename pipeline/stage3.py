"""Train stage 3 from a view: fuse encoder features into the decoder, for fidelity to the input."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from iqpir.degradation.parameters import DegradationConfig
from iqpir.errors import UsageError
from iqpir.networks.restoration_network import build
from iqpir.stages.stage3 import Stage3, Stage3Config
from iqpir.training import checkpoint
from iqpir.training.distributed import Distributed
from pipeline.corpus import Corpus
from pipeline.encode import codes_digest, codes_fingerprint
from pipeline.stage2 import degradation_for, require_same_calibration
from pipeline.storage import Storage
from pipeline.training.checkpoints import fetch_checkpoint
from pipeline.training.config import Parts, Prepared, Training, TrainResult, degraded_by, lineage_of, network_config
from pipeline.training.driver import run_training
from pipeline.training.pairs import PairsConfig
from pipeline.training.perceptual import perceptual_term
from pipeline.training.prior import PriorConfig, build_prior, check_prior
from pipeline.training.scores import SCORES, scores_of_metrics
from pipeline.training.worker import run_worker, training_feed
from pipeline.view import View


@dataclass(frozen=True, kw_only=True)
class Stage3Training(Training):
    """Stage 3: from a stage-2 network, with light degradations while fidelity is learnt and strong ones while not."""

    stage2: str
    """Stage-2 checkpoint, or its run's folder (the newest checkpoint)."""
    stage: Stage3Config = field(default_factory=Stage3Config)
    """Losses and schedule."""
    degradation: str = "faces"
    """Preset of the strong degradation, of steps without fidelity."""
    light_degradation: str = "fidelity"
    """Preset of the light degradation, of steps with fidelity."""
    pairs: PairsConfig = field(default_factory=PairsConfig)
    """Degraded pictures that exist, in place of both degradations."""
    perceptual: str = "lpips"
    """Perceptual term: lpips (needs VGG weights), a full-reference metric of pyiqa (ms_ssim, ssim), or none."""
    stage_name: ClassVar[str] = "stage3"
    operational: ClassVar[frozenset[str]] = Training.operational | {"stage2"}


@dataclass(frozen=True)
class PhasedDegradation:
    """Position in the sample order -> degradation of its step."""

    strong: DegradationConfig
    light: DegradationConfig
    stage: Stage3Config
    batch_size: int

    def __call__(self, position: int) -> DegradationConfig:
        """The degradation of the step that the sample at ``position`` belongs to."""
        small = self.stage.degradation_at(position // self.batch_size) == "small"
        return self.light if small else self.strong


def train_stage3(training: Stage3Training) -> TrainResult:
    """Learn to fuse encoder features, for fidelity to the input."""
    return run_training(training, prepare, worker)


def prepare(training: Stage3Training, corpus: Corpus, view: View) -> Prepared:
    """In the driver: stage 2 and the codes of its stage 1 belong to this view's calibration."""
    perceptual_term(training.perceptual, training.stage.perceptual_weight)
    found = checkpoint.load(fetch_checkpoint(training.stage2))
    if found.stage != "stage2":
        raise UsageError(f"{training.stage2} is a checkpoint of {found.stage}, not of stage 2.")
    lineage = lineage_of(corpus, view)
    require_same_calibration(found, lineage, view, training.network)
    # Stage 2 trained the encoder: the codes are those of the stage 1 that it started from.
    lineage["stage1"] = str(found.metadata["lineage"]["stage1"])
    lineage["stage2"] = str(found.metadata["weights_digest"])
    if "prior" in found.metadata["lineage"]:
        # The encoder and the dial still follow the metrics that stage 2 was taught by.
        lineage["prior"] = str(found.metadata["lineage"]["prior"])
    if training.stage.quality_weight > 0:
        if "prior" not in lineage:
            raise UsageError(
                f"stage.quality_weight is above 0, and {training.stage2} was trained without a prior.",
                "Set it to 0, or train stage 2 with a quality loss: its metrics are those of stage 3.",
            )
        check_prior(corpus, view, PriorConfig(metrics=lineage["prior"].split()))
    if SCORES in found.metadata["lineage"]:
        lineage[SCORES] = str(found.metadata["lineage"][SCORES])
    lineage |= degraded_by(training.pairs, training.degradation, training.feed, corpus, view)
    facts = {"stage2": Storage.open(training.stage2).url}
    facts["codes"] = codes_fingerprint(lineage["stage1"], training.feed.fit, training.feed.pixels)
    lineage["codes"] = codes_digest(corpus, facts["codes"], lineage["stage1"])
    phases(training, found.network_config.image_size)
    return Prepared(network_config(training, found.network_config), lineage, facts)


def phases(training: Stage3Training, image_size: int) -> PhasedDegradation:
    """Which degradation belongs to which step.

    Raises:
        UsageError: an unknown preset.
    """
    return PhasedDegradation(
        degradation_for(training.degradation, image_size),
        degradation_for(training.light_degradation, image_size),
        training.stage,
        training.batch_size,
    )


def worker(plan: Mapping[str, Any]) -> None:
    """What each worker runs."""
    run_worker(plan, Stage3Training, assemble)


def assemble(training: Stage3Training, prepared: Prepared, distributed: Distributed) -> Parts:
    """In a worker: stage, state with stage 2's weights, and feed."""
    found = checkpoint.load(fetch_checkpoint(prepared.facts["stage2"]))
    network = build(prepared.network)
    network.load_state_dict(found.model)
    prior = None
    names, scores = (prepared.lineage.get(key, "").split() for key in ("prior", SCORES))
    if training.stage.quality_weight > 0:
        prior = build_prior(Corpus(training.corpus), training.view, PriorConfig(metrics=names), distributed.device)
    stage = Stage3(
        training.stage,
        perceptual=perceptual_term(training.perceptual, training.stage.perceptual_weight, distributed.device),
        quality_prior=prior,
        prior_scores=scores_of_metrics(names, scores),
        precision=training.precision,
        distributed=distributed,
    )
    state = stage.initial_state(network.to(distributed.device), seed=training.seed)
    schedule = phases(training, prepared.network.image_size)
    return Parts(
        stage, state, training_feed(training, prepared, distributed, schedule.strong, schedule, training.pairs)
    )
