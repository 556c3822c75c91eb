"""The work folder `OUT.work` beside the output, for unfinished work. It has a README, and is removed when the job is done."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from expertsmith.errors import UserError

MARK = "README.txt"
ABOUT = """This is the unfinished work of an expertsmith command that writes {out}.
The same command goes on from here, and removes this folder when it is done.
If you do not want to go on, delete the folder.
"""
PARTS = frozenset(
    {"statistics", "measured", "searched", "healing", "training", "unhealed", "pruned", "trial", "writing", "replaced"}
)
BEFORE = {"statistics": "stats", "measured": "measured", "healing": "healing", "training": "training"}  # part → its old suffix


def work_of(out: Path) -> Path:
    """`OUT.work`."""
    return out.with_name(f"{out.name}.work")


@contextmanager
def work_beside(
    out: Path, part: str, note: Callable[[str], None] | None = None, *, keep: bool = False, scratch: bool = False
) -> Iterator[Path]:
    """Yield `OUT.work/PART` and remove it when the job is done. If the job fails, its finished work stays there for the next run to resume.
    A part that is a checkpoint has its own work folder beside it while it is written.

    Args:
        note: called if there is unfinished work of an earlier version, which is not used in its old place.
        keep: do not remove the part when the job is done.
        scratch: the part cannot be resumed, so remove it also if the job fails.

    Raises:
        UserError: `OUT.work` has other files in it.
    """
    folder = work_of(out)
    if folder.exists() and (
        not folder.is_dir() or {path.name.removesuffix(".work") for path in folder.iterdir()} - PARTS - {MARK}
    ):
        raise UserError(
            f"{folder} contains files that are not unfinished work of expertsmith", "move it away, or choose another output"
        )
    old = out.with_name(f"{out.name}.{BEFORE.get(part, part)}")
    if note and part in BEFORE and old.exists() and not (folder / part).exists():
        note(
            f"{old} is not used; if it is the unfinished work of an earlier version, move it to {folder / part} to go on from it"
        )
    above = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if scratch:  # left by a killed run
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / MARK).write_text(ABOUT.format(out=out.name), encoding="utf-8")
    try:
        yield folder / part
    except BaseException:
        if scratch:
            shutil.rmtree(folder / part, ignore_errors=True)
        _tidy(folder)
        with suppress(OSError):  # they are not empty any more
            for parent in above:
                parent.rmdir()
        raise
    if not keep:
        shutil.rmtree(folder / part, ignore_errors=True)
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove a work folder without files other than its README."""
    if not any(path.is_file() and path != folder / MARK for path in folder.rglob("*")):
        shutil.rmtree(folder, ignore_errors=True)
