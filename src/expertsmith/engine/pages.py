"""Control how glibc keeps and returns freed memory, through ctypes, because Python has no API for it. With another C library this does nothing.

A caching allocator for CPU memory in torch, like the one for GPUs, would replace this file.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt
LARGEST = 32 * 2**20  # blocks of this size or more always have their own pages; upper end of glibc's own adjustment
USUAL_TRIM = 2 * LARGEST  # free memory at the heap's end that glibc then keeps


def _mallopt() -> Callable[[int, int], int]:
    try:
        found: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return lambda parameter, value: 0
    return found


@contextlib.contextmanager
def own_pages() -> Iterator[None]:
    """Within the context, glibc gives every block of a megabyte or more its own pages, which return to the system when it is freed. A
    conversion to float32 frees hundreds of blocks below glibc's usual limit, and the next fused tensor would not fit into their place."""
    mallopt = _mallopt()
    mallopt(MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, LARGEST)


@contextlib.contextmanager
def kept_pages() -> Iterator[None]:
    """Within the context, glibc keeps freed blocks below 32 MB for reuse. Otherwise every batch of a forward faults its buffers in again,
    page by page, which takes a third of the time of a calibration."""
    mallopt = _mallopt()
    mallopt(MMAP_THRESHOLD, LARGEST)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(TRIM_THRESHOLD, USUAL_TRIM)
        trim()


def trim() -> None:
    """Return freed memory to the system. glibc keeps freed memory below any block still in use, and the many small tensors of a layer lie
    there, so that the resident set would grow by fragments from layer to layer."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
