"""Count pairs of codes in place: the only file that uses a private part of scipy.

Why: scipy's conversion of coordinates to a dense table counts in one pass, without an index of 8 bytes per entry. It is twice as fast as
`numpy.bincount`, which also makes a table for each call. Its public form (`coo_array.toarray`) clears the table first.
`numpy.bincount(a * cells_b + b)`, added to the table, could replace it: half the speed, the same integers (tested).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import _sparsetools

Array = np.ndarray[Any, Any]
CHUNK = 1 << 17  # entries at a time, so that their codes (1 MB) stay in the cache beside the table of counts


def count_pairs(rows: Array, columns: Array, used: tuple[int, int]) -> Array:
    """Count how often each pair occurs: flat table [used[0] * used[1]].

    Args:
        rows, columns: integer arrays of equal size, with entries below used[0] and used[1].
    """
    n = rows.size
    counts = np.zeros(used[0] * used[1], np.int32 if n < 2**31 else np.int64)
    chunk = min(n, CHUNK)
    first, second, ones = np.empty(chunk, np.int32), np.empty(chunk, np.int32), np.ones(chunk, counts.dtype)
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        first[:size] = rows[start : start + size]
        second[:size] = columns[start : start + size]
        _sparsetools.coo_todense(*used, size, first, second, ones, counts, 0)
    return counts
