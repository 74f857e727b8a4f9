"""The rows of a corpus, for tests."""

from typing import Any

from pipeline.corpus import Corpus


def rows_of(corpus: str) -> dict[str, dict[str, Any]]:
    """Every live row by relative path."""
    found = Corpus(corpus)
    return {row["relpath"]: row for unit in found.manifest().units for row in found.rows(unit).to_pylist()}
