"""Checkpoints on the Hugging Face hub: which files of a repository to download, and which are already in the cache.

A repository is named `owner/name`, or `owner/name@REVISION` (branch, tag or commit).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from expertsmith.errors import UserError

T = TypeVar("T")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DEMO = "demo"  # the name of the model that comes with the package
OWN_LAYOUT = "consolidated"  # Mistral's and Meta's own weight files begin so; they repeat what stands beside them
# everything but weights, from the top of the repository: config, tokenizer, processor, chat template, licence, code (which is not run)
TEXTS = [
    "*.json",
    "*.model",
    "*.model.v*",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "*.spm",
    "*.py",
    "LICEN[CS]E*",
    "NOTICE*",
    "README.md",
]
BELOW = "*/*"  # original/, metal/, onnx/ and other forms of the same weights


def pinned(model: Any, revision: str | None) -> Any:
    """A model's name with the revision that is asked for; the model itself where none is.

    Raises:
        UserError: a directory or the packaged model, which have no revisions, or a name that has one already.
    """
    if revision is None:
        return model
    if not isinstance(model, str) or Path(model).exists() or model == DEMO or not is_hub_name(model):
        raise UserError(
            f"revision {revision!r} given, but {model if isinstance(model, (str, Path)) else 'the model'} is not a hub model",
            "a revision is a branch, tag or commit of owner/name; remove it for a directory",
        )
    if "@" in model:
        raise UserError(f"{model} already has a revision, but {revision!r} was given too", "give one of them")
    return f"{model}@{revision}"


def is_hub_name(source: str) -> bool:
    """Whether a name that is no directory here can be one of the hub."""
    name = source.partition("@")[0]
    return name.count("/") == 1 and not Path(source).is_absolute() and not source.startswith(".") and all(name.split("/"))


def download(source: str) -> Path:
    """The folder of a repository in the cache, with all files that a checkpoint needs and no second form of its weights. What is there
    already is not fetched again; without a network what is there is taken.

    Raises:
        UserError: it cannot be reached and is not in the cache.
    """
    from huggingface_hub import snapshot_download

    def fetch(name: str, revision: str | None) -> Path:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=TEXTS, ignore_patterns=[BELOW]))
        commit = folder.name if folder.parent.name == "snapshots" else revision
        index = folder / INDEX
        if index.is_file():
            try:
                weights = sorted({str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                return folder  # the reader says what is wrong with it
            unwanted = []
        else:
            weights = [SINGLE]
            unwanted = [BELOW, f"{OWN_LAYOUT}*"]
        snapshot_download(name, revision=commit, allow_patterns=weights, ignore_patterns=unwanted)
        if not index.is_file() and not (folder / SINGLE).is_file():
            snapshot_download(name, revision=commit, allow_patterns=["*.safetensors"], ignore_patterns=unwanted)
        return folder

    return _or_cached(source, fetch)


def headers(source: str) -> tuple[Path, dict[str, Any] | None]:
    """(folder in the cache with the repository's configs, file → safetensors metadata), without its weights; None for the metadata where
    the weights are to be read from the folder, because there is no network.

    Raises:
        UserError: it cannot be reached and is not in the cache.
    """
    import huggingface_hub as hub

    def fetch(name: str, revision: str | None) -> tuple[Path, dict[str, Any] | None]:
        folder = Path(hub.hf_hub_download(name, "config.json", revision=revision)).parent
        for beside in ("hf_quant_config.json",):
            with contextlib.suppress(hub.errors.EntryNotFoundError):
                hub.hf_hub_download(name, beside, revision=revision)
        try:
            return folder, dict(hub.get_safetensors_metadata(name, revision=revision).files_metadata)
        except hub.errors.NotASafetensorsRepoError:  # neither an index nor model.safetensors
            files = [
                file
                for file in hub.list_repo_files(name, revision=revision)
                if file.endswith(".safetensors") and "/" not in file and not file.startswith(OWN_LAYOUT)
            ]
            if not files:
                raise
            return folder, {file: hub.parse_safetensors_file_metadata(name, file, revision=revision) for file in sorted(files)}

    found = _or_cached(source, fetch)
    return found if isinstance(found, tuple) else (found, None)


def _or_cached(source: str, fetch: Callable[[str, str | None], T]) -> T | Path:
    name, _, revision = source.partition("@")
    try:
        return fetch(name, revision or None)
    except Exception as error:  # the hub client raises many unrelated types; all mean "not available"
        cached = _cached(name, revision or None)
        if cached is not None:
            return cached
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{source!r} is not a local directory and could not be downloaded from the hub: {first}") from None


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot of a repository in the hub's cache (HF_HUB_CACHE), as far as it was fetched."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # a name that the hub client refuses
        found = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None
