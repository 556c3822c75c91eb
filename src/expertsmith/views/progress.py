"""Progress of long jobs: a bar on stderr with rate and time left, or silence."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Progress(Protocol):
    """The receiver of progress reports from long jobs."""

    def task(self, label: str, total: float, unit: str) -> Any:
        """A context manager that yields a function to advance by an amount of `unit`."""

    def note(self, message: str) -> None:
        """Show a message to the user."""


class Silent:
    """Ignores all reports."""

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Any]:
        """Yield a function that does nothing."""
        yield lambda amount: None

    def note(self, message: str) -> None:
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

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Any]:
        """Show a bar with rate and time left."""
        if not self.console.is_terminal:
            yield from self._lines(label, total, unit)
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
        )
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, transient=True) as bar:
            handle = bar.add_task(label, total=total, rate="")
            begin, done = time.monotonic(), 0.0

            def advance(amount: float) -> None:
                nonlocal done
                done += amount
                bar.update(handle, advance=amount, rate=rate(done, time.monotonic() - begin, unit))

            yield advance

    def _lines(self, label: str, total: float, unit: str) -> Iterator[Any]:
        begin = last = time.monotonic()
        done = 0.0

        def advance(amount: float) -> None:
            nonlocal done, last
            done += amount
            now = time.monotonic()
            if now - last >= 10:
                last = now
                left = (now - begin) * (total - done) / done if done else 0.0
                print(
                    f"{label}: {100 * done / total:.0f} %, {rate(done, now - begin, unit)}, {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

        yield advance


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
