"""Progress of long jobs: a bar on stderr with rate and time left, or silence."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol


class Progress(Protocol):
    """The receiver of progress reports from long jobs."""

    def task(self, label: str, total: float, unit: str) -> Any:
        """A context manager that yields advance(amount, earlier=False), an amount of `unit`; `earlier`: done by an interrupted run, at no cost now."""

    def note(self, message: str) -> None:
        """Show a message to the user."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers of a step in the experiment tracker, if there is one (`views.tracking`)."""


class Silent:
    """Ignores all reports."""

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Any]:
        """Yield a function that does nothing."""
        yield lambda amount, earlier=False: None

    def note(self, message: str) -> None:
        """Do nothing."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing."""


class Bar:
    """Rich bars on stderr; plain lines every 10 seconds or more if stderr is not a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)

    def note(self, message: str) -> None:
        """Print a line on stderr."""
        from rich.markup import escape

        self.console.print(f"[dim]·[/dim] {escape(message)}", soft_wrap=True)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing: the bar shows what matters."""

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Any]:
        """Show a bar with rate and time left."""
        if not self.console.is_terminal:
            yield from self._lines(label, total, unit)
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            handle = bar.add_task(label, total=total, rate="", left="")
            pace = Pace(total, unit)

            def advance(amount: float, earlier: bool = False) -> None:
                pace.advance(amount, earlier)
                bar.update(handle, advance=amount, rate=pace.rate, left=f"{timedelta(seconds=round(pace.left))} left")

            yield advance

    def _lines(self, label: str, total: float, unit: str) -> Iterator[Any]:
        pace, last = Pace(total, unit), time.monotonic()

        def advance(amount: float, earlier: bool = False) -> None:
            nonlocal last
            pace.advance(amount, earlier)
            if time.monotonic() - last >= 10:
                last = time.monotonic()
                print(
                    f"{label}: {100 * pace.done / total:.0f} %, {pace.rate}, {pace.left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

        yield advance


class Pace:
    """Rate and time left of a job, from everything that it did itself: an average over the whole run, because the last seconds of a job whose
    parts differ in speed predict little."""

    def __init__(self, total: float, unit: str) -> None:
        self.total, self.unit, self.done, self._earlier, self._begin = total, unit, 0.0, 0.0, time.monotonic()

    def advance(self, amount: float, earlier: bool) -> None:
        """Count an amount; `earlier`: done by an interrupted run."""
        self.done += amount
        self._earlier += amount if earlier else 0.0

    @property
    def left(self) -> float:
        """Seconds; 0 before anything is done."""
        own = self.done - self._earlier
        return (time.monotonic() - self._begin) * max(0.0, self.total - self.done) / own if own > 0 else 0.0

    @property
    def rate(self) -> str:
        """The amount of a second, as text."""
        return rate(self.done - self._earlier, time.monotonic() - self._begin, self.unit)


def usual() -> Progress:
    """The default receiver for Python functions: a bar in a notebook, silence in a program."""
    return Bar() if "ipykernel" in sys.modules else Silent()


def rate(done: float, seconds: float, unit: str) -> str:
    """ "12.3k tokens/s", "1.2 GB/s"."""
    value = done / seconds if seconds > 0 else 0.0
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {letter}{unit}/s" if unit == "B" else f"{value / factor:.1f}{letter} {unit}/s"
    return f"{value:.0f} {unit}/s"


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Store the seconds of the context in `into[name]`."""
    begin = time.perf_counter()
    yield
    into[name] = round(time.perf_counter() - begin, 3)
