"""Formats of quantised weights: one file each, found by scanning this package."""

from __future__ import annotations

from functools import cache

from expertsmith.checkpoint.formats.base import Format, Headers, Stored
from expertsmith.registry import modules_of

__all__ = ["Format", "Headers", "Stored", "formats"]


@cache
def formats() -> dict[str, Format]:
    """Every format by name, in alphabetical order."""
    found = {}
    for module in modules_of(__name__):
        for entry in getattr(module, "FORMATS", ()):
            if entry.name in found:
                raise RuntimeError(f"two formats are called {entry.name}")
            found[entry.name] = entry
    return dict(sorted(found.items()))
