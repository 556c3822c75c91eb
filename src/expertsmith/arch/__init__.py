"""Model families: one record each, found by scanning this package."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from expertsmith.arch.base import Architecture, Stacked, config_first, config_get, config_present
from expertsmith.errors import UserError
from expertsmith.registry import modules_of, unknown

__all__ = [
    "Architecture",
    "Stacked",
    "config_first",
    "config_get",
    "config_present",
    "families",
    "family_of",
    "text_config",
]


@cache
def families() -> dict[str, Architecture]:
    """Every record, by model_type, in alphabetical order."""
    found: dict[str, Architecture] = {}
    for module in modules_of("expertsmith.arch"):
        for record in getattr(module, "FAMILIES", ()):
            if record.model_type in found:
                raise RuntimeError(f"model_type {record.model_type} has two records")
            found[record.model_type] = record
    return dict(sorted(found.items()))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: multi-modal configs keep it under `text_config`."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The record of a checkpoint's family.

    Raises:
        UserError: the config names no family, a family that is refused (with the reason), one that needs remote code, or a
            dense model.
    """
    inner = text_config(config)
    model_type = inner.get("model_type") or config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UserError(
            f"{where} has no model_type, so the model family is unknown", "give the directory of a Hugging Face checkpoint"
        )
    record = families().get(model_type)
    if record is None and config.get("auto_map"):
        raise UserError(
            f"{where}: model_type {model_type!r} comes with code of its own (auto_map), which expertsmith does not run",
            "use a checkpoint of a family that transformers has built in (`expertsmith architectures` lists them)",
        )
    if record is None:
        expert_keys = [key for key in inner if "expert" in key and isinstance(inner[key], int) and inner[key] > 1]
        if not expert_keys:
            raise UserError(
                f"{where}: model_type {model_type!r} is a dense model, it has no routed experts",
                "give a Mixture-of-Experts checkpoint (`expertsmith architectures` lists the families), or make one with `expertsmith convert`",
            )
        raise unknown("supported model family", model_type, (name for name, entry in families().items() if entry.supported))
    if not record.supported:
        raise UserError(f"{where}: model_type {model_type!r} is not supported: {record.notes}")
    reason = record.refusal(inner) if record.refusal else None
    if reason:
        raise UserError(f"{where}: this {model_type} checkpoint is not supported: {reason}")
    return record
