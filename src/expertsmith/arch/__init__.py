"""Model families: one record each, found by scanning this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

from expertsmith.arch.base import Architecture, Stacked, config_first, config_get, config_present, config_set
from expertsmith.errors import UserError
from expertsmith.registry import modules_of, unknown

__all__ = [
    "Architecture",
    "Stacked",
    "config_first",
    "config_get",
    "config_present",
    "config_set",
    "families",
    "family_of",
    "record_of",
    "refuse_without_class",
    "text_config",
    "treated_as",
]
AS = "if transformers has it under another name, say which: --as MODEL_TYPE"
ALIAS_UNEVEN = "its config class is code of its own, which knows one number for all layers"
_treated: dict[str, Architecture] = {}  # records set by `treated_as`, by model_type


def families() -> dict[str, Architecture]:
    """Every record by model_type, in alphabetical order, and those that `treated_as` has set."""
    return _records() | _treated


@cache
def _records() -> dict[str, Architecture]:
    found: dict[str, Architecture] = {}
    for module in modules_of("expertsmith.arch"):
        for record in getattr(module, "FAMILIES", ()):
            if record.model_type in found:
                raise RuntimeError(f"model_type {record.model_type} has two records")
            found[record.model_type] = record
    return dict(sorted(found.items()))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config. Multi-modal configs keep it under `text_config` (old ones of Nemotron under `llm_config`),
    omni configs under `thinker_config.text_config`."""
    thinker = config.get("thinker_config")
    whole = thinker if isinstance(thinker, Mapping) else config
    found = (whole.get(key) for key in ("text_config", "llm_config"))
    return next((inner for inner in found if isinstance(inner, Mapping)), config)


def record_of(config: Mapping[str, Any]) -> Architecture | None:
    """The record for a config.json: of the whole model, else of its language model; None if there is neither."""
    found = families()
    return found.get(str(config.get("model_type"))) or found.get(str(text_config(config).get("model_type")))


@contextmanager
def treated_as(
    config: Mapping[str, Any], as_type: str, text_prefix: str = "", where: str = "config.json"
) -> Iterator[Architecture]:
    """Within the context, treat all checkpoints with this config's model_type as another family.

    Args:
        text_prefix: prefix of the language model's tensor names in a composite.

    Raises:
        UserError: a family without record or class, or a config without model_type.
    """
    target, own = families().get(as_type), config.get("model_type")
    if target is None or not target.supported:
        raise unknown("supported model family", as_type, (name for name, entry in families().items() if entry.supported))
    refuse_without_class(target, where)
    if not isinstance(own, str) or not own:
        raise UserError(f"{where} has no model_type, which could be treated as {as_type}", "add one to it")
    if own == as_type:
        yield target
        return
    before = _treated.get(own)
    _treated[own] = replace(
        target,
        model_type=own,
        title=f"{own}, treated as {target.title}",
        runs_as=target.runs_as or as_type,
        text_prefix=text_prefix,
        uneven=target.uneven or ALIAS_UNEVEN,
    )
    try:
        yield _treated[own]
    finally:
        if before is None:
            del _treated[own]
        else:
            _treated[own] = before


def refuse_without_class(record: Architecture | None, where: str) -> None:
    """Refuse to run a model for which transformers has no class.

    Raises:
        UserError: with the reason.
    """
    if record is not None and record.no_class:
        raise UserError(
            f"{where}: a {record.model_type} model cannot be run: {record.no_class}",
            "a method without data (aimer, moeits, random), plan, apply and verify do without",
        )


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The record of a checkpoint's family.

    Raises:
        UserError: the config names no family, a refused family (with the reason), a family that needs remote code, or a
            dense model.
    """
    inner = text_config(config)
    record = record_of(config)
    model_type = record.model_type if record else inner.get("model_type") or config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UserError(
            f"{where} has no model_type, so the model family is unknown", "give the directory of a Hugging Face checkpoint"
        )
    if record is None and config.get("auto_map"):
        raise UserError(
            f"{where}: model_type {model_type!r} comes with code of its own (auto_map), which expertsmith does not run",
            f"{AS} (`expertsmith architectures` lists the families)",
        )
    if record is None:
        expert_keys = [key for key in inner if "expert" in key and isinstance(inner[key], int) and inner[key] > 1]
        if not expert_keys:
            raise UserError(
                f"{where}: model_type {model_type!r} is a dense model, it has no routed experts",
                "give a Mixture-of-Experts checkpoint (`expertsmith architectures` lists the families), or make one with `expertsmith convert`",
            )
        error = unknown("supported model family", model_type, (name for name, entry in families().items() if entry.supported))
        raise UserError(error.message, f"{error.remedy}; {AS}" if error.remedy else AS)
    if not record.supported:
        raise UserError(f"{where}: model_type {model_type!r} is not supported: {record.notes}")
    try:
        reason = record.refusal(inner) if record.refusal else None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where} has a value of a wrong kind: {error}", "check its keys that say which layers have experts"
        ) from None
    if reason:
        raise UserError(f"{where}: this {model_type} checkpoint is not supported: {reason}")
    return record
