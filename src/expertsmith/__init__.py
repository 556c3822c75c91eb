"""expertsmith: analyze, remove, merge and skip the experts of Mixture-of-Experts language models.

`import expertsmith` is quick: torch and transformers are imported by the functions that need them.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_API = (
    "inspect",
    "lint",
    "calibrate",
    "plan",
    "apply",
    "dequantise",
    "verify",
    "skip",
    "load",
    "convert",
    "heal",
    "compress",
    "compare",
    "evaluate",
    "speed",
    "run",
    "export",
    "analyze",
)
__all__ = [*_API, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _API:  # by name: the verbs import this package
        return getattr(importlib.import_module("expertsmith.api"), name)
    raise AttributeError(f"module 'expertsmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """`plan` and `lint` are verbs, and modules, which Python puts into the package once they are imported: here the verbs stay."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _API and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
