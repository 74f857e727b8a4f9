"""A sealed corpus: its tables and the bytes of a sample.

Readers accept only what the manifest names that ``_SUCCESS`` points to, never a directory listing: an orphan
or a half-done unit cannot be read. Names, schemas and the Parquet form are in ``pipeline.layout``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commits.manifest import Manifest, ManifestUnit, differs, read_manifest
from pipeline.documents import in_threads, publish_table
from pipeline.layout import SAMPLES, SCORES, ObjectRef, from_parquet, sha256_hex, to_parquet
from pipeline.storage import Storage

__all__ = ["SAMPLES", "SCORES", "Corpus", "Manifest", "ManifestUnit", "ObjectRef", "to_parquet"]


class Corpus:
    """A corpus at a folder or URL.

    Args:
        url: the root, or a storage that is open there.
    """

    def __init__(self, url: str | Storage) -> None:
        self.storage = url if isinstance(url, Storage) else Storage.open(url)
        self._manifest: Manifest | None = None

    def manifest(self) -> Manifest:
        """The sealed manifest; read once.

        Raises:
            UsageError: nothing is sealed here.
            VerificationError: ``_SUCCESS``, the manifest and its facts contradict each other.
        """
        if self._manifest is None:
            self._manifest = read_manifest(self.storage)
        return self._manifest

    def rows(self, unit: ManifestUnit, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of a unit's live inputs (``SAMPLES``), ordered by key; rejected and failed ones included.

        Raises:
            VerificationError: the table is not what the manifest says.
        """
        data = self.storage.read(unit.table)
        if sha256_hex(data) != unit.table_sha256:
            raise differs(self.storage, unit.table)
        needed = sorted({*columns, "relpath"}) if columns is not None else None
        table = from_parquet(data, needed)
        if unit.superseded:
            gone = pa.array(unit.superseded, pa.string())
            table = table.filter(pc.invert(pc.is_in(table["relpath"], value_set=gone)))
        return table.select(list(columns)) if columns is not None else table.cast(SAMPLES)

    def unit_samples(self, unit: ManifestUnit, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of a unit's live samples, ordered by key.

        Raises:
            VerificationError: the table is not what the manifest says.
        """
        wanted = list(columns) if columns is not None else SAMPLES.names
        table = self.rows(unit, sorted({*wanted, "status"}))
        return table.filter(pc.equal(table["status"], "success")).select(wanted)

    def samples(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Every live sample of the corpus, by ordinal and key.

        Args:
            columns: a choice of those of ``SAMPLES``; all by default.

        Raises:
            UsageError: nothing is sealed here.
            VerificationError: a table is not what the manifest says.
        """
        tables = in_threads(lambda unit: self.unit_samples(unit, columns), self.manifest().units)
        return pa.concat_tables(tables)

    def read_sample(self, row: Mapping[str, Any]) -> bytes:
        """Bytes of one sample: one range read.

        Args:
            row: has ``shard``, ``byte_offset``, ``byte_size`` and ``sha256``.

        Raises:
            VerificationError: the bytes are not those that were committed.
        """
        data = self.storage.read_range(row["shard"], row["byte_offset"], row["byte_size"])
        if sha256_hex(data) != row["sha256"]:
            raise differs(self.storage, f"{row['shard']} at byte {row['byte_offset']}")
        return data

    def publish_table(
        self, table: pa.Table, path: Callable[[str], str], metadata: Mapping[str, str] | None = None
    ) -> ObjectRef:
        """Store a table under a name made from its sha256.

        Args:
            table: the rows.
            path: sha256 -> path, such as ``lambda sha256: layout.labels_path(name, ordinal, sha256)``.
            metadata: for the Parquet footer.
        """
        return publish_table(self.storage, table, path, metadata)
