"""How a result was made, for the pages that show it: the command, versions, settings, seconds and memory; and a result without a user's folders."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from expertsmith.verbs.definition import command_line

SETTINGS = ("seed", "samples", "seq_len", "device", "dtype", "memory", "batch_tokens")


def how_made(verb: str, given: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """What the last section of a page shows (`views.pages.sheet.how_made`).

    Args:
        given: the options of the verb.
        seconds: of each stage.
    """
    import safetensors
    import torch
    import transformers

    from expertsmith import __version__

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = {"the process": held}
    if torch.cuda.is_available():
        memory["a GPU, by torch"] = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    libraries = {module.__name__: str(module.__version__) for module in (torch, transformers, safetensors)}
    return {
        "by": f"expertsmith {__version__}",
        "command": command_line(verb, given),
        "settings": {key: given[key] for key in SETTINGS if given.get(key) is not None},
        "seconds": dict(seconds),
        "memory": memory,
        "versions": {"expertsmith": __version__, **libraries, "Python": platform.python_version()},
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def without_folders(value: Any, places: Sequence[str | Path]) -> Any:
    """The same plain data with the last names of files and folders in the place of their paths: a page inside a checkpoint is published with it.

    Args:
        places: the paths that a user gave.
    """
    if isinstance(value, Mapping):
        return {key: without_folders(held, places) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(held, places) for held in value]
    if isinstance(value, (str, Path)):
        for place in sorted(map(str, places), key=len, reverse=True):  # a file before the folder that it is in
            value = str(value).replace(place, Path(place).name)
    return value
