"""Control how glibc returns freed memory, through ctypes, because Python has no API for it. With another C library this does nothing.

A caching allocator for CPU memory in torch, like the one for GPUs, would replace this file.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator


@contextlib.contextmanager
def own_pages() -> Iterator[None]:
    """Have glibc give every block of a megabyte or more pages of its own, which go back to the system when it is freed. A conversion to
    float32 frees hundreds of blocks below glibc's usual limit, and what is fused next would not fit where they lay."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        yield
        return
    threshold, usual = -3, 32 * 2**20  # M_MMAP_THRESHOLD, and the value at which glibc's own adjustment ends
    mallopt(threshold, 2**20)
    try:
        yield
    finally:
        mallopt(threshold, usual)


def trim() -> None:
    """Give freed memory back to the system. glibc keeps what lies below anything still in use, and the tensors of a layer are many and
    small enough to lie there, so that the resident set would grow by fragments from layer to layer."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
