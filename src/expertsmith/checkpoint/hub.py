"""Checkpoints on the Hugging Face hub: which files of a repository to download, which are already in the cache, and how to upload a result.

A repository is named `owner/name`, `owner/name@REVISION` (branch, tag or commit), or by the address of its page.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from expertsmith.errors import UserError

T = TypeVar("T")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DEMO = "demo"  # the name of the packaged model
OWN_LAYOUT = "consolidated"  # prefix of Mistral's and Meta's own weight files; they repeat the weights beside them
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
PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<name>[\w.\-]+/[\w.\-]+)(?:/(?:tree|commit)/(?P<revision>[^/?#]+))?/?(?:[?#].*)?"
)
BELOW = "*/*"  # original/, metal/, onnx/ and other forms of the same weights


def named(source: Any) -> Any:
    """The repository name for an address of the hub: https://huggingface.co/owner/name/tree/v1 is owner/name@v1. Others are unchanged."""
    found = PAGE.fullmatch(source) if isinstance(source, str) else None
    if found is None:
        return source
    return found["name"] + (f"@{found['revision']}" if found["revision"] else "")


def pinned(model: Any, revision: str | None) -> Any:
    """A model's name with the requested revision; the model unchanged if `revision` is None.

    Raises:
        UserError: a directory or the packaged model, which have no revisions, or a name that already has one.
    """
    model = named(model)
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
    """Whether a name that is not a local directory can be the name of a hub repository."""
    name = source.partition("@")[0]
    return name.count("/") == 1 and not Path(source).is_absolute() and not source.startswith(".") and all(name.split("/"))


def download(source: str) -> Path:
    """Download a repository; returns its folder in the cache. All files that a checkpoint needs are there, and no second form of its
    weights. Files in the cache are not downloaded again; without a network, the cached files are used.

    Raises:
        UserError: the repository cannot be reached and is not in the cache.
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
                return folder  # the reader reports what is wrong with it
            unwanted = []
        else:
            weights = [SINGLE]
            unwanted = [BELOW, f"{OWN_LAYOUT}*"]
        snapshot_download(name, revision=commit, allow_patterns=weights, ignore_patterns=unwanted)
        if not index.is_file() and not (folder / SINGLE).is_file():
            snapshot_download(name, revision=commit, allow_patterns=["*.safetensors"], ignore_patterns=unwanted)
        return folder

    return _or_cached(source, fetch)


def check_push(name: str, overwrite: bool) -> None:
    """Check before any work that a result can be uploaded as `name`.

    Raises:
        UserError: not a repository name, not logged in, no network, or a repository that exists already (without `overwrite`).
    """
    import huggingface_hub as hub

    if not is_hub_name(name) or "@" in name:
        raise UserError(f"--push {name!r} is no name of a hub repository", "write owner/name")
    try:
        hub.whoami()
        exists = hub.repo_exists(name)
    except Exception as error:  # the hub client raises many unrelated types; all mean that nothing can be uploaded
        raise UserError(f"--push {name}: {_first_line(error)}", "log in with `hf auth login`, or leave --push out") from None
    if exists and not overwrite:
        raise UserError(f"--push {name}: the repository exists already", "choose another name, or pass --overwrite")


def push(folder: Path, name: str) -> str:
    """Upload a folder as one commit to a private repository, which is created if necessary; returns the address of its page.

    Raises:
        UserError: with the hub's answer, that the folder is complete, and the command that uploads it.
    """
    import huggingface_hub as hub

    try:
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by expertsmith", delete_patterns="*")
    except Exception as error:  # as above
        raise UserError(
            f"{folder} is complete, but could not be uploaded to {name}: {_first_line(error)}",
            f"upload it with `hf upload {name} {folder}`",
        ) from None
    return f"https://huggingface.co/{name}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def headers(source: str) -> tuple[Path, dict[str, Any] | None]:
    """(folder in the cache with the repository's configs, file → safetensors metadata), without downloading weights. The metadata is None
    if the repository cannot be reached: then the weights must be read from the folder.

    Raises:
        UserError: the repository cannot be reached and is not in the cache.
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
        raise UserError(
            f"{source!r} is not a local directory and could not be downloaded from the hub: {_first_line(error)}"
        ) from None


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot of a repository in the hub's cache (HF_HUB_CACHE), possibly incomplete; None if there is none."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # a name that the hub client refuses
        found = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None
