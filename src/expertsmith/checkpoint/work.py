"""Where unfinished work lies: `OUT.work`, a folder beside the output that says what it is and goes when the job is done."""

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
PARTS = frozenset({"statistics", "measured", "healing", "training", "unhealed", "pruned", "trial", "writing", "replaced"})
BEFORE = {"statistics": "stats", "measured": "measured", "healing": "healing", "training": "training"}  # part → its old suffix


def work_of(out: Path) -> Path:
    """`OUT.work`."""
    return out.with_name(f"{out.name}.work")


@contextmanager
def work_beside(
    out: Path, part: str, note: Callable[[str], None] | None = None, *, keep: bool = False, scratch: bool = False
) -> Iterator[Path]:
    """`OUT.work/PART`, for as long as the job runs. A job that fails leaves what it finished there, for the next run to go on from. A part that is
    a checkpoint has a work folder of its own beside it while it is written.

    Args:
        note: told of the work of an earlier version, which is not used where it lies.
        keep: leave it when the job is done, too.
        scratch: no run can go on from it, so it goes when the job fails, too.

    Raises:
        UserError: `OUT.work` is somebody else's.
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
    if scratch:  # of a run that was killed
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / MARK).write_text(ABOUT.format(out=out.name), encoding="utf-8")
    try:
        yield folder / part
    except BaseException:
        if scratch:
            shutil.rmtree(folder / part, ignore_errors=True)
        _tidy(folder)
        with suppress(OSError):  # there is something in them now
            for parent in above:
                parent.rmdir()
        raise
    if not keep:
        shutil.rmtree(folder / part, ignore_errors=True)
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove a work folder in which nothing is left."""
    if not any(path.is_file() and path != folder / MARK for path in folder.rglob("*")):
        shutil.rmtree(folder, ignore_errors=True)
