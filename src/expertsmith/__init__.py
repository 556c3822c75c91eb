"""expertsmith: look inside, remove, merge and skip the experts of Mixture-of-Experts language models.

`import expertsmith` is quick: torch and transformers are imported by the functions that need them.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_API = (
    "inspect",
    "lint",
    "calibrate",
    "plan",
    "apply",
    "verify",
    "skip",
    "load",
    "convert",
    "compress",
    "evaluate",
    "speed",
    "run",
    "analyze",
)
__all__ = [*_API, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _API:
        from expertsmith import api

        return getattr(api, name)
    raise AttributeError(f"module 'expertsmith' has no attribute {name!r}")
