"""The process that writes a ``.beton``: ``python -m pipeline.exports.beton_writer PLAN``; see ``beton.py``.

Prints the number of samples read so far, a line each time; ends with code 1 as soon as one of ffcv's
workers has died, where ffcv would wait for ever.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import cv2
import ffcv.writer
import numpy as np
import pyarrow.parquet as pq
from ffcv.fields import FloatField, IntField, RGBImageField
from ffcv.writer import DatasetWriter
from numpy.typing import NDArray

from iqpir.pixels import PixelPolicy, decode
from pipeline.corpus import Corpus
from pipeline.exports.beton import FIELDS, BetonPlan
from pipeline.training.feed import fit_picture
from pipeline.training.shard_cache import ShardCache

_POLL_S = 0.2


class BetonSamples:
    """What ffcv's workers index: (picture, quality, row number); storage is opened in each worker."""

    def __init__(self, plan: BetonPlan) -> None:
        self.plan = plan
        self.rows = pq.read_table(plan.rows)
        self.pixels = PixelPolicy(**plan.pixels)
        self.read = multiprocessing.Value("Q", 0)
        self.cache: ShardCache | None = None

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], float, int]:
        if self.cache is None:
            cv2.setNumThreads(1)
            self.cache = ShardCache(Corpus(self.plan.corpus), self.plan.cache)
        row = self.rows.slice(int(index), 1).to_pylist()[0]
        data = self.cache.read(row["shard"], row["byte_offset"], row["byte_size"])
        picture = decode(data, self.pixels).array
        fitted = fit_picture(picture, self.plan.image_size, self.plan.fit)  # type: ignore[arg-type]
        with self.read.get_lock():
            self.read.value += 1
        return fitted, float(row["quality"]), int(index)


class Worker(multiprocessing.Process):
    """A worker of ffcv, which keeps its own to itself.

    ``multiprocessing.active_children`` forgets a process that ended between two calls, and one that fails on
    its first sample lives for less than that: only the starter sees them all.
    """

    started: ClassVar[list["Worker"]] = []

    def start(self) -> None:
        """Start, and stay in sight."""
        super().start()
        Worker.started.append(self)


def watch(samples: BetonSamples) -> None:
    """Report progress; leave the process when a worker has died, or when nobody reads the reports any more."""
    while not any(worker.exitcode not in (None, 0) for worker in Worker.started):
        try:
            # Not through sys.stdout: a worker forked while this thread held its lock would hang on leaving.
            os.write(1, f"{samples.read.value}\n".encode())
        except BrokenPipeError:
            break
        time.sleep(_POLL_S)
    for worker in list(Worker.started):
        worker.kill()
    os._exit(1)


def main(text: str) -> None:
    """Write the ``.beton`` that the JSON ``text`` plans."""
    plan = BetonPlan(**json.loads(text))
    samples = BetonSamples(plan)
    ffcv.writer.Process = Worker
    threading.Thread(target=watch, args=(samples,), daemon=True).start()
    fields = (
        RGBImageField(write_mode=plan.mode, jpeg_quality=plan.jpeg_quality),
        FloatField(),
        IntField(),
    )
    writer = DatasetWriter(
        str(Path(plan.target)),
        dict(zip(FIELDS, fields, strict=True)),
        page_size=plan.page_size,
        num_workers=plan.workers,
    )
    writer.from_indexed_dataset(samples, chunksize=max(1, min(100, len(samples) // plan.workers)))


if __name__ == "__main__":
    main(sys.argv[1])
