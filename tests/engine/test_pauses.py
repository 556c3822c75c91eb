"""Runs that pause inside foreign code."""

from __future__ import annotations

from contextvars import ContextVar

from expertsmith.engine.pauses import Lanes

NAME: ContextVar[str] = ContextVar("name", default="alone")


def test_a_run_sees_what_its_owner_has_set():
    """Such as the ranks of torchrun: a run with an empty context would work alone, and add up nothing."""
    seen = []

    def run(number: int) -> None:
        seen.append((number, NAME.get()))
        lanes.pause()
        seen.append((number, NAME.get()))

    token = NAME.set("together")
    lanes = Lanes(run, 2)
    for number in (0, 1, 1, 0):
        lanes.resume(number)
    NAME.reset(token)
    assert seen == [(0, "together"), (1, "together"), (1, "together"), (0, "together")]
