"""Keep checkpoints at a URL: payload first, ``MANIFEST.json`` last, only what verifies is loaded."""

import atexit
import logging
import re
import secrets
import shutil
import tempfile
from functools import cached_property
from pathlib import Path

from iqpir.errors import UsageError, VerificationError
from iqpir.training.checkpoint import MANIFEST, Checkpoint, load, verify
from iqpir.training.folder_sink import FolderSink
from iqpir.training.loop import CheckpointSink
from pipeline.storage import Storage

log = logging.getLogger(__name__)
_NAME = re.compile(r"^step_(\d{8})-a(\d+)$")


class CheckpointStore:
    """The checkpoints of one run, under ``<run url>/checkpoints/step_00000100-a1`` (a ``CheckpointSink``).

    The attempt is part of the name, so a writer that was believed dead, or one that runs at the same time, cannot
    mix its files with another's. A directory without a manifest is an unfinished upload and is never read.

    Args:
        storage: the run's ``checkpoints`` folder.
        keep: newest checkpoints that are kept; older ones go after a newer one is complete.
    """

    def __init__(self, storage: Storage, keep: int) -> None:
        self.storage = storage
        self.keep = keep

    @cached_property
    def attempt(self) -> int:
        """Number of this attempt, taken when it first writes: the object ``attempts/a1`` has one maker."""
        number, ours = 1 + max((attempt for _, attempt, _, _ in self._found()), default=0), secrets.token_bytes(16)
        while self.storage.create(f"attempts/a{number}", ours) != ours:
            number += 1
        return number

    def save(self, directory: Path, step: int) -> None:
        """Publish a local checkpoint directory as that of ``step``, and remove the local one."""
        name = f"step_{step:08d}-a{self.attempt}"
        files = [path for path in directory.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.name == MANIFEST, path)):
            self.storage.publish(f"{name}/{path.relative_to(directory).as_posix()}", path)
        shutil.rmtree(directory)
        complete = sorted(found for found in self._found() if found[3])
        for _, _, old, _ in complete[: -self.keep]:
            self._remove(old)

    def latest(self, into: Path) -> Path | None:
        """Download the newest checkpoint that verifies into a folder below ``into``; None when there is none."""
        for _, _, name, complete in sorted(self._found(), reverse=True):
            if not complete:
                continue
            target = self._download(name, into)
            try:
                verify(target)
            except VerificationError as error:
                log.warning("checkpoint %s is damaged, trying the one before: %s", self.storage.uri(name), error)
                continue
            return target
        return None

    def _found(self) -> list[tuple[int, int, str, bool]]:
        """(step, attempt, name, has a manifest) of every checkpoint directory."""
        names: dict[str, bool] = {}
        for entry in self.storage.list():
            name, _, rest = entry.path.partition("/")
            names[name] = names.get(name, False) or rest == MANIFEST
        matches = [(match, complete) for name, complete in names.items() if (match := _NAME.match(name))]
        return [(int(match[1]), int(match[2]), match[0], complete) for match, complete in matches]

    def _download(self, name: str, into: Path) -> Path:
        target = into / name
        for entry in self.storage.list(name):
            _copy(self.storage, entry.path, into)
        return target

    def _remove(self, name: str) -> None:
        """The manifest goes first: what is left of an interrupted removal is an unfinished directory."""
        entries = self.storage.list(name)
        for entry in sorted(entries, key=lambda entry: not entry.path.endswith(MANIFEST)):
            self.storage.remove(entry.path)


def checkpoint_sink(run_url: str, keep: int = 2) -> CheckpointSink:
    """Where the checkpoints of the run at ``run_url`` go: a local folder's are moved, others uploaded."""
    storage = Storage.open(run_url).child("checkpoints")
    folder = storage.local("")
    return CheckpointStore(storage, keep) if folder is None else FolderSink(folder, keep)


def fetch_checkpoint(url: str, into: Path | None = None) -> Path:
    """A local, verified copy of a checkpoint.

    Args:
        url: a checkpoint directory, or a run's folder, of which the newest checkpoint is taken.
        into: folder for the copy of a remote one; by default one that goes when this process ends.

    Raises:
        UsageError: there is no checkpoint.
        VerificationError: files differ from the manifest.
    """
    storage = Storage.open(url)
    into = into or storage.local("") or _temporary()
    if not storage.exists(MANIFEST):
        found = checkpoint_sink(url).latest(into)
        if found is None:
            raise UsageError(f"{url} holds no finished checkpoint.", "Train first, or name another run.")
        return found
    local = storage.local(MANIFEST)
    if local is not None:
        directory = local.parent
    else:
        directory = into
        for entry in storage.list():
            _copy(storage, entry.path, directory)
    verify(directory)
    return directory


def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="iqpir-checkpoint-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def load_stage1(url: str) -> Checkpoint:
    """A checkpoint of stage 1, or the newest one of its run.

    Raises:
        UsageError: there is no checkpoint, or it is of another stage: those have another encoder, for degraded
            pictures, whose codes are not what the good pictures are made of.
        VerificationError: files differ from the manifest.
    """
    found = load(fetch_checkpoint(url))
    if found.stage != "stage1":
        started = found.metadata.get("lineage", {}).get("stage1", "")
        raise UsageError(
            f"{url} is a checkpoint of {found.stage}, not of stage 1.",
            f"Name the stage 1 that it started from{f' ({started[:12]})' if started else ''}.",
        )
    return found


def _copy(storage: Storage, path: str, into: Path) -> None:
    target = into / path
    target.parent.mkdir(parents=True, exist_ok=True)
    storage.download(path, target)
