"""Checkpoints kept in a local folder, the newest good one first."""

import logging
import re
import shutil
from functools import cached_property
from pathlib import Path

from iqpir.errors import UsageError, VerificationError
from iqpir.training.checkpoint import verify

log = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{8})-a(\d+)")


class FolderSink:
    """Keeps checkpoints as ``folder/step_00000100-a1``.

    A training that is started again, or twice at once, never writes into what another attempt wrote: each has
    its number ``a``.

    Args:
        folder: created when the first checkpoint is kept.
        keep: how many to keep; more than one, or a damaged newest leaves nothing to go back to.

    Raises:
        UsageError: ``keep`` is less than 1.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise UsageError(f"Keeping {keep} checkpoints is not possible.", "Keep at least 1, better 2.")
        self.folder = folder
        self.keep = keep

    @cached_property
    def attempt(self) -> int:
        """Number of this attempt, taken when it first writes: the file ``attempts/a1`` is made by one alone."""
        claims = self.folder / "attempts"
        claims.mkdir(parents=True, exist_ok=True)
        number = 1 + max((attempt for _, attempt, _ in self._kept()), default=0)
        while True:
            try:
                (claims / f"a{number}").touch(exist_ok=False)
            except FileExistsError:
                number += 1
                continue
            return number

    def save(self, directory: Path, step: int) -> None:
        """Move ``directory`` in under its final name, then remove what is more than ``keep``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step_{step:08d}-a{self.attempt}"
        if target.exists():
            raise UsageError(f"Checkpoint {target} exists already.")
        incoming = self.folder / f".incoming-{target.name}"
        if incoming.exists():
            shutil.rmtree(incoming)
        shutil.move(directory, incoming)
        incoming.rename(target)
        for _, _, old in self._kept()[: -self.keep]:
            shutil.rmtree(old)

    def latest(self, into: Path) -> Path | None:
        """The newest checkpoint that verifies, or None; nothing is copied to ``into``.

        A damaged one is passed over with a warning.
        """
        for _, _, directory in reversed(self._kept()):
            try:
                verify(directory)
            except VerificationError as error:
                log.warning("Passing over checkpoint %s: %s", directory.name, error)
                continue
            return directory
        return None

    def _kept(self) -> list[tuple[int, int, Path]]:
        """(step, attempt, directory), oldest first."""
        if not self.folder.is_dir():
            return []
        matches = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(match[1]), int(match[2]), path) for match, path in matches if match)
