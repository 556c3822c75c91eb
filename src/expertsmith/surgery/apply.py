"""Write the output checkpoint of a plan and its source by byte ranges: only merged experts are loaded, decoded or converted.

Kept tensors keep their bytes. Experts are renumbered from 0 in ascending order of their old ids; router rows, biases and fused expert tensors
lose the rows of dropped experts and keep extra rows (shared, zero and skip classes) at the end.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expertsmith.arch import config_get, config_set, text_config
from expertsmith.checkpoint.code import code_notes, drop_auto_map
from expertsmith.checkpoint.floats import SIDE_FILES, Floats, floats, quantisation_of, refuse_unencodable, source_of
from expertsmith.checkpoint.writer import MAX_SHARD, Made, OutputTensor, Piece, left_behind, prepare_target, write_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import MTP_KEYS, Claim, Inventory, take_inventory
from expertsmith.experts.rules import Rules, groups_of
from expertsmith.experts.weights import neurons_in
from expertsmith.planning.earlier import PLAN, passed_on
from expertsmith.planning.plan import NEURONS, LayerPlan, Plan
from expertsmith.surgery.building import check_building
from expertsmith.surgery.card import model_card
from expertsmith.surgery.counts import changes, counts_of, drops_mtp, router_counts
from expertsmith.surgery.neurons import check_neurons, filled_shared, neuron_tensor, width_of, write_widths
from expertsmith.surgery.novices import check_novices, novice_tensors, write_novices
from expertsmith.surgery.quantisation import Renumbering, output_files, output_quantisation
from expertsmith.surgery.skip import SKIPS, write_padding, write_skip
from expertsmith.surgery.uneven import (
    check_padding,
    check_uneven,
    code_for,
    is_listed,
    refuse_padded,
    routing_biases,
    write_counts,
)
from expertsmith.surgery.uneven import pad as fill_up
from expertsmith.views.progress import Progress, Silent

if TYPE_CHECKING:
    from expertsmith.surgery.merge import Merger


def check_plan(plan: Plan, inventory: Inventory, pad: bool = False) -> None:
    """Refuse a plan that is not for this checkpoint or that its router cannot serve.

    Raises:
        UserError: another model's fingerprint, wrong layers or counts, fewer experts than the router needs, unequal expert_groups; different
            numbers of experts a layer (or padding) if the family does not support that; see also `merge.check_merges`.
    """
    _check_model(plan, inventory)
    flat = plan.router_groups == "flatten"
    for entry in plan.layers:
        rules = inventory.rules_of(entry.layer)
        _check_layer(entry, Rules(rules.num_experts, rules.top_k) if flat or plan.novices else rules)
        _check_width(entry, inventory)
        _check_mtp(entry, plan, inventory)
    if plan.merges or plan.novices or plan.neurons or changes(plan, inventory):
        refuse_padded(inventory)
    if plan.merges:
        from expertsmith.surgery.merge import check_merges

        check_merges(plan, inventory)
    if plan.neurons:
        check_neurons(inventory, width_of(plan))
    if plan.novices:
        check_novices(inventory)
        if pad:
            raise UserError("--pad has no effect on a plan with novices: the router keeps all its classes", "leave it out")
    elif pad:
        check_padding(inventory, counts_of(plan), 1 if flat else inventory.rules.groups)
    elif plan.uniform_count is None:
        check_uneven(inventory)


def _check_model(plan: Plan, inventory: Inventory) -> None:
    where = inventory.checkpoint.source
    if plan.model.model_type != inventory.architecture.model_type:
        raise UserError(f"the plan is for a {plan.model.model_type} model, but {where} is {inventory.architecture.model_type}")
    if plan.model.fingerprint != inventory.checkpoint.fingerprint:
        raise UserError(
            f"the plan was made for another checkpoint (its fingerprint differs from {where})",
            "make a plan for this checkpoint with `expertsmith plan`",
        )
    wanted = inventory.layers + (inventory.mtp_layers if plan.mtp == "keep" else [])
    if list(plan.kept) != wanted:
        raise UserError(f"the plan has layers {_brief(list(plan.kept))}, but {where} has experts in layers {_brief(wanted)}")


def _check_layer(entry: LayerPlan, rules: Rules) -> None:
    if entry.num_experts != rules.num_experts:
        raise UserError(
            f"layer {entry.layer} of the plan has {entry.num_experts} experts, but the checkpoint has {rules.num_experts} there"
        )
    count = len(entry.keep)
    if count < rules.least:
        raise UserError(
            f"layer {entry.layer} keeps {count} of {entry.num_experts} experts, but the router needs {rules.least} (top_k={rules.top_k})",
            f"keep at least {rules.least}",
        )
    per_group = [sum(e in group for e in entry.keep) for group in groups_of(rules)]
    if len(set(per_group)) > 1:
        raise UserError(
            f"layer {entry.layer} keeps {per_group} experts of the {rules.groups} expert_groups, but the groups must stay equal in size",
            "plan with the default --router-groups keep, or with flatten",
        )


def _check_mtp(entry: LayerPlan, plan: Plan, inventory: Inventory) -> None:
    if bool(entry.mtp) != (entry.layer in inventory.mtp_layers):
        kinds = ("a multi-token-prediction layer", "a decoder layer")
        here, there = kinds if entry.mtp else kinds[::-1]
        raise UserError(f"layer {entry.layer} is {here} in the plan, but {there} in the checkpoint")
    says = max(router_counts(plan).values())
    if entry.mtp and len(entry.keep) != says:
        raise UserError(
            f"multi-token-prediction layer {entry.layer} of the plan keeps {len(entry.keep)} experts, but config.json will say {says}",
            "keep the same number in that layer",
        )


def _check_width(entry: LayerPlan, inventory: Inventory) -> None:
    if entry.neurons is None:
        return
    width = neurons_in(inventory, entry.layer)
    if entry.neurons.width != width:
        raise UserError(
            f"layer {entry.layer} of the plan has experts of {entry.neurons.width} neurons, but those of the checkpoint have {width}"
        )


def _brief(layers: list[int]) -> str:
    return (
        f"{layers[0]}..{layers[-1]} ({len(layers)})"
        if layers and layers == list(range(layers[0], layers[-1] + 1))
        else str(layers)
    )


def written(plan: Plan, inventory: Inventory, requantise: bool) -> Inventory:
    """The inventory of the output's tensors: that of the source, or, if experts of a quantised source are merged and not requantised, that
    of its float view in bfloat16."""
    if not plan.merges or requantise or quantisation_of(inventory.checkpoint) is None:
        return inventory
    return take_inventory(floats(inventory.checkpoint, "BF16"))


def check_requantise(plan: Plan, inventory: Inventory) -> None:
    """Refuse to requantise merged experts if that has no effect or is impossible.

    Raises:
        UserError: nothing is merged, nothing is quantised, or the format needs calibration for quantisation.
    """
    found = quantisation_of(inventory.checkpoint)
    if not plan.merges or found is None:
        what = "no expert is merged" if found else f"{inventory.checkpoint.source} is not quantised"
        raise UserError(f"--requantise has no effect: {what}", "leave it out")
    refuse_unencodable(found, {claim.info.name for claim in inventory.floats.claims if claim.routed})


def output_tensors(plan: Plan, inventory: Inventory, pad: bool = False, merger: Merger | None = None) -> list[OutputTensor]:
    """Every tensor of the output, as byte ranges of the source and computed pieces, in the source's order.

    Args:
        merger: computes the merged pieces; None: created if the plan merges.
    """
    kept = plan.kept
    if plan.merges and merger is None:  # otherwise nothing is computed, and torch is not needed
        from expertsmith.surgery.merge import Merger

        merger = Merger(plan, inventory)
    dropped = drops_mtp(plan, inventory)
    made = []
    for claim in inventory.claims:
        if claim.mtp and dropped:
            continue
        if claim.kind == "expert" and claim.layer in kept and claim.layer not in plan.neurons:
            name = _renumbered(claim, inventory, kept[claim.layer])
            if name is not None:
                made.append(_whole(claim, name, inventory, merger))
        elif claim.routed and claim.layer in plan.neurons:
            made.append(neuron_tensor(claim, plan, inventory))
        elif claim.kind == "stacked" and claim.layer in kept and (claim.routed or not plan.novices):
            made.append(_rows(claim, inventory, kept[claim.layer], merger))
        else:
            made.append(_whole(claim, claim.info.name, inventory))
    made += novice_tensors(plan, inventory)
    if plan.neurons:
        made = filled_shared(made, plan, inventory)
    return fill_up(made, counts_of(plan), inventory) if pad else made


def _whole(claim: Claim, name: str, inventory: Inventory, merger: Merger | None = None) -> OutputTensor:
    info = claim.info
    made = merger.piece(claim, claim.expert) if merger and claim.expert is not None else None
    return OutputTensor(name, info.dtype, info.shape, (made or source_of(inventory.checkpoint, info),))


def _renumbered(claim: Claim, inventory: Inventory, keep: list[int]) -> str | None:
    """The output name of a per-expert tensor, or None if its expert is dropped. Zero experts follow the kept ones."""
    assert claim.expert is not None
    assert claim.layer is not None
    n = inventory.experts_in(claim.layer)
    if claim.expert < n and claim.expert not in keep:
        return None
    new = keep.index(claim.expert) if claim.expert < n else claim.expert - n + len(keep)
    for prefix in inventory.architecture.expert_prefix:
        old_head, new_head = prefix.format(expert=claim.expert), prefix.format(expert=new)
        if claim.rest.startswith(old_head):
            base = claim.info.name[: len(claim.info.name) - len(claim.rest)]
            return base + new_head + claim.rest[len(old_head) :]
    raise AssertionError(f"{claim.info.name} does not start with its prefix")


def _rows(claim: Claim, inventory: Inventory, keep: list[int], merger: Merger | None) -> OutputTensor:
    assert claim.layer is not None
    n = inventory.experts_in(claim.layer)
    info, total = claim.info, n * claim.rows + claim.extra
    row = info.nbytes // total
    pieces: list[Piece | Made] = []

    def copy(begin: int, end: int) -> None:
        """Append rows of the source; adjacent rows become one range."""
        piece = source_of(inventory.checkpoint, info, begin * row, (end - begin) * row)
        last = pieces[-1] if pieces else None
        if isinstance(last, Piece) and isinstance(piece, Piece) and last.start + last.nbytes == piece.start:
            pieces[-1] = Piece(info.file, last.start, last.nbytes + piece.nbytes)
        else:
            pieces.append(piece)

    for expert in keep:
        made = merger.piece(claim, expert) if merger else None
        if made is not None:
            pieces.append(made)
        else:
            copy(expert * claim.rows, (expert + 1) * claim.rows)
    if claim.extra:
        copy(n * claim.rows, total)
    shape = list(info.shape)
    shape[claim.row_axis] = len(keep) * claim.rows + claim.extra
    return OutputTensor(info.name, info.dtype, tuple(shape), tuple(pieces))


def output_config(plan: Plan, inventory: Inventory, pad: bool = False) -> dict[str, Any]:
    """The source's config.json with the new counts, under its own key names; without code if transformers needs none."""
    config = copy.deepcopy(dict(inventory.checkpoint.config))
    drop_auto_map(config)
    inner: dict[str, Any] = text_config(config)  # type: ignore[assignment]
    record, counts = inventory.architecture, router_counts(plan)
    write_skip(config, plan)
    write_padding(config, counts if pad else None)
    output_quantisation(config, renumbering_of(plan, inventory, pad))
    write_counts(config, dict.fromkeys(counts, max(counts.values())) if pad else counts, inventory)
    if plan.novices:
        write_novices(config, plan, inventory)
    if plan.neurons:
        write_widths(config, plan, inventory)
    if plan.router_groups == "flatten":
        inner.update(record.one_group)  # also if they are missing: the default may be larger
        if record.group_alias is not None and record.group_alias in inner:
            inner[record.group_alias] = 1
    if drops_mtp(plan, inventory):
        for key in MTP_KEYS:
            if config_get(inner, key):
                config_set(inner, key, 0)
    return config


def renumbering_of(plan: Plan, inventory: Inventory, pad: bool = False) -> Renumbering:
    """The new ids of the experts: kept ones in ascending order, then zero experts; `pad` adds copies of the first kept one."""
    kept, most = plan.kept, max(map(len, plan.kept.values()))
    new: dict[int, dict[int, tuple[int, ...]]] = {}
    for layer, keep in kept.items():
        ids: dict[int, tuple[int, ...]] = {expert: (place,) for place, expert in enumerate(keep)}
        if pad:
            ids[keep[0]] = (0, *range(len(keep), most))
        n = inventory.experts_in(layer)
        for claim in inventory.by_layer.get(layer, ()):
            if claim.kind == "expert" and claim.expert is not None and claim.expert >= n:
                ids[claim.expert] = (claim.expert - n + len(keep),)
        new[layer] = ids
    return Renumbering(inventory, new)


def output_texts(plan: Plan, inventory: Inventory, pad: bool = False) -> dict[str, str]:
    """Name → text of the source's files that change with the experts."""
    return output_files(renumbering_of(plan, inventory, pad))


def apply_plan(  # noqa: C901  (one note for each case)
    plan: Plan,
    inventory: Inventory,
    out: Path,
    *,
    pad: bool = False,
    requantise: bool = False,
    overwrite: bool = False,
    check_values: bool = True,
    max_shard: int | None = None,
    texts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write the output checkpoint; returns notes for the user.

    Args:
        pad: fill up layers that have fewer experts than others, so that a stock class loads the result (`surgery.uneven.pad`).
        requantise: if experts are merged, keep the format of a quantised source; otherwise everything is then written in bfloat16.
        check_values: look for NaN and inf in every chunk that is copied.
        texts: further files to write (relative path → content).

    Raises:
        UserError: see `check_plan` and `checkpoint.write_checkpoint`; NaN or inf in a kept tensor, named.
    """
    progress = progress or Silent()
    prepare_target(out, inventory.checkpoint.path, overwrite)
    pad = pad and (plan.uniform_count is None or bool(plan.novices))
    check_plan(plan, inventory, pad)
    check_building(inventory, inventory.architecture.one_group if plan.router_groups == "flatten" else {})
    if requantise:
        check_requantise(plan, inventory)
    inventory = written(plan, inventory, requantise)
    decoded = isinstance(inventory.checkpoint, Floats)
    merger = None
    if plan.merges:
        from expertsmith.surgery.merge import Merger

        merger = Merger(plan, inventory)
    tensors = output_tensors(plan, inventory, pad, merger)
    notes = list(plan.notes)
    if decoded:
        notes.append("the source is quantised, but merged experts are not: all weights were decoded to bfloat16")
    if plan.calibration and text_config(inventory.checkpoint.config) is not inventory.checkpoint.config:
        notes.append(
            "the calibration data is text only, so experts for images or sound were judged by text: evaluate those too"
        )
    if drops_mtp(plan, inventory):
        count = sum(claim.mtp for claim in inventory.claims)
        notes.append(
            f"{count} tensors of multi-token prediction were removed: engines cannot use them for speculative decoding"
        )
    if plan.router_groups == "flatten" and inventory.rules.groups > 1:
        notes.append(
            f"n_group and topk_group are now 1 (were {inventory.rules.groups} and {inventory.rules.top_groups}): tokens may use experts of any group"
        )
    if pad:
        notes.append(
            f"layers with fewer than {max(plan.counts)} experts are padded with dead experts, which are never selected: this saves no memory"
        )
    elif plan.novices:
        notes.append(
            f"{sum(len(entry.experts) for entry in plan.novices.values())} experts are constants: load with expertsmith.load(…), or with "
            "transformers and trust_remote_code=True"
        )
    elif plan.neurons:
        notes.append(_said_neurons(plan))
    elif plan.uniform_count is None:
        notes.append(
            f"layers keep {min(plan.counts)} to {max(plan.counts)} experts: load with expertsmith.load(…)"
            + ("" if is_listed(inventory) else ", or with transformers and trust_remote_code=True")
        )
    if plan.skip is not None:
        notes.append(SKIPS)
    config = output_config(plan, inventory, pad)
    notes += code_notes(inventory.checkpoint.path, inventory.checkpoint.config, config) + left_behind(inventory.checkpoint)
    counts = router_counts(plan)
    narrow = bool(plan.neurons) and plan.one_width is None
    code = code_for(dict.fromkeys(counts, max(counts.values())) if pad else counts, inventory, bool(plan.novices), narrow)
    own: dict[str, str | bytes] = {"README.md": model_card(plan, inventory, notes), PLAN: plan.dumps()}
    if plan.neurons:
        own[f"expertsmith/plan{NEURONS}"] = plan.neuron_bytes()
    own |= passed_on(inventory.checkpoint.path, plan.model.fingerprint)
    files: dict[str, str | bytes] = {**output_texts(plan, inventory, pad), **own, **code, **(texts or {})}
    with progress.task("apply", sum(tensor.nbytes for tensor in tensors), "B") as advance:
        write_checkpoint(
            out,
            tensors,
            config,
            source=inventory.checkpoint,
            texts=files,
            without=SIDE_FILES if decoded else (),
            overwrite=overwrite,
            on_tensor=_Finite(routing_biases(inventory)) if check_values else None,
            progress=advance,
            max_shard=max_shard or MAX_SHARD,
        )
    if merger is not None and requantise:
        notes.append(cost_line("merged experts", merger.codes.error, merger.codes.norm))
        (out / "README.md").write_text(model_card(plan, inventory, notes), encoding="utf-8")
    return notes


def _said_neurons(plan: Plan) -> str:
    """What the result's user must know."""
    if plan.one_width is not None:
        return f"every expert keeps {plan.one_width} of {next(iter(plan.neurons.values())).width} neurons"
    counts = [count for held in plan.neurons.values() for count in held.counts]
    more = "" if width_of(plan) == "ragged" else ", or with transformers and trust_remote_code=True"
    return f"experts keep {min(counts)} to {max(counts)} neurons: load with expertsmith.load(…){more}"


def cost_line(what: str, error: float, norm: float) -> str:
    """A note on the error of requantised weights: sqrt(sum (quantised - float)^2 / sum float^2)."""
    share = (error / norm) ** 0.5 if norm else 0.0
    return f"{what} were re-quantised in the source's own format: they differ from their float values by {share:.2%} (root mean square, relative)"


# dtype → its word, and bits to keep or to flip, after which what is not finite is at least the limit; -inf, where it has one
FINITE_LIMITS: dict[str, tuple[type[np.unsignedinteger[Any]], str, int, int, int | None]] = {
    "BF16": (np.uint16, "keep", 0x7FFF, 0x7F80, 0xFF80),
    "F16": (np.uint16, "keep", 0x7FFF, 0x7C00, 0xFC00),
    "F32": (np.uint32, "keep", 0x7FFFFFFF, 0x7F800000, 0xFF800000),
    "C64": (np.uint32, "keep", 0x7FFFFFFF, 0x7F800000, 0xFF800000),  # two of F32
    "F64": (np.uint64, "keep", 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000, 0xFFF0000000000000),
    "F8_E5M2": (np.uint8, "keep", 0x7F, 0x7C, 0xFC),
    "F8_E4M3": (np.uint8, "keep", 0x7F, 0x7F, None),  # no inf from here on
    "F8_E8M0": (np.uint8, "keep", 0xFF, 0xFF, None),
    "F8_E4M3FNUZ": (np.uint8, "flip", 0x7F, 0xFF, None),  # NaN is 0x80 alone, where others have -0
    "F8_E5M2FNUZ": (np.uint8, "flip", 0x7F, 0xFF, None),
}


class _Finite:
    """Raise on the first chunk that holds NaN or inf. Integers pass, as do packed dtypes and floats of 4 and 6 bits, which have no such codes, and
    -inf in the tensors in which it has a meaning."""

    def __init__(self, may_be_infinite: frozenset[str] = frozenset()) -> None:
        self.may_be_infinite = may_be_infinite
        self.own = threading.local()  # the writer's threads call concurrently

    def __call__(self, tensor: OutputTensor, chunk: memoryview) -> None:
        if tensor.dtype not in FINITE_LIMITS:
            return
        kind, how, bits, limit, infinite = FINITE_LIMITS[tensor.dtype]
        values: np.ndarray[Any, Any] = np.frombuffer(chunk, dtype=kind)
        held = getattr(self.own, "scratch", None)
        if held is None or held.nbytes < values.nbytes:
            held = self.own.scratch = np.empty(values.nbytes, dtype=np.uint8)
        scratch = held[: values.nbytes].view(kind)
        (np.bitwise_and if how == "keep" else np.bitwise_xor)(values, np.asarray(bits, dtype=kind), out=scratch)
        wrong = values.size and int(scratch.max()) >= limit
        if wrong and infinite is not None and tensor.name in self.may_be_infinite:
            wrong = bool(((scratch >= limit) & (values != infinite)).any())
        if wrong:
            raise UserError(f"{tensor.name} has NaN or inf", "the source checkpoint is damaged: download it again")
