"""Code files of a checkpoint, named by `auto_map` entries. They are copied and never run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

OWN = "modeling_expertsmith"  # the module that `engine.uneven` writes: its entries are not foreign code
NAME = re.compile(r"^(\w+)\.\w+$")  # module.Class; with "owner/repo--" before it the file is elsewhere
RELATIVE = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import\b|from\s+\.\s+import\s+(\w+))", re.MULTILINE)


def drop_auto_map(config: dict[str, Any]) -> bool:
    """Remove `auto_map` from a config.json (and its text_config) in place if transformers has the family built in; return whether it was
    removed. Otherwise it stays, and the model is loaded with the code that it names."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict) and _foreign(part)]
    if not parts or not _built_in(config.get("model_type")):
        return False
    for part in parts:
        del part["auto_map"]
    return True


def code_files(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Names of the .py files in a checkpoint's folder that `auto_map` names in the config, or in the tokenizer's and processors' configs
    next to it, and of the files that these import from the same folder."""
    entries = list(_entries(config)) + list(_entries(config.get("text_config")))
    for file in sorted(path.glob("*config.json")) if path.is_dir() else ():
        if file.name != "config.json":
            entries += _entries(_read(file))
    wanted = [match[1] for entry in entries if (match := NAME.match(entry))]
    found: set[str] = set()
    while wanted:
        name = f"{wanted.pop()}.py"
        if name in found or not (path / name).is_file():
            continue
        found.add(name)
        text = (path / name).read_text(encoding="utf-8", errors="replace")
        wanted += [one or other for one, other in RELATIVE.findall(text)]
    return sorted(found)


def code_notes(path: Path, source: Mapping[str, Any], written: Mapping[str, Any]) -> list[str]:
    """Notes for the user about the code: whether `auto_map` was removed, and which code files were copied."""
    notes, files = [], [name for name in code_files(path, written) if name != f"{OWN}.py"]
    if _foreign(source) and not _foreign(written):
        notes.append(f"auto_map was removed from config.json, because transformers has {source.get('model_type')} built in")
    if files:
        loads = " (the model is loaded with it: trust_remote_code)" if _foreign(written) else ""
        notes.append(f"code files of the source were copied unchanged and not run{loads}: {', '.join(files)}")
    return notes


def _built_in(model_type: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _foreign(config: Mapping[str, Any]) -> bool:
    return any(not entry.startswith(f"{OWN}.") for entry in _entries(config))


def _entries(config: Any) -> Iterable[str]:
    """Yield the names in the `auto_map` of a config. An entry is one name, or a list that may hold nulls."""
    named = config.get("auto_map") if isinstance(config, Mapping) else None
    for value in named.values() if isinstance(named, Mapping) else ():
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str):
                yield entry


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # it is copied unchanged
