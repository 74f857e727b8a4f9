"""A stage 1 one of whose workers dies once: importable by the workers of a cluster."""

import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iqpir.stages.batch import Batch
from iqpir.training.distributed import Distributed
from iqpir.training.loop import BatchSource
from pipeline.stage1 import Stage1Training, assemble
from pipeline.training.config import Parts, Prepared
from pipeline.training.worker import run_worker

DIES_AFTER = 12
GRAVE = "grave"
"""In the run's folder: the worker died there."""


@dataclass(frozen=True)
class MortalSource:
    """Batches whose reader is killed instead of getting one more than ``DIES_AFTER``, unless there is a grave."""

    source: BatchSource
    grave: Path

    def batches(self, samples_seen: int) -> Iterator[Batch]:
        for number, batch in enumerate(self.source.batches(samples_seen)):
            if number == DIES_AFTER and not self.grave.exists():
                self.grave.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def mortal_worker(plan: Mapping[str, Any]) -> None:
    run_worker(plan, Stage1Training, assemble_mortal)


def assemble_mortal(training: Stage1Training, prepared: Prepared, distributed: Distributed) -> Parts:
    parts = assemble(training, prepared, distributed)
    if distributed.rank != 1:
        return parts
    return replace(parts, source=MortalSource(parts.source, Path(training.run_url) / GRAVE))
