"""Plan + source → output checkpoint, by byte ranges: nothing is loaded, decoded or converted.

What stays keeps its bytes. Experts are renumbered from 0 in ascending order of their old ids; router rows, biases and fused expert tensors
lose the rows of dropped experts and keep extra rows (shared, zero and skip classes) at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from expertsmith.arch import config_get, config_present
from expertsmith.checkpoint.writer import OutputTensor, Piece, prepare_target, write_checkpoint
from expertsmith.errors import UserError
from expertsmith.inventory import Claim, Inventory
from expertsmith.plan import Plan
from expertsmith.progress import Progress, Silent
from expertsmith.selection import Rules
from expertsmith.surgery.card import model_card

MTP_KEYS = (
    "num_nextn_predict_layers",
    "num_mtp_modules",
    "mtp_num_hidden_layers",
)  # multi-token-prediction layers in config.json


def check_plan(plan: Plan, inventory: Inventory) -> None:
    """Refuse a plan that is not for this checkpoint or that its router cannot serve.

    Raises:
        UserError: another model's fingerprint, wrong layers or counts, fewer experts than the router needs, unequal expert_groups.
    """
    where = inventory.checkpoint.source
    if plan.model.model_type != inventory.architecture.model_type:
        raise UserError(f"the plan is for a {plan.model.model_type} model, but {where} is {inventory.architecture.model_type}")
    if plan.model.fingerprint != inventory.checkpoint.fingerprint:
        raise UserError(
            f"the plan was made for another checkpoint (its fingerprint is not that of {where})",
            "make a plan for this one with `expertsmith plan`",
        )
    if list(plan.kept) != inventory.layers:
        raise UserError(
            f"the plan has layers {_brief(list(plan.kept))}, but {where} has experts in layers {_brief(inventory.layers)}"
        )
    flat = plan.router_groups == "flatten"
    rules = inventory.rules
    if flat:
        rules = Rules(rules.num_experts, rules.top_k)
    for entry in plan.layers:
        if entry.num_experts != inventory.num_experts:
            raise UserError(
                f"layer {entry.layer} of the plan has {entry.num_experts} experts, but the checkpoint has {inventory.num_experts}"
            )
        count = len(entry.keep)
        if count < rules.least:
            raise UserError(
                f"layer {entry.layer} keeps {count} of {entry.num_experts} experts, but the router needs {rules.least} (top_k={rules.top_k})",
                f"keep at least {rules.least}",
            )
        size = rules.num_experts // rules.groups
        per_group = [sum(e // size == g for e in entry.keep) for g in range(rules.groups)]
        if len(set(per_group)) > 1:
            raise UserError(
                f"layer {entry.layer} keeps {per_group} experts of the {rules.groups} expert_groups, but they have to stay equal in size",
                "plan with the default --router-groups keep, or with flatten",
            )
        if entry.merge or entry.skip_threshold is not None:
            raise UserError(f"layer {entry.layer} of the plan merges or skips experts, which this version cannot apply yet")
    if plan.uniform_count is None:
        low, high = min(plan.counts), max(plan.counts)
        raise UserError(
            f"the plan keeps between {low} and {high} experts a layer, but a stock {inventory.architecture.model_type} config holds one number for all layers",
            "plan with --budget uniform",
        )


def _brief(layers: list[int]) -> str:
    return (
        f"{layers[0]}..{layers[-1]} ({len(layers)})"
        if layers and layers == list(range(layers[0], layers[-1] + 1))
        else str(layers)
    )


def output_tensors(plan: Plan, inventory: Inventory) -> list[OutputTensor]:
    """Every tensor of the output, as byte ranges of the source, in the source's order."""
    kept, n = plan.kept, inventory.num_experts
    pruned = plan.uniform_count != n
    made = []
    for claim in inventory.claims:
        if claim.kind == "unused" and pruned:
            continue
        if claim.kind == "expert" and claim.layer in kept:
            name = _renumbered(claim, inventory, kept[claim.layer])
            if name is not None:
                made.append(_whole(claim, name))
        elif claim.kind == "stacked" and claim.layer in kept:
            made.append(_rows(claim, n, kept[claim.layer]))
        else:
            made.append(_whole(claim, claim.info.name))
    return made


def _whole(claim: Claim, name: str) -> OutputTensor:
    info = claim.info
    return OutputTensor(name, info.dtype, info.shape, (Piece(info.file, info.start, info.nbytes),))


def _renumbered(claim: Claim, inventory: Inventory, keep: list[int]) -> str | None:
    """The output name of a per-expert tensor, or None if its expert goes. Zero experts follow the kept ones."""
    assert claim.expert is not None
    n = inventory.num_experts
    if claim.expert < n and claim.expert not in keep:
        return None
    new = keep.index(claim.expert) if claim.expert < n else claim.expert - n + len(keep)
    for prefix in inventory.architecture.expert_prefix:
        old_head, new_head = prefix.format(expert=claim.expert), prefix.format(expert=new)
        if claim.rest.startswith(old_head):
            base = claim.info.name[: len(claim.info.name) - len(claim.rest)]
            return base + new_head + claim.rest[len(old_head) :]
    raise AssertionError(f"{claim.info.name} was claimed by a prefix that it does not have")


def _rows(claim: Claim, n: int, keep: list[int]) -> OutputTensor:
    info, total = claim.info, n * claim.rows + claim.extra
    row = info.nbytes // total
    ranges = [(expert * claim.rows, (expert + 1) * claim.rows) for expert in keep]
    if claim.extra:
        ranges.append((n * claim.rows, total))
    joined: list[list[int]] = []
    for begin, end in ranges:
        if joined and joined[-1][1] == begin:
            joined[-1][1] = end
        else:
            joined.append([begin, end])
    shape = list(info.shape)
    shape[claim.row_axis] = len(keep) * claim.rows + claim.extra
    pieces = tuple(Piece(info.file, info.start + begin * row, (end - begin) * row) for begin, end in joined)
    return OutputTensor(info.name, info.dtype, tuple(shape), pieces)


def output_config(plan: Plan, inventory: Inventory) -> dict[str, Any]:
    """The source's config.json with the new counts, under the key names that it uses itself."""
    config = copy.deepcopy(dict(inventory.checkpoint.config))
    inner = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    record, count = inventory.architecture, plan.uniform_count
    assert count is not None
    for key in config_present(inner, record.experts_key + record.extra_config_keys):
        _set(inner, key, count)
    if plan.router_groups == "flatten":
        for key in filter(None, (record.group_key, record.top_group_key)):
            inner[key] = 1  # also where it is missing: the default may be more
        if record.group_alias is not None and record.group_alias in inner:
            inner[record.group_alias] = 1
    if count != inventory.num_experts and any(claim.kind == "unused" for claim in inventory.claims):
        for key in MTP_KEYS:
            if config_get(inner, key):
                _set(inner, key, 0)
    return config


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        config = config[part]
    config[last] = value


def apply_plan(
    plan: Plan,
    inventory: Inventory,
    out: Path,
    *,
    overwrite: bool = False,
    check_values: bool = True,
    max_shard: int | None = None,
    texts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write the output checkpoint; returns notes on what a reader should know.

    Args:
        check_values: look for NaN and inf in every chunk that is copied.
        texts: further files to write (relative path → content).

    Raises:
        UserError: see `check_plan` and `checkpoint.write_checkpoint`; NaN or inf in a kept tensor, named.
    """
    progress = progress or Silent()
    prepare_target(out, inventory.checkpoint.path, overwrite)
    check_plan(plan, inventory)
    tensors = output_tensors(plan, inventory)
    notes = []
    unused = [claim for claim in inventory.claims if claim.kind == "unused"]
    if unused and plan.uniform_count != inventory.num_experts:
        notes.append(
            f"{len(unused)} tensors of multi-token-prediction layers were left out: they have experts of their own, which were not calibrated"
        )
    if plan.router_groups == "flatten" and inventory.rules.groups > 1:
        notes.append(
            f"n_group and topk_group are now 1 (were {inventory.rules.groups} and {inventory.rules.top_groups}): tokens may use experts of any group"
        )
    files = {"README.md": model_card(plan, inventory, notes), "expertsmith/plan.json": plan.dumps(), **(texts or {})}
    with progress.task("apply", sum(tensor.nbytes for tensor in tensors), "B") as advance:
        write_checkpoint(
            out,
            tensors,
            output_config(plan, inventory),
            source=inventory.checkpoint,
            texts=files,
            overwrite=overwrite,
            on_tensor=_Finite() if check_values else None,
            progress=advance,
            **({"max_shard": max_shard} if max_shard else {}),
        )
    return notes


FINITE_LIMITS: dict[
    str, tuple[type[np.unsignedinteger[Any]], int, int]
] = {  # dtype → word, mask of the magnitude, first non-finite
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "F64": (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E5M2": (np.uint8, 0x7F, 0x7C),
}


class _Finite:
    """Raise on the first chunk that holds NaN or inf: all exponent bits set. Integer and packed dtypes pass."""

    def __init__(self) -> None:
        self.scratch = np.empty(0, dtype=np.uint8)

    def __call__(self, tensor: OutputTensor, chunk: memoryview) -> None:
        if tensor.dtype not in FINITE_LIMITS:
            return
        kind, magnitude, limit = FINITE_LIMITS[tensor.dtype]
        values: np.ndarray[Any, Any] = np.frombuffer(chunk, dtype=kind)
        if self.scratch.nbytes < values.nbytes:
            self.scratch = np.empty(values.nbytes, dtype=np.uint8)
        scratch = self.scratch[: values.nbytes].view(kind)
        np.bitwise_and(values, np.asarray(magnitude, dtype=kind), out=scratch)
        if values.size and int(scratch.max()) >= limit:
            raise UserError(f"{tensor.name} has NaN or inf", "the source checkpoint is damaged: download it again")
