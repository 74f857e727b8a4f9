"""What each worker of a training runs: build the stage's parts from the driver's plan, fit, record the end."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from iqpir.config import NetworkConfig
from iqpir.degradation.parameters import DegradationConfig
from iqpir.errors import VerificationError
from iqpir.training.distributed import Distributed
from iqpir.training.loop import BatchSource, fit
from pipeline.command import from_dict
from pipeline.corpus import Corpus
from pipeline.encode import read_codes
from pipeline.layout import to_json
from pipeline.stopping import stopping
from pipeline.storage import Storage
from pipeline.tracking.runs import RunHandle, RunLog
from pipeline.training.checkpoints import checkpoint_sink
from pipeline.training.config import RESULT, Build, Prepared, Training, partners_of
from pipeline.training.feed import IndexedFeed, Samples
from pipeline.training.launch import Launcher
from pipeline.training.pairs import Pairs, PairsConfig
from pipeline.training.scores import SCORES
from pipeline.training.signs import Signs
from pipeline.training.step_meter import step_meter
from pipeline.view import read_view


def run_worker(plan: Mapping[str, Any], training_type: type[Training], build: Build) -> None:
    """What each worker runs: build the parts from the plan, fit, and (rank 0) record how it ended."""
    training = from_dict(training_type, plan["training"])
    prepared = Prepared(NetworkConfig.from_dict(plan["network"]), dict(plan["lineage"]), dict(plan["facts"]))
    device = _device(training.launcher)
    distributed = Distributed.current(device)
    torch.manual_seed(training.seed)
    signs = Signs(Storage.open(training.run_url), plan["start"])
    handle = RunHandle(**plan["handle"])
    # Outermost: what any of this logs is shown where the driver is.
    with step_meter(training, distributed, signs) as report:
        parts = build(training, prepared, distributed)
        run_log = RunLog(handle, Path(plan["spool"]))
        try:
            with (
                tempfile.TemporaryDirectory(prefix=f"iqpir-{training.name}-") as folder,
                _stop_flag(training.launcher, distributed, signs) as stop,
            ):
                result = fit(
                    parts.stage,
                    parts.state,
                    parts.source,
                    config=training.fit_config(),
                    sink=checkpoint_sink(training.run_url, training.keep),
                    log=run_log,
                    workspace=Path(folder),
                    distributed=distributed,
                    lineage=prepared.lineage,
                    stop=stop,
                    progress=report,
                )
        finally:
            if distributed.is_main:
                run_log.close()
    if distributed.is_main:
        outcome = {**dataclasses.asdict(result), "mlflow_run": handle.run_id}
        Storage.open(training.run_url).publish(RESULT, to_json(outcome))
    # Under torchrun each rank is its own driver, and reads the result next.
    distributed.barrier()


def _device(launcher: Launcher) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launcher == "ray":
        from ray.train.torch import get_device

        return get_device()
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _stop_flag(launcher: Launcher, distributed: Distributed, signs: Signs) -> Iterator[Callable[[], bool]]:
    """True once the training shall stop: after a signal, or the driver's word where Ray started this process."""
    if launcher != "ray":
        with stopping("a checkpoint is written, the same command goes on from there") as event:
            yield event.is_set
    elif distributed.is_main:
        with signs.stop_asked() as event:
            yield event.is_set
    else:  # ranks agree: the first one's word is enough
        yield lambda: False


def training_feed(
    training: Training,
    prepared: Prepared,
    distributed: Distributed,
    degradation: DegradationConfig | None = None,
    schedule: Callable[[int], DegradationConfig] | None = None,
    pairs: PairsConfig | None = None,
) -> BatchSource:
    """This rank's batches of the view's train split; with codes where the lineage names a code cache.

    Raises:
        VerificationError: the pairs are not those that the driver saw.
    """
    corpus = Corpus(training.corpus)
    rows = read_view(corpus, prepared.lineage["view_name"]).split("train")
    codes = None
    if "codes" in prepared.lineage:
        books = 2 if prepared.network.codebooks == "dual" else 1
        side = prepared.network.latent_size
        codes = read_codes(corpus, prepared.facts["codes"], rows, (books, side, side))
    partners: Pairs | None = None
    if pairs is not None and pairs.lq:
        partners = partners_of(pairs, training.feed, corpus, rows["key"].to_pylist())
        if partners.digest != prepared.lineage["pairs"]:
            raise VerificationError(f"The pairs of {pairs.lq} changed since the start.", "Start the training again.")
    samples = Samples(
        training.corpus,
        rows,
        training.feed,
        prepared.network,
        degradation,
        codes,
        training.seed,
        schedule,
        partners,
        prepared.lineage.get(SCORES, "").split(),
    )
    rank, world, device = distributed.rank, distributed.world_size, distributed.device
    if training.feed.kind == "ffcv":
        from pipeline.training.ffcv_feed import FfcvFeed

        beton = Path(training.feed.beton)
        return FfcvFeed(beton, prepared.lineage["view"], samples, training.batch_size, rank, world, device)
    return IndexedFeed(samples, training.batch_size, rank, world, device)
