"""Brace and wildcard patterns in URLs: ``shards/train-{000..127}.tar``, ``photos/**/*.tar``."""

import itertools
import re

from iqpir.errors import UsageError

MOST_NAMES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_pattern(url: str) -> bool:
    """Whether ``url`` stands for several names."""
    return any(mark in url for mark in "*?[{")


def split_pattern(url: str) -> tuple[str, str]:
    """The folder or prefix before the first part with a pattern, and the rest.

    Raises:
        UsageError: the pattern begins before any folder.
    """
    parts = url.split("/")
    first = next(number for number, part in enumerate(parts) if is_pattern(part))
    base = "/".join(parts[:first])
    if base.endswith((":/", ":")):
        raise UsageError(f"The pattern {url} names no bucket.", "Patterns may follow the bucket only.")
    return base or ("/" if url.startswith("/") else "."), "/".join(parts[first:])


def expand_braces(pattern: str) -> list[str]:
    """Names that ``{a,b}`` and ``{000..127}`` stand for, in that order; other characters stay.

    Raises:
        UsageError: a range runs backwards, or there are more than a million names.
    """
    pieces = _BRACES.split(pattern)
    choices = [_choices(piece, pattern) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MOST_NAMES:
        raise UsageError(f"The pattern {pattern} stands for {count} names.", f"At most {MOST_NAMES} are taken.")
    return ["".join(parts) for parts in itertools.product(*choices)]


def matcher(pattern: str) -> re.Pattern[str]:
    """Of whole relative paths: ``*`` and ``?`` stay within a folder, ``**`` is any number of folders."""
    found = []
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern):
        if part == "**/":
            found.append(r"(?:[^/]+/)*")
        elif part == "**":
            found.append(".*")
        elif part in ("*", "?"):
            found.append(f"[^/]{'*' if part == '*' else ''}")
        elif part.startswith("[") and part.endswith("]"):
            found.append("[^" + part[2:] if part.startswith("[!") else part)
        else:
            found.append(re.escape(part))
    return re.compile("".join(found))


def _choices(text: str, pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(text)
    if numbers is None:
        return text.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if first > last:
        raise UsageError(f"The range {{{text}}} in {pattern} runs backwards.")
    if last - first >= MOST_NAMES:
        raise UsageError(f"The range {{{text}}} in {pattern} has more than {MOST_NAMES} names.")
    width = len(numbers[1]) if numbers[1].startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]
