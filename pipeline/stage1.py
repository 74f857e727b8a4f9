"""Train stage 1 from a view: the autoencoder and both codebooks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from iqpir.networks.restoration_network import build
from iqpir.stages.stage1 import Stage1, Stage1Config
from iqpir.training.distributed import Distributed
from pipeline.corpus import Corpus
from pipeline.training.config import Parts, Prepared, Training, TrainResult, lineage_of, network_config
from pipeline.training.driver import run_training
from pipeline.training.perceptual import perceptual_term
from pipeline.training.worker import run_worker, training_feed
from pipeline.view import View


@dataclass(frozen=True, kw_only=True)
class Stage1Training(Training):
    """Stage 1: the view's pictures through the autoencoder; high-quality ones also through the HQ+ codebook."""

    stage: Stage1Config = field(default_factory=Stage1Config)
    """Losses and schedule."""
    perceptual: str = "lpips"
    """Perceptual term: lpips (needs VGG weights), a full-reference metric of pyiqa (ms_ssim, ssim), or none."""
    stage_name: ClassVar[str] = "stage1"


def train_stage1(training: Stage1Training) -> TrainResult:
    """Learn the autoencoder and both codebooks from a view."""
    return run_training(training, prepare, worker)


def prepare(training: Stage1Training, corpus: Corpus, view: View) -> Prepared:
    """In the driver: the network, whose S_thr is that of the labels; the perceptual term's weights are at hand."""
    perceptual_term(training.perceptual, training.stage.perceptual_weight)
    network = network_config(training, hq_threshold=view.facts["hq_threshold"])
    return Prepared(network, lineage_of(corpus, view), {})


def worker(plan: Mapping[str, Any]) -> None:
    """What each worker runs."""
    run_worker(plan, Stage1Training, assemble)


def assemble(training: Stage1Training, prepared: Prepared, distributed: Distributed) -> Parts:
    """In a worker: stage, fresh state and feed."""
    term = perceptual_term(training.perceptual, training.stage.perceptual_weight, distributed.device)
    stage = Stage1(training.stage, perceptual=term, precision=training.precision, distributed=distributed)
    state = stage.initial_state(build(prepared.network).to(distributed.device), seed=training.seed)
    return Parts(stage, state, training_feed(training, prepared, distributed))
