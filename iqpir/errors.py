"""Errors for users: what happened, what to do, where to read; each knows its exit code.

IqpirError
├── UsageError          1   a wrong flag, path, key or environment; nothing was written
├── IncompleteError     3   some work is left; the same command goes on where it stopped
├── VerificationError   4   an artifact is not what its record says
└── PermanentError      5   failed for good; running again changes nothing
"""

from typing import ClassVar


class IqpirError(Exception):
    """Base of every error that is meant for a user.

    Args:
        what: one sentence: what happened, naming the value or the file.
        remedy: what to do about it.
        read: a document of this repository that explains more, such as ``docs/jobs.md``.
    """

    exit_code: ClassVar[int] = 5

    def __init__(self, what: str, remedy: str = "", read: str = "") -> None:
        self.what, self.remedy, self.read = what, remedy, read
        super().__init__(what, remedy, read)

    def __str__(self) -> str:
        see = f"See {self.read}." if self.read else ""
        return " ".join(part for part in (self.what, self.remedy, see) if part)


class UsageError(IqpirError):
    """A wrong flag, path, key or environment. Nothing was written."""

    exit_code = 1


class IncompleteError(IqpirError):
    """Some planned work is not done. Running the same command again goes on with it."""

    exit_code = 3


class VerificationError(IqpirError):
    """An artifact differs from its record (size, digest, count, lineage)."""

    exit_code = 4


class PermanentError(IqpirError):
    """The work cannot succeed with these inputs and this configuration."""

    exit_code = 5
