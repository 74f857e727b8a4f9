"""Deal a view's samples to tars so that each tar is a small copy of the view: in quality, number and bytes."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def deal(rows: pa.Table, limit: int) -> tuple[pa.Table, list[int]]:
    """Rows in the order of their tars, and how many each tar takes.

    With n tars, rows by rising quality are cut into strata of n; each tar takes one row of each stratum. So all tars
    have the view's distribution of quality, and numbers that differ by one at most. Within a stratum the largest
    sample goes to the tar with the fewest bytes so far, which keeps bytes level. A function of the rows alone.

    Args:
        rows: of the view: key, quality, byte_size.
        limit: bytes of a tar; as many tars are made as all bytes need, at least one.

    Returns:
        The rows, tar by tar, within a tar in the order of the view; rows of each tar.
    """
    sizes = rows["byte_size"].to_numpy().astype(np.int64)
    count = min(max(1, -(-int(sizes.sum()) // limit)), rows.num_rows)
    order = np.lexsort((np.arange(rows.num_rows), rows["quality"].to_numpy()))
    tars = _dealt(sizes[order], count)
    chosen: list[list[int]] = [[] for _ in range(count)]
    for row, tar in zip(order.tolist(), tars, strict=True):
        chosen[tar].append(row)
    indices = [row for tar in chosen for row in sorted(tar)]
    return rows.take(pa.array(indices, pa.int64())), [len(tar) for tar in chosen]


def _dealt(sizes: Sequence[int], count: int) -> list[int]:
    """Tar of each sample; ``sizes`` in order of quality."""
    tars = np.zeros(len(sizes), np.int64)
    filled = np.zeros(count, np.int64)
    for start in range(0, len(sizes), count):
        part = np.asarray(sizes[start : start + count])
        largest_first = np.argsort(-part, kind="stable")
        emptiest_first = np.argsort(filled, kind="stable")[: len(part)]
        tars[start + largest_first] = emptiest_first
        filled[emptiest_first] += part[largest_first]
    return [int(tar) for tar in tars]
