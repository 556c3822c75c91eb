"""The role of each tensor of a checkpoint: by headers and the family's record, every tensor is claimed exactly once.

`inspect`, `plan`, `apply` and `verify` use this; it needs no weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from expertsmith.arch import Architecture, Stacked, config_first, config_get, family_of, text_config
from expertsmith.arch.base import Layout
from expertsmith.checkpoint import Checkpoint, TensorInfo
from expertsmith.checkpoint.floats import Floats, floats, quantisation_of
from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules

if TYPE_CHECKING:
    import torch

Kind = Literal["expert", "stacked", "other"]
NOVICES_KEY = "expertsmith_novices"  # as in engine.novices, which needs torch
NEURONS_KEY = "expertsmith_neurons"  # as in engine.narrow
MTP_KEYS = (
    "num_nextn_predict_layers",
    "num_mtp_modules",
    "mtp_num_hidden_layers",
)  # layers of multi-token prediction in config.json


@dataclass(frozen=True)
class Claim:
    """One tensor of the source.

    kind "expert": the whole tensor belongs to routed expert `expert` of decoder layer `layer` (ids from num_experts on are zero
    experts, which are always kept); "stacked": its rows run over the experts (`entry`, `rows` an expert, `extra` rows after them);
    "other": everything else. `mtp`: it belongs to multi-token prediction, whose layers are numbered after the last decoder layer.
    """

    info: TensorInfo
    kind: Kind
    layer: int | None = None
    rest: str = ""
    expert: int | None = None
    entry: Stacked | None = None
    rows: int = 0
    extra: int = 0
    row_axis: int = 0  # the axis that runs over experts: 1 after a leading axis of length 1
    mtp: bool = False

    @property
    def routed(self) -> bool:
        """Whether it is a routed expert's weight (not its router row)."""
        return self.kind == "expert" or (self.kind == "stacked" and self.entry is not None and self.entry.role == "expert")


@dataclass(frozen=True)
class Inventory:
    """The experts of a checkpoint.

    `num_experts`, `top_k` and `rules` are those of config.json, with the largest numbers if it has lists. For a layer with its own number
    in `overrides` or `chosen`, see `experts_in` and `rules_of`.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    num_experts: int
    top_k: int
    rules: Rules
    claims: tuple[Claim, ...]
    overrides: Mapping[int, int] = field(default_factory=dict)  # decoder layer → experts, from a list or per_layer_config
    chosen: Mapping[int, int] = field(default_factory=dict)  # decoder layer → top_k, from the same
    novices: Mapping[int, int] = field(default_factory=dict)  # decoder layer → constants among the classes of its router

    @cached_property
    def floats(self) -> Inventory:
        """The same model as floats: its claims are float weights, read decoded in float32. The same object if nothing is quantised."""
        view = floats(self.checkpoint)
        return self if view is self.checkpoint else take_inventory(view)

    @property
    def config(self) -> dict[str, Any]:
        """The text config as a plain dict."""
        return dict(text_config(self.checkpoint.config))

    @cached_property
    def by_layer(self) -> dict[int, list[Claim]]:
        """The claims of every decoder layer."""
        found: dict[int, list[Claim]] = {}
        for claim in self.claims:
            if claim.layer is not None:
                found.setdefault(claim.layer, []).append(claim)
        return found

    @cached_property
    def layers(self) -> list[int]:
        """Decoder layers with routed experts."""
        return sorted({claim.layer for claim in self.claims if claim.routed and claim.layer is not None and not claim.mtp})

    @cached_property
    def mtp_layers(self) -> list[int]:
        """Multi-token-prediction layers with routed experts."""
        return sorted({claim.layer for claim in self.claims if claim.routed and claim.layer is not None and claim.mtp})

    @cached_property
    def has_mtp(self) -> bool:
        """Whether any tensor belongs to multi-token prediction."""
        return any(claim.mtp for claim in self.claims)

    @cached_property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return 1 + max((claim.layer for claim in self.claims if claim.layer is not None and not claim.mtp), default=-1)

    def locate(self, name: str) -> tuple[int, str] | None:
        """(layer, name below it) of a tensor, or None outside the layers; multi-token-prediction layers are numbered after the last one."""
        layer, rest = _located(name, self.architecture, self.config.get("num_hidden_layers"))[:2]
        return None if layer is None else (layer, rest)

    def experts_in(self, layer: int) -> int:
        """The number of routed experts of a decoder layer."""
        return self.overrides.get(layer, self.num_experts)

    def rules_of(self, layer: int) -> Rules:
        """The rules of a decoder layer: the model's, with the layer's own number of experts and top_k."""
        return replace(self.rules, num_experts=self.experts_in(layer), top_k=self.chosen.get(layer, self.top_k))

    @cached_property
    def counts(self) -> dict[int, int]:
        """The number of routed experts of every layer that has any."""
        return {layer: self.experts_in(layer) for layer in self.layers}

    @property
    def uneven(self) -> bool:
        """Whether layers hold different numbers of experts, or another number than config.json says."""
        return any(count != self.num_experts for count in self.counts.values())

    def size(self, counts: dict[int, int] | None = None, mtp: bool = True, routers: bool = True) -> tuple[int, int]:
        """(parameters, bytes) of the checkpoint with `counts` experts a layer (default: all), with or without multi-token prediction.
        `routers`: whether routers lose the rows of dropped experts."""
        numel = nbytes = 0.0
        for claim in self.claims:
            share = 1.0
            if claim.mtp and not mtp:
                share = 0.0
            elif counts and claim.layer in counts and (claim.routed or (routers and claim.kind == "stacked")):
                share = self._share(claim, counts[claim.layer])
            numel += share * claim.info.numel
            nbytes += share * claim.info.nbytes
        return round(numel), round(nbytes)

    def _share(self, claim: Claim, count: int) -> float:
        here = self._here(claim)
        if claim.kind == "expert":  # experts have one size, so any `count` of them weigh the same
            return count / here if claim.expert is not None and claim.expert < here else 1.0
        return (count * claim.rows + claim.extra) / (here * claim.rows + claim.extra)

    def _here(self, claim: Claim) -> int:
        return self.num_experts if claim.layer is None else self.experts_in(claim.layer)

    @cached_property
    def routed_parameters(self) -> int:
        """Parameters in routed experts of the decoder layers."""
        return round(sum(self._routed(claim) for claim in self.claims if claim.routed and not claim.mtp))

    def _routed(self, claim: Claim) -> float:
        here = self._here(claim)
        if claim.kind == "expert":
            return claim.info.numel * float(claim.expert is not None and claim.expert < here)
        return claim.info.numel * here * claim.rows / (here * claim.rows + claim.extra)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses: all except the routed experts that it is not routed to."""
        total = self.size()[0] - sum(claim.info.numel for claim in self.claims if claim.mtp)
        idle = sum(
            self._routed(claim) * (1 - self.chosen.get(claim.layer or 0, self.top_k) / self._here(claim))
            for claim in self.claims
            if claim.routed and not claim.mtp
        )
        return round(total - idle)

    def layout(self, claim: Claim) -> Layout | None:
        """The layout of the projections in a routed expert's tensor. If a family's experts are published transposed but saved again as in
        memory, the shape decides, as in transformers: a tensor that fits unchanged was not transposed."""
        found = self.architecture.layout_of(claim.rest)
        if found is None or not self.architecture.transposed_by_shape or len(claim.info.shape) < 3:
            return found
        width = claim.info.shape[-2 if found.startswith("down") else -1]
        return found.removesuffix("_t") if width == self.config.get("hidden_size") else found  # type: ignore[return-value]

    def rows(self, claim: Claim, expert: int) -> torch.Tensor:
        """One expert's part of a tensor, in its own dtype: the whole of a per-expert tensor, [rows, …] or its entry of a stacked one."""
        if claim.kind == "expert":
            return self.checkpoint.read(claim.info.name)
        if claim.row_axis == 1:  # [1, experts]
            return self.checkpoint.read(claim.info.name)[0, expert * claim.rows : (expert + 1) * claim.rows]
        part = self.checkpoint.read(claim.info.name, expert * claim.rows, (expert + 1) * claim.rows)
        return part[0] if claim.rows == 1 and part.dim() > 1 else part

    def expert_claims(self, layer: int) -> list[list[Claim]]:
        """The routed weights of a layer, by expert; a stacked claim is listed for each of its experts."""
        count = self.experts_in(layer)
        found: list[list[Claim]] = [[] for _ in range(count)]
        for claim in self.by_layer.get(layer, []):
            if not claim.routed:
                continue
            if claim.kind == "stacked":
                for held in found:
                    held.append(claim)
            elif claim.expert is not None and claim.expert < count:
                found[claim.expert].append(claim)
        return found


def take_inventory(checkpoint: Checkpoint, *, undecodable: bool = False, novices: bool = False) -> Inventory:
    """Claim every tensor of a checkpoint.

    Args:
        undecodable: also accept a checkpoint whose quantised tensors cannot be decoded, to inspect it; its experts are then not compared.
        novices: also accept a checkpoint with experts that are constants, whose other experts are counted, or that lost neurons in
            different numbers.

    Raises:
        UserError: dense or unsupported model, config without expert counts, tensors that contradict it (missing expert,
            shape that differs from its siblings', rows that do not divide into experts), or quantised tensors that cannot be decoded; experts that are constants.
    """
    record = family_of(checkpoint.config, f"{checkpoint.source}/config.json")
    config = text_config(checkpoint.config)
    experts = _count(config, record.experts_key, checkpoint)
    top_k = _count(config, record.top_k_key, checkpoint)
    own = per_layer_counts(config, record, f"{checkpoint.source}/config.json")
    depth = config.get("num_hidden_layers")
    try:
        weights, known = _weights_of(checkpoint), True
    except UserError:
        if not undecodable:
            raise
        weights, known = {}, False
    constant = novices_of(config)
    if constant and not novices:
        raise UserError(
            f"experts of {checkpoint.source} are constants, and only load, verify, evaluate, heal, inspect and lint support that",
            "use the original checkpoint",
        )
    if config.get(NEURONS_KEY) and not novices:
        raise UserError(
            f"experts of {checkpoint.source} have lost neurons, in different numbers, and only load, verify, evaluate, heal, inspect and lint support that",
            "use the original checkpoint",
        )
    stored = {**own, **{layer: own.get(layer, experts) - count for layer, count in constant.items()}}
    claims = tuple(
        _claim(info, record, config, experts, (own, stored), depth, weights.get(info.name))
        for info in checkpoint.tensors.values()
    )
    groups, top_groups = _groups(record, config, f"{checkpoint.source}/config.json")
    rules = Rules(experts, top_k, groups, top_groups, record.group_minimum)
    chosen = per_layer_numbers(config, record.top_k_key, f"{checkpoint.source}/config.json")
    inventory = Inventory(checkpoint, record, experts, top_k, rules, claims, stored, chosen, constant)
    _check_depth(inventory, depth)
    if not inventory.layers:
        prefix = record.expert_prefix[0] if record.expert_prefix else record.stacked[0].name
        raise UserError(
            f"{checkpoint.source} has no routed experts (no tensors such as layers.0.{prefix}…)",
            "check that config.json matches the checkpoint",
        )
    for layer in inventory.layers + inventory.mtp_layers:
        count = inventory.experts_in(layer)
        if count % groups and layer not in constant:
            place = f" in decoder layer {layer}" if layer in own else ""
            raise UserError(
                f"{checkpoint.source}/config.json has {count} experts{place} in {groups} expert_groups, which does not divide evenly"
            )
        if known:
            _check_layer(inventory.floats, layer)  # quantised experts may be stored in different ways, but have one shape
    return inventory


def _check_depth(inventory: Inventory, depth: Any) -> None:
    """Refuse a config.json with more decoder layers than the tensors have (LongCat counts two for each), or an invalid number."""
    where = f"{inventory.checkpoint.source}/config.json"
    if depth is not None:
        _positive(("num_hidden_layers", depth), where)
    held = inventory.num_layers * (2 if "num_layers" in inventory.config else 1)
    if depth is not None and depth > held:
        raise UserError(
            f"{where}: num_hidden_layers is {depth}, but the tensors have {held} decoder layers",
            "download the checkpoint again, and check that config.json is from the same model",
        )


def novices_of(config: Mapping[str, Any]) -> dict[int, int]:
    """Decoder layer → experts that are constants, of a text config."""
    held = config.get(NOVICES_KEY) or {}
    return {int(layer): len(said["novices"]) for layer, said in held.items()}


def per_layer_counts(config: Mapping[str, Any], record: Architecture, where: str = "config.json") -> dict[int, int]:
    """`per_layer_numbers` of experts."""
    return per_layer_numbers(config, record.experts_key, where)


def per_layer_numbers(config: Mapping[str, Any], wanted: tuple[str, ...], where: str = "config.json") -> dict[int, int]:
    """Decoder layer → number, for the layers with their own number in a text config: in a list with one number a layer (0: none), if these
    are not all equal, or in `per_layer_config`.

    Raises:
        UserError: a list of another length, per_layer_config that does not map layers to keys, or a count that is not a positive number.
    """
    found: dict[int, int] = {}
    held = config_first(config, wanted)
    if held is not None and isinstance(held[1], list):
        numbers = _numbers(held, where)
        depth = config.get("num_hidden_layers")
        if len(set(numbers)) > 1 and len(numbers) != depth:
            raise UserError(
                f"{where}: {held[0]} has {len(numbers)} different numbers for {depth} decoder layers",
                "give one number per layer, or one for all",
            )
        if len(set(numbers)) > 1:
            found = {layer: number for layer, number in enumerate(numbers) if number}
    layers = config.get("per_layer_config") or {}
    for name, keys in layers.items() if isinstance(layers, Mapping) else [(layers, None)]:
        if not str(name).isdigit() or not isinstance(keys, Mapping):
            raise UserError(
                f"{where}: per_layer_config has the entry {name!r}, but it must map decoder layer numbers to config keys"
            )
        held = config_first(keys, wanted)
        if held is not None:
            found[int(name)] = _positive(held, f"{where}: per_layer_config, decoder layer {int(name)}")
    return found


def _count(config: Any, keys: tuple[str, ...], checkpoint: Checkpoint) -> int:
    found = config_first(config, keys)
    if found is None:
        raise UserError(f"{checkpoint.source}/config.json has no {' or '.join(keys)}")
    where = f"{checkpoint.source}/config.json"
    return max(_numbers(found, where)) if isinstance(found[1], list) else _positive(found, where)


def _numbers(found: tuple[str, Any], where: str) -> list[int]:
    key, values = found
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values) or not any(values):
        raise UserError(f"{where}: {key} is {values!r}, but it must have one positive number per decoder layer")
    return list(values)


def _positive(found: tuple[str, Any], where: str) -> int:
    key, value = found
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key} is {value!r}, but must be a positive number")
    return value


def _groups(record: Architecture, config: Any, where: str) -> tuple[int, int]:
    if record.group_key is None:
        return 1, 1
    if record.group_active is not None and config_get(config, record.group_active[0]) not in record.group_active[1]:
        return 1, 1
    groups, top = record.group_default
    for key in (record.group_alias, record.group_key):
        if key in config:
            groups = top = 1 if config[key] is None else _positive((str(key), config[key]), where)
    if config.get(record.top_group_key) is not None:
        top = _positive((str(record.top_group_key), config[record.top_group_key]), where)
    if top > groups:
        raise UserError(f"{where}: a token may use {top} expert_groups ({record.top_group_key}), but there are {groups}")
    return groups, top


def _weights_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor → the float weight that it is a part of, for quantised weights (none in a float view)."""
    found = None if isinstance(checkpoint, Floats) else quantisation_of(checkpoint)
    stored = found.stored.values() if found else ()
    return {info.name: entry.name for entry in stored for info in entry.parts.values()}


def _located(name: str, record: Architecture, depth: Any) -> tuple[int | None, str, bool]:
    """(layer, name below it, whether it belongs to multi-token prediction) of a tensor."""
    ahead = record.locate_mtp(name, depth if isinstance(depth, int) else None)
    layer, rest = ahead or record.locate(name) or (None, "")
    return layer, rest, ahead is not None


def _claim(
    info: TensorInfo,
    record: Architecture,
    config: Any,
    scalar: int,
    own: tuple[Mapping[int, int], Mapping[int, int]],  # of routers, of stored experts
    depth: Any,
    weight: str | None,
) -> Claim:
    layer, rest, mtp = _located(info.name, record, depth)
    if layer is None:
        return Claim(info, "other", mtp=mtp)
    experts = own[1].get(layer, scalar)
    owner = record.expert_of(rest)
    if owner is not None:
        return Claim(info, "expert", layer, rest, expert=owner[0], mtp=mtp)
    entry = record.stacked_of(rest)
    if (
        entry is None and weight is not None and len(info.shape) > 1
    ):  # codes and scales of a fused weight run over the experts too
        entry = record.stacked_of(_located(weight, record, depth)[1])
    if entry is not None and entry.role == "router":
        experts = own[0].get(layer, scalar)
    if entry is None:
        if rest.rpartition(".")[2] == "novices" and own[0] != own[1]:
            return Claim(info, "other", layer, rest, mtp=mtp)
        if info.shape and info.shape[0] == experts and re.search(r"(^|\.)experts\.", rest):
            raise UserError(
                f"{info.name} seems to be stacked over the {experts} experts, but the record of the {record.model_type} family does not have it",
                "pruning without it would break the checkpoint; please report this checkpoint",
            )
        return Claim(info, "other", layer, rest, mtp=mtp)
    extra = entry.extra if isinstance(entry.extra, int) else int(config_get(config, entry.extra) or 0)
    axis = 1 if len(info.shape) > 1 and info.shape[0] == 1 and experts + extra > 1 else 0
    rows = info.shape[axis] if info.shape else 0
    per_expert, left = divmod(rows - extra, experts)
    if left or per_expert < 1 or (entry.role == "router" and per_expert != 1):
        wanted = f"{experts} experts" + (f" + {extra} further rows" if extra else "")
        raise UserError(
            f"{info.name} has shape {list(info.shape)}, which does not fit {wanted} of config.json",
            "config.json and weights do not match, or the tensor is damaged",
        )
    return Claim(info, "stacked", layer, rest, entry=entry, rows=per_expert, extra=extra, row_axis=axis, mtp=mtp)


def ragged_layers(config: Mapping[str, Any]) -> set[int]:
    """Decoder layers whose experts have different numbers of neurons, from a text config."""
    held = config.get(NEURONS_KEY) or {}
    return {int(layer) for layer, said in held.items() if isinstance(said, list)}


def _check_layer(inventory: Inventory, layer: int) -> None:
    record, experts = inventory.architecture, inventory.experts_in(layer)
    shapes: dict[str, Counter[tuple[int, ...]]] = {}
    owners: dict[str, dict[int, TensorInfo]] = {}
    for claim in inventory.by_layer[layer]:
        if claim.kind == "expert" and claim.expert is not None and claim.expert < experts:
            owned = record.expert_of(claim.rest)
            below = owned[1] if owned else ""
            owners.setdefault(below, {})[claim.expert] = claim.info
            shapes.setdefault(below, Counter())[claim.info.shape] += 1
    for below, held in owners.items():
        missing = [expert for expert in range(experts) if expert not in held]
        if missing:
            raise UserError(
                f"decoder layer {layer} lacks {below} of expert {missing[0]} ({len(held)} of {experts} are there)",
                "download the checkpoint again, and check that config.json is from the same model",
            )
        usual = shapes[below].most_common(1)[0][0]
        odd = next((info for info in held.values() if info.shape != usual), None)
        if odd is not None and layer not in ragged_layers(inventory.config):
            raise UserError(
                f"{odd.name} has shape {list(odd.shape)}, but the other experts have {list(usual)}", "the tensor is damaged"
            )
    if not any(claim.entry is not None and claim.entry.role == "router" for claim in inventory.by_layer[layer]):
        raise UserError(f"decoder layer {layer} has experts but no router weight", "download the checkpoint again")
