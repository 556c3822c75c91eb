"""Find the modules of a package by scanning it, and suggest close matches for a misspelt name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from expertsmith.errors import UserError

SHOWN = 100  # names that an error still lists


def modules_of(package: str) -> list[ModuleType]:
    """Import every module of `package` in name order; an import error is fatal, not skipped."""
    root = importlib.import_module(package)
    return [
        importlib.import_module(f"{package}.{info.name}")
        for info in sorted(pkgutil.iter_modules(root.__path__), key=lambda i: i.name)
    ]


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not registered: close matches first, else everything there is, or how much."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    everything = f"there are: {', '.join(names)}" if len(names) <= SHOWN else f"there are {len(names):,}, but none is similar"
    hint = f"did you mean {' or '.join(close)}?" if close else everything
    return UserError(f"there is no {kind} {name!r}", hint)
