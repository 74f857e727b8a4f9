"""Read a view: the selection of samples, with their labels, that a training or an export uses."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from iqpir.errors import UsageError, VerificationError
from pipeline.corpus import Corpus
from pipeline.layout import from_parquet

_REFERENCE = re.compile(r"^(?P<name>[A-Za-z0-9_.\-]+?)(@v(?P<version>\d+))?$")


@dataclass(frozen=True)
class View:
    """One version of a selection.

    Attributes:
        table: a row per sample: where its bytes are (shard, member, byte_offset, byte_size, sha256), its
            label columns, and ``split`` (train or val).
        facts: the JSON beside it: where-text, parents' digests, counts.
    """

    table: pa.Table
    facts: dict[str, Any]

    @property
    def reference(self) -> str:
        """``name@vNNNN``: exactly this version."""
        return f"{self.facts['name']}@v{self.facts['version']:04d}"

    @property
    def digest(self) -> str:
        """Digest of the rows; two views with equal digests train alike."""
        return str(self.facts["digest"])

    def split(self, name: str) -> pa.Table:
        """Rows of ``train`` or ``val``.

        Raises:
            UsageError: the split has no rows.
        """
        rows = self.table.filter(pa.compute.equal(self.table["split"], name))
        if rows.num_rows == 0:
            raise UsageError(
                f"View {self.reference} has no rows in its {name} split.",
                "Curate with another holdout, or from more source pictures.",
            )
        return rows


def read_view(corpus: Corpus, reference: str) -> View:
    """The view called ``reference`` (``name`` for the newest version, or ``name@v0002``).

    Raises:
        UsageError: there is no such view; the message lists those there are.
        VerificationError: its rows do not have the digest that its JSON states.
    """
    match = _REFERENCE.match(reference)
    if match is None:
        raise UsageError(f"{reference!r} names no view.", "Write name or name@v0002.")
    versions = sorted(
        entry.path for entry in corpus.storage.list(f"views/{match['name']}") if entry.path.endswith(".json")
    )
    wanted = f"views/{match['name']}/v{int(match['version']):04d}.json" if match["version"] else None
    path = (versions[-1] if versions else None) if wanted is None else wanted
    if path is None or path not in versions:
        corpus.manifest()  # where there is no corpus, that is the first thing to say
        known = sorted({e.path.split("/")[1] for e in corpus.storage.list("views") if "/" in e.path})
        raise UsageError(
            f"The corpus {corpus.storage.url} has no view {reference}.",
            f"Known views: {', '.join(known) or 'none'}; jobs/curate.py makes one.",
        )
    facts = json.loads(corpus.storage.read(path))
    data = corpus.storage.read(path.removesuffix(".json") + ".parquet")
    if view_digest(data) != facts["digest"]:
        raise VerificationError(
            f"The rows of view {reference} do not have the digest {facts['digest']} of its JSON.",
            "Curate it again under another name.",
        )
    return View(from_parquet(data), facts)


def view_digest(data: bytes) -> str:
    """First 32 hex digits of the sha256 of a view's Parquet bytes (MLflow holds 36)."""
    return hashlib.sha256(data).hexdigest()[:32]
