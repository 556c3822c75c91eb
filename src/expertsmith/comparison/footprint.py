"""Seconds and peak memory of a piece of work within this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PERIOD = 0.005  # seconds between two looks at the resident set


@contextmanager
def footprint() -> Iterator[dict[str, float]]:
    """A dict that has, after the context: `seconds`; `memory`: bytes by which the resident set rose above its size at the start, at its
    highest (looked at every 5 ms); with a GPU `cuda_memory`: the same of the memory that torch allocated there.

    Memory that was freed before goes back to the system first, so that what an earlier stretch left cannot be taken over unseen.
    """
    import psutil
    import torch

    from expertsmith.engine.pages import trim

    trim()
    process, done = psutil.Process(), threading.Event()
    start = highest = process.memory_info().rss

    def look() -> None:
        nonlocal highest
        highest = max(highest, process.memory_info().rss)

    def watch() -> None:
        while not done.wait(PERIOD):
            look()

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
    found: dict[str, float] = {}
    watcher, begin = threading.Thread(target=watch, daemon=True), time.perf_counter()
    watcher.start()
    try:
        yield found
    finally:
        found["seconds"] = round(time.perf_counter() - begin, 3)
        done.set()
        watcher.join()
        look()
        found["memory"] = highest - start
        if cuda:
            found["cuda_memory"] = torch.cuda.max_memory_allocated() - allocated
