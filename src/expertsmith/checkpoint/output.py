"""Check before any work that an output can be written."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Literal

from expertsmith.errors import UserError

Writes = Literal["file", "folder", "into"]


def check_output(out: Path, writes: Writes, overwrite: bool = False) -> None:
    """Refuse an output that cannot be written. Permissions are not enough (/proc, a superuser, a read-only mount), so the check creates and
    removes an empty folder with a name like the output's, in the place of the output.

    Args:
        writes: a "file"; a "folder" that is built beside the output and then replaces it; or files "into" a folder, which may exist.
        overwrite: an existing file may be replaced. For folders the verb decides, since it knows what it can resume.

    Raises:
        UserError: with the path, the obstacle, and what to do.
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
        return  # only one process of a run tries: another could mistake its trial folder for a user's file
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{max(names, key=lambda name: len(os.fsencode(name)))}.", dir=place))
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {place} takes no new files ({error.strerror or error})",
            "choose another output, or make that place writable",
        ) from None


def refuse_other_model(result: Path, what: str, fingerprint: str, overwrite: bool) -> None:
    """Refuse a folder whose JSON `result` is from another model, unless `overwrite`. A result that cannot be read may be replaced.

    Raises:
        UserError: with the model that the result is from.
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
