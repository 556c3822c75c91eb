"""Methods: one file each, found by scanning this package."""

from __future__ import annotations

from functools import cache

from expertsmith.methods.base import Method
from expertsmith.registry import modules_of, unknown

__all__ = ["Method", "find", "methods"]


@cache
def methods() -> dict[str, Method]:
    """Every method by name, in alphabetical order."""
    found: dict[str, Method] = {}
    for module in modules_of("expertsmith.methods"):
        for value in vars(module).values():
            if isinstance(value, Method) and found.setdefault(value.name, value) is not value:
                raise RuntimeError(f"two methods are called {value.name}")
    return dict(sorted(found.items()))


def find(name: str) -> Method:
    """The method with this name.

    Raises:
        UserError: there is none; with close matches.
    """
    if name not in methods():
        raise unknown("method", name, methods())
    return methods()[name]
