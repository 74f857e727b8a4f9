"""Restore a folder of pictures with a registered model or a checkpoint; every input has a row that says how.

A picture that cannot be restored is a row with the reason, never a copy of the input. Pictures are restored in
batches, here or on Ray. A batch stores its pictures, then its rows, so that a run that dies goes on after the last one;
at the end the rows of all batches become restored.jsonl.
"""

import functools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iqpir.config import digest
from iqpir.errors import IncompleteError, PermanentError, UsageError
from iqpir.faces import FaceDetector
from iqpir.pixels import PictureError, decode, encode_png
from iqpir.restorer import Restorer
from pipeline.commits.units import ActorPool, SchedulingConfig, schedule, uses_ray
from pipeline.face_detector import FacesConfig, load_detector
from pipeline.registry.opening import identity_of, open_restorer, pinned
from pipeline.sources.inputs import EXTENSIONS
from pipeline.storage import Entry, Storage
from pipeline.tracking.runs import tracking_location

RECORD, PARTS = "restored.jsonl", "restored.parts"
"""Rows of every input, and folder of those of the batches of a run that has not ended."""
NO_FACE = "no_face: the detector found none; lower faces.score, or set faces.background to restore."
_BATCH_BYTES = 32 << 20
"""Encoded bytes of a batch; a larger picture is a batch by itself."""
_IDLE_SECONDS = 5.0
Picture = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class RestoreConfig:
    """What is restored, by which model, how good."""

    model: str
    """``models:/iqpir@champion`` or ``models:/iqpir/3``, a checkpoint directory, or a run's folder."""
    input: str
    """Folder or URL with pictures."""
    output: str
    """Folder or URL for the restored PNGs and restored.jsonl."""
    quality: float | list[float] = 0.95
    """Wanted quality, 0 to 1; for a model that was trained with --scores also a list, one value for each."""
    fidelity: float = 0.0
    """0: best quality; 1: closest to the input (needs a stage-3 model)."""
    tracking_uri: str = ""
    """MLflow server or database of ``models:/`` URIs; $MLFLOW_TRACKING_URI or the workspace's by default."""
    device: str = "cpu"
    """Where the model runs."""
    batch: int = 16
    """Most pictures that are restored together and recorded together; their tiles share the network's batches."""
    tiles: int = 4
    """Tiles that go through the network at once."""
    faces: FacesConfig = field(default_factory=FacesConfig)
    """Faces in whole pictures: found, aligned, restored and put back."""
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)
    """How many batches at a time, and where. On Ray, workers are actors that keep the model."""

    def __post_init__(self) -> None:
        qualities = self.quality if isinstance(self.quality, list) else [self.quality]
        for name, value in [*(("quality", value) for value in qualities), ("fidelity", self.fidelity)]:
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"{name} {value} is outside [0, 1].")
        if self.batch < 1 or self.tiles < 1:
            raise UsageError(f"batch {self.batch} or tiles {self.tiles} is below 1.")
        if self.device.startswith("cuda") and self.scheduling.workers > 1 and not self.scheduling.gpus:
            raise UsageError("Workers on cuda need scheduling.gpus.", "For example --scheduling.gpus 1.")


@dataclass(frozen=True)
class RestoreResult:
    """Counts over all inputs, this time and earlier."""

    output: str
    inputs: int
    restored: int
    failed: int
    skipped: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One line of restored.jsonl: what became of one input."""

    relpath: str
    etag: str
    request: str
    output: str | None
    error: str | None


@dataclass(frozen=True)
class Item:
    """An input, and the name of its output."""

    relpath: str
    etag: str
    output: str


@dataclass(frozen=True)
class BatchRestorer:
    """Restores batches of one request; picklable, and loads the model where it is called."""

    config: RestoreConfig
    """With the model as ``pinned``."""
    request: str

    def __call__(self, batch: Sequence[Item]) -> list[Row]:
        """Store the pictures of a batch, then its rows; the rows.

        Raises:
            PermanentError: the network gives no pictures.
        """
        source, target = Storage.open(self.config.input), Storage.open(self.config.output)
        answers = self._restored([source.read(item.relpath) for item in batch])
        rows = []
        for item, answer in zip(batch, answers, strict=True):
            if isinstance(answer, str):
                rows.append(replace(_done(item, self.request), output=None, error=answer))
            else:
                target.publish(item.output, encode_png(answer))
                rows.append(_done(item, self.request))
        name = digest([asdict(item) for item in batch])
        target.publish(f"{PARTS}/{self.request}/{name}.jsonl", _lines(rows))
        return rows

    def _restored(self, files: Sequence[bytes]) -> list[Picture | str]:
        """The restored picture of each file, or why there is none."""
        restorer, detector = self.loaded()
        answers: list[Picture | str] = []
        for data in files:
            try:
                answers.append(decode(data, restorer.policy).array)
            except PictureError as error:
                answers.append(str(error))
        sound = [place for place, answer in enumerate(answers) if not isinstance(answer, str)]
        pictures = [answer for answer in answers if not isinstance(answer, str)]
        if detector is None:
            found: Sequence[Picture | str] = restorer.restore_batch(pictures, self.config.quality, self.config.fidelity)
        else:
            found = [self._with_faces(restorer, detector, picture) for picture in pictures]
        for place, answer in zip(sound, found, strict=True):
            answers[place] = answer
        return answers

    def _with_faces(self, restorer: Restorer, detector: FaceDetector, picture: Picture) -> Picture | str:
        """The picture with its faces restored; one without a face is an error, not a copy."""
        faces = self.config.faces
        result = restorer.restore_faces(
            picture,
            detector,
            self.config.quality,
            self.config.fidelity,
            background=faces.background,
            feather=faces.feather,
            which=faces.which,
        )
        return NO_FACE if result.faces == 0 and faces.background == "keep" else result.picture

    def loaded(self) -> tuple[Restorer, FaceDetector | None]:
        """The model, and the face detector if there is one."""
        config = self.config
        return _loaded(self.request, config.model, config.tracking_uri, config.device, config.tiles, config.faces)


@functools.lru_cache(maxsize=1)
def _loaded(
    request: str, model: str, tracking_uri: str, device: str, tiles: int, faces: FacesConfig
) -> tuple[Restorer, FaceDetector | None]:
    """The model of a request, and the face detector if there is one; kept from batch to batch."""
    restorer = open_restorer(model, tracking_uri, device, batch_size=tiles)
    return restorer, load_detector(faces)[0] if faces.detector else None


def restore(config: RestoreConfig) -> RestoreResult:
    """Restore every picture below ``input``; what an earlier run restored alike is skipped.

    Raises:
        UsageError: no such model, no pictures; or the model has not learnt the fidelity that is asked for.
        IncompleteError: stopped, or the storage failed; the same command goes on.
        PermanentError: not one picture could be restored, or the network gives no pictures.
    """
    started = time.monotonic()
    source, target = Storage.open(config.input), Storage.open(config.output)
    entries = [e for e in source.list() if PurePosixPath(e.path).suffix.lower() in EXTENSIONS]
    if not entries:
        raise UsageError(f"There are no pictures below {config.input}.", f"Known: {' '.join(sorted(EXTENSIONS))}.")
    tracking_uri = tracking_location(config.tracking_uri) if config.model.startswith("models:/") else ""
    config = replace(config, model=pinned(config.model, config.tracking_uri), tracking_uri=tracking_uri)
    detector = load_detector(config.faces)[1] if config.faces.detector else ""
    work = BatchRestorer(config, digest(_identity(config, detector)))
    names = _output_names(entries)
    earlier = _earlier(target, work.request)
    items = [Item(entry.path, entry.etag, names[entry.path]) for entry in entries]
    todo = [item for item in items if earlier.get(item.relpath) != _done(item, work.request)]
    kept = {item.relpath for item in items} - {item.relpath for item in todo}
    rows = [earlier[relpath] for relpath in sorted(kept)]
    if todo:
        _require_dials(work)
        _claim(target, work.request, rows)
        rows += _run(work, list(batches(todo, {entry.path: entry.size for entry in entries}, config.batch)))
        target.publish(RECORD, _lines(rows))
        _discard_parts(target)
    failed = [row for row in rows if row.error is not None]
    if len(failed) == len(entries):
        raise PermanentError(
            f"Not one of {len(entries)} pictures could be restored; the first: {failed[0].error}",
            f"{target.uri(RECORD)} has a reason for each.",
        )
    return RestoreResult(
        target.url, len(entries), len(rows) - len(failed), len(failed), len(kept), time.monotonic() - started
    )


def _require_dials(work: BatchRestorer) -> None:
    """Open the model here: what is wrong with it or the fidelity is said before any work. Workers have GPUs, maybe.

    Raises:
        UsageError: the model has not learnt the fidelity that is asked for.
        VerificationError: the model is damaged.
    """
    config = work.config
    if uses_ray(config.scheduling.workers):
        work = replace(work, config=replace(config, device="cpu"))
    restorer, _ = work.loaded()
    restorer.restore_batch(list[Picture](), config.quality, config.fidelity)


def _run(work: BatchRestorer, tasks: Sequence[Sequence[Item]]) -> list[Row]:
    """Rows of every batch.

    Raises:
        IncompleteError, PermanentError: a batch is not done.
    """
    rows, errors = [], []
    pool = ActorPool(least=0, idle_seconds=_IDLE_SECONDS)
    for _, outcome in schedule(iter(tasks), work, len(tasks), "restore", work.config.scheduling, pool):
        rows += outcome.value or []
        if outcome.kind:
            errors.append((outcome.kind, outcome.error))
    for kind, error in errors:
        if kind == "permanent":
            raise PermanentError(error)
    left = sum(map(len, tasks)) - len(rows)
    if left:
        cause = f": {errors[0][1].rstrip('.')}" if errors else ""
        raise IncompleteError(f"{left} pictures are not restored{cause}.", "The same command goes on.")
    return rows


def batches(items: Sequence[Item], sizes: Mapping[str, int], most: int) -> Iterator[list[Item]]:
    """Items in their order, so many and of so many bytes that they are restored together."""
    batch: list[Item] = []
    total = 0
    for item in items:
        if batch and (len(batch) == most or total + sizes[item.relpath] > _BATCH_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += sizes[item.relpath]
    if batch:
        yield batch


def _done(item: Item, request: str) -> Row:
    """The row of an item that is restored."""
    return Row(item.relpath, item.etag, request, item.output, None)


def _lines(rows: Sequence[Row]) -> bytes:
    ordered = sorted(rows, key=lambda row: row.relpath)
    return "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in ordered).encode()


def _earlier(target: Storage, request: str) -> dict[str, Row]:
    """Rows of the inputs that this same request has restored, and whose output is still there; by relpath."""
    present = {entry.path for entry in target.list()}
    files = [path for path in sorted(present) if path == RECORD or path.startswith(f"{PARTS}/{request}/")]
    rows = [Row(**json.loads(line)) for path in files for line in target.read(path).decode().splitlines()]
    return {row.relpath: row for row in rows if row.request == request and row.error is None and row.output in present}


def _claim(target: Storage, request: str, rows: Sequence[Row]) -> None:
    """Let the record speak of this request alone, before outputs of another one are overwritten."""
    if any(Row(**json.loads(line)).request != request for line in _record(target)):
        target.publish(RECORD, _lines(rows))
    for entry in target.list(PARTS):
        if not entry.path.startswith(f"{PARTS}/{request}/"):
            target.remove(entry.path)


def _record(target: Storage) -> list[str]:
    return target.read(RECORD).decode().splitlines() if target.exists(RECORD) else []


def _discard_parts(target: Storage) -> None:
    for entry in target.list(PARTS):
        target.remove(entry.path)


def _output_names(entries: list[Entry]) -> dict[str, str]:
    """``a/b.jpg`` -> ``a/b.png``; ``a/b.jpg.png`` where two inputs would share that name."""
    short = {entry.path: str(PurePosixPath(entry.path).with_suffix(".png")) for entry in entries}
    taken = Counter(short.values())
    return {path: name if taken[name] == 1 else f"{path}.png" for path, name in short.items()}


def _identity(config: RestoreConfig, detector: str) -> list[Any]:
    """What tells two restorations of one picture apart."""
    alike = [identity_of(config.model), config.quality, config.fidelity]
    return [*alike, {**asdict(config.faces), "detector": detector}] if detector else alike
