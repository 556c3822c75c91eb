"""expertsmith: analyze, remove, merge and skip the experts of Mixture-of-Experts language models.

`import expertsmith` is quick: torch and transformers are imported by the functions that need them.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # editors and Tab completion read the names here; importing them takes time, so that waits until one is used
    from expertsmith.api import (
        analyze,
        apply,
        architectures,
        calibrate,
        compare,
        compress,
        convert,
        dequantise,
        evaluate,
        export,
        heal,
        inspect,
        lint,
        load,
        plan,
        plan_from,
        run,
        skip,
        speed,
        verify,
    )

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "analyze",
    "apply",
    "architectures",
    "calibrate",
    "compare",
    "compress",
    "convert",
    "dequantise",
    "evaluate",
    "export",
    "heal",
    "inspect",
    "lint",
    "load",
    "plan",
    "plan_from",
    "run",
    "skip",
    "speed",
    "verify",
]
_API = frozenset(__all__) - {"__version__"}


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
