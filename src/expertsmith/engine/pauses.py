"""Functions that pause inside foreign code and continue later. Only this file uses greenlets.

Why: a model's forward is transformers' code, and it has to pause before each decoder layer, inside calls that are not generators. Threads
would work too, but OpenMP would start a pool of workers for every thread. Possible replacements: a transformers API that runs a model
layer by layer (including its masks, position embeddings and shared states), or a forward that is a generator.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context

from greenlet import getcurrent, greenlet


class Lanes:
    """`count` runs of one function, `run(number)`, of which one is active at a time.

    The owner calls `resume(number)`; control returns to it when that run calls `pause` or ends.
    """

    def __init__(self, run: Callable[[int], None], count: int) -> None:
        self._owner = getcurrent()
        self._runs = [greenlet(run, self._owner) for _ in range(count)]
        for made in (
            self._runs
        ):  # a greenlet begins with an empty context otherwise, without what the owner has set (`expertsmith.ranks`)
            made.gr_context = copy_context()
        self._started = [False] * count
        self.current = -1  # the run that is active, or was last

    def __len__(self) -> int:
        return len(self._runs)

    def resume(self, number: int) -> None:
        """Start a run, or let it continue after its last pause."""
        self.current = number
        if self._started[number]:
            self._runs[number].switch()
        else:
            self._started[number] = True
            self._runs[number].switch(number)

    def pause(self) -> None:
        """Pause the current run until its next `resume`; called from inside it."""
        self._owner.switch()

    def ended(self, number: int) -> bool:
        """Whether a run has returned."""
        return bool(self._runs[number].dead)

    def close(self) -> None:
        """Drop unfinished runs: each ends with an exception at its pause."""
        for run in self._runs:
            if not run.dead:
                run.throw()
        self._runs.clear()
