"""Seconds and peak memory of a piece of work within this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PERIOD = 0.005  # seconds between two measurements of the resident set


@contextmanager
def footprint() -> Iterator[dict[str, float]]:
    """Yield a dict that after the context has `seconds`; `memory`: peak bytes of the resident set above its size at the start (measured
    every 5 ms); with a GPU also `cuda_memory`: the same for memory that torch allocated there.

    First, freed memory is returned to the system: otherwise its reuse would not be counted.
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
