"""Where a checkpoint comes from, and the parts of its model card that also hold for models made from it: licence, languages, task."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertsmith.checkpoint.hub import is_hub_name
from expertsmith.checkpoint.reader import Checkpoint

SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+)/snapshots/([^/]+)$")  # a folder of the hub's cache
INHERITED = ("license", "license_name", "license_link", "language")
RESULTS = re.compile(r"^model-index:\n(?:(?:- | ).*\n)*", re.MULTILINE)


def repository(checkpoint: Checkpoint) -> str | None:
    """owner/name of the checkpoint's hub repository; None if unknown."""
    if not Path(checkpoint.source).exists() and is_hub_name(checkpoint.source):
        return checkpoint.source.partition("@")[0]
    found = _snapshot(checkpoint.path)
    return found[0] if found else None


def name_of(checkpoint: Checkpoint) -> str:
    """The name of a model: that of its repository, or of its folder."""
    found = repository(checkpoint)
    return _text((found or checkpoint.path.resolve().name).rpartition("/")[2])


def source_of(checkpoint: Checkpoint) -> str:
    """The source that a published file names: what the user typed for a repository, owner/name@commit for a folder of the hub's cache, and of
    another folder its name, because nobody else needs to know where it is."""
    if not Path(checkpoint.source).exists():
        return _text(checkpoint.source)
    found = _snapshot(checkpoint.path)
    return "@".join(found) if found else _text(checkpoint.path.resolve().name)


def _text(name: str) -> str:
    """A file name, with bytes that are not text as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _snapshot(path: Path) -> tuple[str, str] | None:
    match = SNAPSHOT.search(path.absolute().as_posix().rstrip("/"))
    return (match[1].replace("--", "/", 1), match[2]) if match else None


def card_metadata(path: Path) -> dict[str, Any]:
    """The metadata at the start of a folder's README.md; empty if it cannot be read."""
    import yaml

    try:
        text = (path / "README.md").read_text(encoding="utf-8-sig", errors="replace")
        match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
        held = yaml.safe_load(match[1]) if match else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return held if isinstance(held, dict) else {}


def front_matter(
    checkpoint: Checkpoint, tags: Sequence[str], quality: Mapping[str, Any] | None = None, title: str = ""
) -> list[str]:
    """Model card metadata, as lines, for a model made from a checkpoint: base model, licence, library, task, and measured perplexities.

    The base model is the checkpoint's hub repository; if unknown, the base model that the checkpoint's own card names.

    Args:
        quality: `Quality.to_json` with `held_out`, under the name `title`.
    """
    from huggingface_hub import EvalResult, ModelCardData

    held = card_metadata(checkpoint.path)
    results = []
    for name, row in quality["domains"].items() if quality else ():
        text = f"{name} ({'held-out' if quality and quality['held_out'] else 'calibration'} text)"
        numbers = {"metric_type": "perplexity", "metric_value": round(row["perplexity"], 4)}
        results.append(
            EvalResult(task_type="text-generation", dataset_type="text", dataset_config=name, dataset_name=text, **numbers)
        )
    data = ModelCardData(
        base_model=repository(checkpoint) or held.get("base_model"),
        library_name="transformers",
        pipeline_tag=held.get("pipeline_tag") or _task(checkpoint.config),
        tags=list(tags),
        eval_results=results or None,
        model_name=title if results else None,
        **_licence(checkpoint, held),
    )
    return ["---", *data.to_yaml().strip("\n").splitlines(), "---"]


def without_results(card: str) -> str:
    """A model card without measured results in its metadata."""
    return RESULTS.sub("", card, count=1)


def _task(config: Mapping[str, Any]) -> str:
    return "image-text-to-text" if "vision_config" in config else "text-generation"


def _licence(checkpoint: Checkpoint, held: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: held[key] for key in INHERITED if held.get(key) is not None}
    texts = sorted(file.name for file in checkpoint.path.glob("LICEN[CS]E*"))
    if "license" not in found and texts:
        found |= {"license": "other", "license_name": "license-of-the-base-model", "license_link": texts[0]}
    link, base = found.get("license_link"), repository(checkpoint)
    if isinstance(link, str) and "://" not in link and base and not (checkpoint.path / link).is_file():
        found["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    return found
