"""Functions that pause in the middle of foreign code and continue later: the only file that knows greenlets.

Why: a model's forward is transformers' code, and it has to stop before each decoder layer, from within calls that are not generators. Threads
could do it too, but OpenMP would start a pool of workers for every thread. What would replace it: a transformers API that runs a model layer by
layer (its masks, position embeddings and shared states included), or generators if the forward were one.
"""

from __future__ import annotations

from collections.abc import Callable

from greenlet import getcurrent, greenlet


class Lanes:
    """`count` runs of one function, `run(number)`, of which one is active at a time.

    The owner calls `resume(number)`; control returns to it when that run calls `pause` or ends.
    """

    def __init__(self, run: Callable[[int], None], count: int) -> None:
        self._owner = getcurrent()
        self._runs = [greenlet(run, self._owner) for _ in range(count)]
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
        """To be called within a run: stop here until the next `resume`."""
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
