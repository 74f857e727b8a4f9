"""Restore a folder of pictures with a registered model or a checkpoint; every input has a row that says how.

A picture that cannot be restored is a row with the reason, never a copy of the input.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from iqpir.config import digest
from iqpir.errors import PermanentError, UsageError
from iqpir.faces import FaceDetector
from iqpir.pixels import PictureError, encode_png
from iqpir.restorer import Restorer
from iqpir.training.checkpoint import load
from pipeline.face_detector import FacesConfig, load_detector
from pipeline.progress import progress
from pipeline.sources.inputs import EXTENSIONS
from pipeline.storage import Entry, Storage
from pipeline.tracking.runs import reachable, tracking_location, wait_at_most
from pipeline.training.checkpoints import fetch_checkpoint

RECORD = "restored.jsonl"
_REGISTRY = ("models:/", "runs:/")
Restore = Callable[[bytes], tuple[bytes | None, str | None]]
"""Picture bytes -> (PNG bytes, None) or (None, why not)."""


@dataclass(frozen=True, kw_only=True)
class RestoreConfig:
    """What is restored, by which model, how good."""

    model: str
    """``models:/iqpir@champion`` (or any MLflow model URI), a checkpoint directory, or a run's folder."""
    input: str
    """Folder or URL with pictures."""
    output: str
    """Folder or URL for the restored PNGs and restored.jsonl."""
    quality: float | list[float] = 0.95
    """Wanted quality, 0 to 1; for a checkpoint that was trained with --scores also a list, one value for each."""
    fidelity: float = 0.0
    """0: best quality; 1: closest to the input (needs a stage-3 model)."""
    tracking_uri: str = ""
    """MLflow server or database of ``models:/`` URIs; $MLFLOW_TRACKING_URI or the workspace's by default."""
    device: str = "cpu"
    """Where a checkpoint runs; a registered model chooses by itself."""
    faces: FacesConfig = field(default_factory=FacesConfig)
    """Faces in whole pictures: found, aligned, restored and put back."""

    def __post_init__(self) -> None:
        if self.faces.detector and self.model.startswith(_REGISTRY):
            raise UsageError(
                f"Faces are aligned to the size of a network, which {self.model} does not tell.",
                "Give the checkpoint or the run that was registered as model.",
            )
        qualities = self.quality if isinstance(self.quality, list) else [self.quality]
        if isinstance(self.quality, list) and self.model.startswith(_REGISTRY):
            raise UsageError(
                f"A registered model takes one quality for all scores, not {self.quality}.",
                "Give one, or the checkpoint that was registered as model.",
            )
        for name, value in [*(("quality", value) for value in qualities), ("fidelity", self.fidelity)]:
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"{name} {value} is outside [0, 1].")


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


def restore(config: RestoreConfig) -> RestoreResult:
    """Restore every picture below ``input``; what an earlier run restored alike is skipped.

    Raises:
        UsageError: no such model, no pictures.
        PermanentError: not one picture could be restored.
    """
    started = time.monotonic()
    source, target = Storage.open(config.input), Storage.open(config.output)
    entries = [e for e in source.list() if PurePosixPath(e.path).suffix.lower() in EXTENSIONS]
    if not entries:
        raise UsageError(f"There are no pictures below {config.input}.", f"Known: {' '.join(sorted(EXTENSIONS))}.")
    config = _pinned(config)
    detector = load_detector(config.faces) if config.faces.detector else None
    request = digest(_identity(config, "" if detector is None else detector[1]))
    earlier = _earlier(target, request)
    names = _output_names(entries)
    todo = [entry for entry in entries if earlier.get(entry.path) != entry.etag]
    rows = [row for row in _read_record(target) if row.request == request and row.error is None]
    rows = [row for row in rows if row.relpath not in {entry.path for entry in todo}]
    skipped = len(rows)
    if todo:
        run = _restorer(config) if detector is None else _face_restorer(config, detector[0])
        with progress(len(todo), "restore") as meter:
            for entry in todo:
                picture, error = run(source.read(entry.path))
                if picture is not None:
                    target.publish(names[entry.path], picture)
                output = names[entry.path] if picture is not None else None
                rows.append(Row(entry.path, entry.etag, request, output, error))
                meter.advance()
        record = "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in sorted(rows, key=_by_path))
        target.publish(RECORD, record.encode())
    failed = [row for row in rows if row.error is not None]
    if len(failed) == len(entries):
        raise PermanentError(
            f"Not one of {len(entries)} pictures could be restored; the first: {failed[0].error}",
            f"{target.uri(RECORD)} has a reason for each.",
        )
    return RestoreResult(
        target.url, len(entries), len(rows) - len(failed), len(failed), skipped, time.monotonic() - started
    )


def _by_path(row: Row) -> str:
    return row.relpath


def _read_record(target: Storage) -> Iterator[Row]:
    if target.exists(RECORD):
        for line in target.read(RECORD).decode().splitlines():
            yield Row(**json.loads(line))


def _earlier(target: Storage, request: str) -> dict[str, str]:
    """etag of each input that this same request has restored, and whose output is still there."""
    present = {entry.path for entry in target.list()}
    return {
        row.relpath: row.etag
        for row in _read_record(target)
        if row.request == request and row.error is None and row.output in present
    }


def _output_names(entries: list[Entry]) -> dict[str, str]:
    """``a/b.jpg`` -> ``a/b.png``; ``a/b.jpg.png`` where two inputs would share that name."""
    short = {entry.path: str(PurePosixPath(entry.path).with_suffix(".png")) for entry in entries}
    taken = Counter(short.values())
    return {path: name if taken[name] == 1 else f"{path}.png" for path, name in short.items()}


def _pinned(config: RestoreConfig) -> RestoreConfig:
    """With what the model means now: an alias moves, and a run's newest checkpoint gets a successor.

    Raises:
        UsageError: no such model.
    """
    if not config.model.startswith(_REGISTRY):
        return replace(config, model=str(fetch_checkpoint(config.model)))
    if "@" not in config.model:
        return config
    from pipeline.registry.registered import resolve

    version = resolve(config.model, _registry(config))
    return replace(config, model=f"models:/{version.name}/{version.version}")


def _weights(model: str) -> str:
    """What tells the restorations of two pinned models apart."""
    return model if model.startswith(_REGISTRY) else str(load(Path(model)).metadata["weights_digest"])


def _identity(config: RestoreConfig, detector: str) -> list[Any]:
    """What tells two restorations of one picture apart."""
    alike = [_weights(config.model), config.quality, config.fidelity]
    return [*alike, {**asdict(config.faces), "detector": detector}] if detector else alike


def _face_restorer(config: RestoreConfig, detector: FaceDetector) -> Restore:
    """A function over bytes that restores the faces in a picture; one without a face is an error, not a copy."""
    restorer = Restorer.load(config.model, device=config.device)
    faces = config.faces

    def run(data: bytes) -> tuple[bytes | None, str | None]:
        try:
            result = restorer.restore_faces(
                data,
                detector,
                config.quality,
                config.fidelity,
                background=faces.background,
                feather=faces.feather,
                which=faces.which,
            )
        except PictureError as error:
            return None, str(error)
        if result.faces == 0 and faces.background == "keep":
            return None, "no_face: the detector found none; lower faces.score, or set faces.background to restore."
        return encode_png(result.picture), None

    return run


def _restorer(config: RestoreConfig) -> Restore:
    """A function over bytes, from a registered model or a checkpoint."""
    if config.model.startswith(_REGISTRY):
        return _registered(config)
    restorer = Restorer.load(config.model, device=config.device)

    def run(data: bytes) -> tuple[bytes | None, str | None]:
        try:
            return restorer.restore(data, quality=config.quality, fidelity=config.fidelity), None
        except PictureError as error:
            return None, str(error)

    return run


def _registry(config: RestoreConfig) -> str:
    """Address of the registry, which answers. MLflow's client by itself waits for minutes.

    Raises:
        UsageError: it does not.
    """
    uri = tracking_location(config.tracking_uri)
    wait_at_most(600, 2)
    reachable(uri)
    return uri


def _registered(config: RestoreConfig) -> Restore:
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(_registry(config))
    try:
        model = mlflow.pyfunc.load_model(config.model)
    except MlflowException as error:
        raise UsageError(
            f"Cannot load {config.model}: {error.message.rstrip('.')}.",
            "jobs/register.py registers a model; see docs/jobs.md.",
        ) from error

    def run(data: bytes) -> tuple[bytes | None, str | None]:
        frame = pd.DataFrame({"image": [data]})
        try:
            row = model.predict(frame, params={"quality": config.quality, "fidelity": config.fidelity}).iloc[0]
        except MlflowException as error:
            raise UsageError(f"{config.model} refuses: {error.message}", "See --quality and --fidelity.") from error
        restored = row["image"]
        return (bytes(restored), None) if isinstance(restored, bytes) else (None, str(row["error"]))

    return run
