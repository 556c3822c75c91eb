"""Whether an output can be written: found out before any work."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Literal

from expertsmith.errors import UserError

Writes = Literal["file", "folder", "into"]


def check_output(out: Path, writes: Writes, overwrite: bool = False) -> None:
    """Refuse an output that cannot be written. Permissions tell too little (of /proc, of a superuser, of a read-only mount), so an empty
    folder with a name like the output's is made where the output will be, and removed.

    Args:
        writes: a "file"; a "folder" that is made beside its name and replaces what has it; or files "into" a folder, which may exist.
        overwrite: a file that exists may be replaced. Whether a folder may be is said by its verb, which knows what it can go on from.

    Raises:
        UserError: the path, what stands in the way, and what to do.
    """
    target = out.absolute()
    if writes == "file":
        _check_file(target, out, overwrite)
    elif os.path.lexists(target) and not os.path.isdir(target) and (writes == "into" or not os.path.exists(target)):
        raise UserError(f"{out} is a {'file' if os.path.exists(target) else 'link to nothing'}", "choose another output folder")
    place = target if writes == "into" and os.path.isdir(target) else target.parent
    names = [target.name]
    while not os.path.lexists(place):
        names.append(place.name)
        place = place.parent
    if not os.path.isdir(place):
        raise UserError(f"{out} cannot be written: {place} is no folder", "choose another output")
    if os.environ.get("RANK", "0") != "0":
        return  # processes of one run do not try side by side: one would take the other's trial for somebody's file
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{max(names, key=lambda name: len(os.fsencode(name)))}.", dir=place))
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {place} takes no new files ({error.strerror or error})",
            "choose another output, or make that place writable",
        ) from None


def refuse_other_model(result: Path, what: str, fingerprint: str, overwrite: bool) -> None:
    """Refuse a folder whose JSON `result` is of another model, unless it is to be replaced. A result that cannot be read holds nothing to lose.

    Raises:
        UserError: with the model that it is of.
    """
    try:
        held = json.loads(result.read_text(encoding="utf-8"))["model"]
        other, source = held["fingerprint"] != fingerprint, held["source"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if other and not overwrite:
        raise UserError(
            f"{result.parent} has the {what} of another model, {source}", "choose another folder with -o, or pass --overwrite"
        )


def _check_file(target: Path, out: Path, overwrite: bool) -> None:
    if os.path.isdir(target):
        raise UserError(f"{out} is a folder", "give the name of a file")
    if os.path.lexists(target) and not overwrite:
        raise UserError(f"{out} exists already", "choose another output or pass --overwrite")
