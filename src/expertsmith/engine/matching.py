"""Match the tensors of a checkpoint with the parameters of a model: which loads where, and which is correctly left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from expertsmith.arch import Architecture, config_first, config_get, text_config
from expertsmith.arch.base import MTP_PATTERN, roles_of
from expertsmith.checkpoint import Checkpoint
from expertsmith.checkpoint.floats import filled
from expertsmith.engine.stock import Naming, ignored, naming, renamer
from expertsmith.engine.uneven import key_mapping
from expertsmith.errors import UserError

OTHER_PARTS = (
    r"^(model\.)?(vision|visual|audio|image|multi_modal|mm_|embed_vision|embed_audio|talker|code2wav)"  # of a composite
)
ALWAYS_LEFT_OUT = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", MTP_PATTERN.pattern)  # computed, or multi-token prediction


@dataclass(frozen=True)
class Match:
    """Which tensors of a checkpoint load into a model.

    `groups`: decoder layer (None: outside the layers) → their names; `buffers`: those that load into buffers.
    """

    naming: Naming
    groups: dict[int | None, list[str]]
    buffers: list[str]


def match(
    module: Any,
    weights: Checkpoint,
    architecture: Architecture | None,
    layers: str,
    dtype: torch.dtype,
    names: Mapping[str, str | None] | None = None,
) -> Match:
    """Match the tensors of `weights` with the parameters of a model, which loads in `dtype`.

    Args:
        layers: path of the decoder layers in the module.
        names: tensor of multi-token prediction → its name in the module, or None if it has no place there.

    Raises:
        UserError: a tensor that the model does not have, and that is not known to be left out.
    """
    found = naming(module, key_mapping(architecture), dtype)
    to_module, targets = renamer(found), module.state_dict()
    is_buffer = {name for name, _ in module.named_buffers()}
    groups: dict[int | None, list[str]] = {}
    buffers = []
    is_left_out = left_out(module, weights, architecture, len(module.get_submodule(layers)))
    for name in weights.tensors:
        known = (names or {}).get(name, name)
        if known is None:
            continue
        renamed, _ = to_module(known)
        if renamed not in targets:
            if is_left_out(name):
                continue
            raise strange(module, name, weights)
        if renamed in is_buffer:
            buffers.append(name)
        rest = renamed.removeprefix(f"{layers}.")
        head = rest.partition(".")[0]
        inside = rest != renamed and head.isdigit()
        groups.setdefault(int(head) if inside else None, []).append(name)
    return Match(found, groups, buffers)


def strange(module: Any, name: str, checkpoint: Checkpoint) -> UserError:
    """The error for a tensor that the model does not have."""
    return UserError(
        f"{type(module).__name__} has no parameter for {name} of {checkpoint.source}",
        "config.json and weights do not match (does it lack a key of the published one, such as layer_types?), or this checkpoint has "
        "unsupported parts; please report it",
    )


def left_out(module: Any, weights: Checkpoint, record: Architecture | None, depth: int) -> Callable[[str], bool]:
    """A function: whether a model of `depth` decoder layers correctly ignores a tensor. These are tensors that the class itself declares, buffers
    that old versions saved, tensors that the family's record names, layers after the last (multi-token prediction), and parts besides the
    language model."""
    declared = ignored(module)
    if text_config(weights.config) is not weights.config and module.config.get_text_config() is module.config:
        declared = (*declared, OTHER_PARTS)  # only the language model of a composite
    known = re.compile("|".join(f"(?:{entry})" for entry in (*declared, *ALWAYS_LEFT_OUT, *(record.ignored if record else ()))))

    def decide(name: str) -> bool:
        located = record.locate(name) if record else None
        if record and not name.startswith(record.text_prefix):
            return True  # another part of a composite
        return known.search(name) is not None or (located is not None and located[0] >= depth)

    return decide


def with_unused(weights: Checkpoint, architecture: Architecture | None) -> Checkpoint:
    """A view of a checkpoint that also has the weights that its class has, but no published checkpoint."""
    return weights if architecture is None else filled(weights, _never_used(weights, architecture))


def _never_used(weights: Checkpoint, architecture: Architecture) -> dict[str, str]:
    """Weights of zero experts (which return their input) that the class has but published checkpoints leave out: name → the same tensor of
    expert 0."""
    config = text_config(weights.config)
    found: dict[str, str] = {}
    for entry in architecture.stacked:
        layout = architecture.layout_of(entry.name)
        if entry.role != "expert" or not entry.extra or layout is None:
            continue
        held = config_first(config, architecture.experts_key)
        count = int(held[1]) if held else 0
        extra = entry.extra if isinstance(entry.extra, int) else int(config_get(config, entry.extra) or 0)
        for name in weights.tensors:
            located = architecture.locate(name)
            owner = architecture.expert_of(located[1]) if located else None
            if located is None or owner is None or owner[0] != 0 or architecture.layout_of(located[1]) not in roles_of(layout):
                continue
            prefix = next(p for p in architecture.expert_prefix if located[1].startswith(p.format(expert=0)))
            head, below = name.removesuffix(located[1]), located[1].removeprefix(prefix.format(expert=0))
            others = [head + prefix.format(expert=count + k) + below for k in range(extra)]
            if not any(other in weights.tensors for other in others):
                found.update(dict.fromkeys(others, name))
    return found


def refuse_mismatched(keys: Iterable[Any]) -> None:
    """Refuse the first parameter whose tensor has another shape, as transformers reports them: name, or (name, shape in the file, in the model)."""
    for key in sorted(keys, key=str):
        name, *shapes = key if isinstance(key, tuple) else (key,)
        detail = f": the file has shape {list(shapes[0])}, the model {list(shapes[1])}" if len(shapes) == 2 else ""
        raise UserError(f"{name} has a wrong shape{detail}", "config.json and weights do not match, or the tensor is damaged")
