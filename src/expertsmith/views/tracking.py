"""Log the numbers of a long run to an experiment tracker, through accelerate's tracker classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from expertsmith.errors import UserError
from expertsmith.registry import unknown
from expertsmith.views.progress import Progress

PROJECT, FOLDER = "expertsmith", "runs"
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


class _Tracked:
    """A receiver of progress that also logs to a tracker."""

    def __init__(self, progress: Progress, tracker: Any) -> None:
        self.task, self.note, self._tracker = progress.task, progress.note, tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the numbers of a step."""
        self._tracker.log(dict(values), step=step)


@contextmanager
def tracked(progress: Progress, name: str | None, settings: Mapping[str, Any]) -> Iterator[Progress]:
    """Yield `progress`, which also logs to the tracker `name` within the context; None: no tracker. Trackers that write files do so in `runs/`.

    Args:
        settings: of the run; those that are texts, numbers and truth values are recorded.

    Raises:
        UserError: an unknown tracker, or one that is not installed.
    """
    if name is None:
        yield progress
        return
    if name not in PACKAGES:
        raise unknown("tracker", name, PACKAGES)
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in map(str, get_available_trackers()):
        raise UserError(f"the tracker {name} is not installed", f"pip install {PACKAGES[name]}")
    PartialState()  # the trackers ask it whether this process is the first
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind(PROJECT, **({"logging_dir": FOLDER} if kind.requires_logging_directory else {}))
    tracker.start()
    tracker.store_init_configuration({key: value for key, value in settings.items() if isinstance(value, (str, int, float))})
    try:
        yield _Tracked(progress, tracker)
    finally:
        tracker.finish()
