"""Merged experts: compute their tensors from a checkpoint, and apply the same merge to a loaded model as the reference.

    W_merged = sum over sources i of w_i P_i W_i

with the weights w_i of the plan. With align "weights", P_i is the permutation of source i's neurons that best fits the expert replaced by
the merged one (the identity for that expert itself); otherwise P_i is the identity. Permuting neurons does not change an expert: gate, up
and their biases by rows, down by columns. Sums are taken in float64 and rounded once to the tensor's dtype (the authors of M-SMoE and
HC-SMoE sum in the weights' own dtype).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from expertsmith.arch import Architecture
from expertsmith.arch.base import Layout, roles_of, split
from expertsmith.checkpoint.floats import Floats, bytes_of
from expertsmith.checkpoint.formats import formats
from expertsmith.checkpoint.reader import TORCH_DTYPES, TensorInfo
from expertsmith.checkpoint.writer import Made
from expertsmith.engine import LoadedModel
from expertsmith.engine.layout import in_memory
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Claim, Inventory
from expertsmith.experts.weights import FLOATS, is_matrix, layout_of
from expertsmith.planning.plan import LayerPlan, Merge, Plan

Edit = tuple[torch.Tensor, torch.Tensor]  # a view into a parameter, and its new value


def check_merges(plan: Plan, inventory: Inventory) -> None:
    """Refuse merges that cannot be computed or that the router cannot express.

    Raises:
        UserError: weights that are not plain floats, experts of different expert_groups, or log_count without a logit bias.
    """
    flat = plan.router_groups == "flatten"
    for entry in plan.layers:
        if not entry.merge:
            continue
        groups = 1 if flat else inventory.rules_of(entry.layer).groups
        where, size = f"layer {entry.layer} of the plan", entry.num_experts // groups
        for merge in entry.merge:
            if len({expert // size for expert in merge.sources}) > 1:
                raise UserError(
                    f"{where} merges experts {merge.sources}, which are in different expert_groups of the router",
                    "merge within expert_groups, or plan with --router-groups flatten",
                )
        for claim in inventory.floats.by_layer[entry.layer]:
            if claim.kind in ("expert", "stacked") and claim.info.dtype not in FLOATS:
                raise UserError(
                    f"{claim.info.name} is {claim.info.dtype}, and experts of this dtype cannot be averaged",
                    "please report this checkpoint",
                )
            if claim.routed and layout_of(claim, inventory) is None and any(merge.align != "none" for merge in entry.merge):
                raise UserError(
                    f"{claim.info.name}: unknown expert projection, so its neurons cannot be aligned",
                    "merge with align none",
                )
        if any(merge.log_count for merge in entry.merge):
            _check_log_count(inventory, entry.layer)


def _check_log_count(inventory: Inventory, layer: int) -> None:
    record = inventory.architecture
    reason = ""
    if record.score != "softmax":
        reason = f"its scores are a {record.score} of each logit, so adding ln |c| does not multiply the weight by |c|"
    elif not any(_is_logit_bias(claim, record) for claim in inventory.by_layer[layer]):
        reason = "its router has no logit bias to store it in"
    if reason:
        raise UserError(
            f"log_count is not possible for the {record.model_type} family: {reason}", "plan with -O log_count=false"
        )


def _is_logit_bias(claim: Claim, record: Architecture) -> bool:
    block = f"{record.block}." if record.block else ""
    return claim.rest in [block + path for path in record.logit_bias]


def alignment(matrices: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The order of a target's neurons that best fits a reference: argmax over permutations pi of sum_n K[n, pi(n)] with

        K = W_gate^r (W_gate^t)^T + W_up^r (W_up^t)^T + (W_down^r)^T W_down^t        [neurons, neurons]

    (method card of M-SMoE, D; without the first term for experts without a gate), which minimises the squared distance of the matrices.

    Args:
        matrices: (role, reference's, target's) for each role; gate and up [neurons, inputs], down [outputs, neurons].

    Raises:
        UserError: NaN or inf among them.
    """
    profit: Any = 0.0
    for role, reference, target in matrices:
        # contiguous copies of one dtype on one device: the products do not depend on the matrices' layout
        r, t = (torch.empty(m.shape, dtype=torch.float32).copy_(m) for m in (reference, target))
        profit = profit + (r.T @ t if role == "down" else r @ t.T)
    if not bool(profit.isfinite().all()):
        raise UserError("experts with NaN or inf cannot be aligned", "the checkpoint is damaged; download it again")
    return torch.from_numpy(linear_sum_assignment(profit.numpy(), maximize=True)[1])


def ordered(layout: Layout | None, tensor: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """An expert's slice of a tensor with its neurons in another order; a bias of the down projection is unchanged."""
    if order is None or layout is None:
        return tensor
    result = torch.empty_like(tensor)
    order = order.to(tensor.device)
    for role, view in split(layout, result).items():
        source = split(layout, tensor)[role]
        if role == "down":
            view.copy_(source[:, order] if source.dim() == 2 else source)
        else:
            view.copy_(source[order])
    return result


def average(tensors: Iterable[torch.Tensor], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """sum of w_i x_i in float64, rounded once; `tensors` is consumed one by one."""
    total: Any = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if total is None:
            total = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)
        total.add_(tensor, alpha=weight)
    result: torch.Tensor = total.to(dtype)
    return result


class Merger:
    """Computes the merged pieces of an output checkpoint. Its tensors are those of `inventory`: the source's own, or those of its float
    view. Source experts are read when a piece is requested, one at a time, as floats. Permutations are kept for the last
    decoder layer only.

    Pieces of quantised tensors are codes and scales of the merged weight, requantised.
    """

    def __init__(self, plan: Plan, inventory: Inventory) -> None:
        self.inventory = inventory if isinstance(inventory.checkpoint, Floats) else inventory.floats
        self.codes = Codes(inventory)
        self._merges = {(entry.layer, merge.into): merge for entry in plan.layers for merge in entry.merge}
        self._layer: int | None = None
        self._siblings: dict[tuple[int, str], Claim] = {}
        self._orders: dict[tuple[int, int], torch.Tensor] = {}

    def piece(self, claim: Claim, expert: int) -> Made | None:
        """The new value of a per-expert tensor, or of `expert` in a stacked one; None if the source's bytes are kept."""
        assert claim.layer is not None
        merge = self._merges.get((claim.layer, expert))
        if merge is None or len(merge.sources) == 1:
            return None
        if not claim.routed and merge.router == "dominant" and not self._counts(claim, merge):
            return None
        if self.codes.fixed(claim):
            return None
        share = 1 if claim.kind == "expert" else claim.rows
        rows = 1 if claim.kind == "expert" else self.inventory.experts_in(claim.layer) * claim.rows + claim.extra
        return Made(claim.info.nbytes // rows * share, partial(self._bytes, claim, merge))

    def _counts(self, claim: Claim, merge: Merge) -> bool:
        return merge.log_count and _is_logit_bias(claim, self.inventory.architecture)

    def _bytes(self, claim: Claim, merge: Merge) -> memoryview:
        weight = self.codes.weight(claim)
        if weight is not None:
            return bytes_of(self.codes.piece(claim, merge.into, lambda: self._merged(weight, merge)))
        dtype = _dtype(claim)
        if claim.routed:
            merged = average(self._sources(claim, merge), merge.weights, dtype)
        else:
            rows = (self.inventory.rows(claim, expert) for expert in merge.sources)
            merged = router_row(rows, merge, self._counts(claim, merge), dtype)
        return bytes_of(merged)

    def _merged(self, claim: Claim, merge: Merge) -> torch.Tensor:
        """The merged weight in float32, in the shape of its rows of the tensor."""
        part = average(self._sources(claim, merge), merge.weights, torch.float32)
        return part if claim.kind == "expert" or claim.rows > 1 else part.unsqueeze(0)

    def _sources(self, claim: Claim, merge: Merge) -> Iterator[torch.Tensor]:
        assert claim.layer is not None
        self._enter(claim.layer)
        layout = layout_of(claim, self.inventory)
        for expert in merge.sources:
            part = self.inventory.rows(self._sibling(claim, expert), expert)
            yield ordered(layout, part, self._order(claim.layer, merge, expert))

    def _enter(self, layer: int) -> None:
        if layer != self._layer:
            self._layer = layer
            self._orders.clear()
            held = enumerate(self.inventory.expert_claims(layer))
            self._siblings = {(e, self._below(c)): c for e, claims in held for c in claims if c.kind == "expert"}

    def _below(self, claim: Claim) -> str:
        owned = self.inventory.architecture.expert_of(claim.rest)
        assert owned is not None
        return owned[1]

    def _sibling(self, claim: Claim, expert: int) -> Claim:
        """The tensor of `expert` that corresponds to `claim`."""
        return claim if claim.kind == "stacked" else self._siblings[expert, self._below(claim)]

    def _order(self, layer: int, merge: Merge, expert: int) -> torch.Tensor | None:
        if merge.align == "none" or expert == merge.into:
            return None
        if (merge.into, expert) not in self._orders:
            self._orders[merge.into, expert] = alignment(self._pairs(layer, merge.into, expert))
        return self._orders[merge.into, expert]

    def _pairs(self, layer: int, reference: int, target: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yield (role, reference's matrix, target's matrix), in the order of ROLES."""
        found: dict[str, tuple[Claim, Layout]] = {}
        for claim in self.inventory.expert_claims(layer)[reference]:
            layout = layout_of(claim, self.inventory)
            if is_matrix(claim) and layout is not None:
                found.update(dict.fromkeys(roles_of(layout), (claim, layout)))
        for role in ROLES:
            if role in found:
                claim, layout = found[role]
                mine = self.inventory.rows(claim, reference)
                theirs = self.inventory.rows(self._sibling(claim, target), target)
                yield role, split(layout, mine)[role], split(layout, theirs)[role]


class Codes:
    """The tensors of an inventory that are parts of quantised weights (codes, scales and others), and their values for changed weights."""

    def __init__(self, inventory: Inventory) -> None:
        view = inventory.floats.checkpoint
        self.view = view if isinstance(view, Floats) and not isinstance(inventory.checkpoint, Floats) else None
        stored = self.view.stored.values() if self.view else ()
        by_name = {claim.info.name: claim for claim in inventory.floats.claims} if self.view else {}
        self._weights = {info.name: by_name[entry.name] for entry in stored for info in entry.parts.values()}
        self._made: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
        self.error = self.norm = 0.0  # sums of squares: (quantised - float), float

    def weight(self, claim: Claim) -> Claim | None:
        """The float weight that a tensor is a part of, or None if it is not part of a quantised weight."""
        return self._weights.get(claim.info.name)

    def fixed(self, claim: Claim) -> bool:
        """Whether a tensor does not change with its weight: a shape, or a scale of activations."""
        weight = self.weight(claim)
        if weight is None or self.view is None:
            return False
        entry = self.view.stored[weight.info.name]
        role = next(role for role, info in entry.parts.items() if info.name == claim.info.name)
        return role in formats()[entry.format].constant

    def piece(self, claim: Claim, expert: int, values: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The new value of a tensor (or of an expert's rows of it) if its weight becomes `values`; the last weight's tensors are cached."""
        weight = self.weight(claim)
        assert weight is not None
        assert self.view is not None
        key = (weight.info.name, expert)
        if key not in self._made:
            self._made.clear()
            wanted = values()
            self._made[key] = self.view.encoded(weight.info.name, wanted)
            self.error += float((self.view.rounded(weight.info.name, wanted) - wanted).double().square().sum())
            self.norm += float(wanted.double().square().sum())
        return self._made[key][claim.info.name]


ROLES = ("gate", "up", "down")


def router_row(rows: Iterable[torch.Tensor], merge: Merge, count: bool, dtype: torch.dtype) -> torch.Tensor:
    """The merged expert's entry of a router tensor from its sources' entries: that of `into`, or their mean with the merge's weights
    divided by their sum; plus ln(number of sources) with `count`."""
    if merge.router == "mean":
        total = math.fsum(merge.weights)
        row = average(rows, [weight / total for weight in merge.weights], torch.float64)
    else:
        row = next(row for row, expert in zip(rows, merge.sources, strict=True) if expert == merge.into).double()
    return (row + math.log(len(merge.sources)) if count else row).to(dtype)


def _dtype(claim: Claim | TensorInfo) -> torch.dtype:
    info = claim.info if isinstance(claim, Claim) else claim
    found: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
    return found


@contextmanager
def merged(model: LoadedModel, plan: Plan, inventory: Inventory) -> Iterator[None]:
    """Within the context, the expert `into` of every merge is the merged one: its weights and router entries are computed from the
    model's own tensors, rounded as `inventory` stores them (its dtypes, or its quantisation). The other sources do not change: mask them
    with `surgery.mask.masked`.

    In stream mode a layer is edited whenever it is loaded, and now if it is.

    Raises:
        UserError: what `check_merges` refuses.
        RuntimeError: experts or routers that are not laid out as the family's record says (a defect of the record).
    """
    check_merges(plan, inventory)
    entries = {entry.layer: entry for entry in plan.layers if any(len(merge.sources) > 1 for merge in entry.merge)}
    entries = {layer: entry for layer, entry in entries.items() if layer < len(model.layers)}  # without multi-token prediction
    with ExitStack() as stack:
        if model.memory == "stream" and entries:
            model.whole()
            stack.callback(lambda: model.__dict__.pop("bring", None))
            model.bring = partial(_bring, model.bring, model, entries, inventory)  # type: ignore[method-assign]
        for layer, entry in entries.items():
            if not next(model.layers[layer].parameters()).is_meta:
                stack.callback(_apply(_edits(model, entry, inventory)))
        yield


def _bring(
    bring: Callable[[int], None], model: LoadedModel, entries: dict[int, LayerPlan], inventory: Inventory, index: int
) -> None:
    bring(index)
    if index in entries:
        _apply(_edits(model, entries[index], inventory))


@torch.no_grad()
def _apply(edits: list[Edit]) -> Callable[[], None]:
    saved = [(view, view.clone()) for view, _ in edits]
    for view, value in edits:
        view.copy_(value)
    return partial(_restore, saved)


@torch.no_grad()
def _restore(saved: list[Edit]) -> None:
    for view, value in saved:
        view.copy_(value)


@torch.no_grad()
def _edits(model: LoadedModel, entry: LayerPlan, inventory: Inventory) -> list[Edit]:
    """All edits of one layer, computed before any is made."""
    record = inventory.architecture
    layer = model.layers[entry.layer]
    block = layer.get_submodule(record.block) if record.block else layer
    experts = block.get_submodule(record.experts)
    codes = Codes(inventory)
    made: list[Edit] = []
    for merge in entry.merge:
        if len(merge.sources) == 1:
            continue
        held = {expert: in_memory(experts, record, expert, inventory.experts_in(entry.layer)) for expert in merge.sources}
        mine = held[merge.into]
        orders = {}
        if merge.align != "none":
            for expert in merge.sources:
                pairs = ((role, mine[role, True], held[expert][role, True]) for role in ROLES if (role, True) in mine)
                orders[expert] = alignment(pairs).to(model.device) if expert != merge.into else None
        wanted = {
            (role, matrix): average(
                (_reordered(held[expert][role, matrix], role, orders.get(expert)) for expert in merge.sources),
                merge.weights,
                torch.float32 if codes.view else torch.float64,
            )
            for role, matrix in mine
        }
        for claim in inventory.floats.expert_claims(entry.layer)[merge.into]:
            layout, matrix = layout_of(claim, inventory), is_matrix(claim)
            if layout is None:
                continue
            made += _rounded_edits(claim, layout, matrix, mine, wanted, codes, inventory)
        made += _router_edits(block, merge, entry.layer, inventory)
    return made


def _rounded_edits(
    claim: Claim,
    layout: Layout,
    matrix: bool,
    mine: Mapping[tuple[str, bool], torch.Tensor],
    wanted: Mapping[tuple[str, bool], torch.Tensor],
    codes: Codes,
    inventory: Inventory,
) -> list[Edit]:
    """The edits of the roles in one tensor, rounded as that tensor is stored."""
    roles = [role for role in roles_of(layout) if (role, matrix) in mine]
    if codes.view is None or claim.info.name not in codes.view.stored:
        kind = _dtype(inventory.checkpoint.tensors[claim.info.name])
        return [(mine[role, matrix], wanted[role, matrix].to(kind)) for role in roles]
    lead = claim.info.shape[:1] if claim.kind == "expert" else (claim.rows,)
    part = torch.empty((*lead, *claim.info.shape[1:]))
    slot = part if claim.kind == "expert" or claim.rows > 1 else part[0]
    for role, view in split(layout, slot).items():
        view.copy_(wanted[role, matrix])
    part = codes.view.rounded(claim.info.name, part)
    slot = part if claim.kind == "expert" or claim.rows > 1 else part[0]
    return [(mine[role, matrix], view) for role, view in split(layout, slot).items()]


def _reordered(part: torch.Tensor, role: str, order: torch.Tensor | None) -> torch.Tensor:
    if order is None or (role == "down" and part.dim() == 1):
        return part
    return part[:, order] if role == "down" else part[order]


def _router_edits(block: nn.Module, merge: Merge, layer: int, inventory: Inventory) -> list[Edit]:
    record = inventory.architecture
    made = []
    for claim in inventory.by_layer[layer]:
        if claim.kind != "stacked" or claim.routed:
            continue
        count = merge.log_count and _is_logit_bias(claim, record)
        if merge.router == "dominant" and not count:
            continue
        tensor = router_tensor(block, claim, record)
        tensor = tensor[0] if claim.row_axis else tensor
        rows = (tensor[expert] for expert in merge.sources)
        made.append((tensor[merge.into], router_row(rows, merge, count, _dtype(claim))))
    return made


def router_tensor(block: nn.Module, claim: Claim, record: Architecture) -> torch.Tensor:
    """The parameter or buffer of the router, or of the block itself, that a checkpoint's router tensor is loaded into: the one of the
    same shape; of several, the one with the longest common end of the name."""
    router = block.get_submodule(record.router)
    found = [
        (name, tensor)
        for owner, deep in ((router, True), (block, False))
        for name, tensor in [*owner.named_parameters(recurse=deep), *owner.named_buffers(recurse=deep)]
        if tuple(tensor.shape) == claim.info.shape
    ]
    scored = sorted(((_common(name, claim.rest), tensor) for name, tensor in found), key=lambda pair: -pair[0])
    if not scored or (len(scored) > 1 and scored[0][0] == scored[1][0]):
        raise RuntimeError(f"{claim.info.name}: {len(found)} tensors of {type(router).__name__} match it, expected 1")
    return scored[0][1]


def _common(a: str, b: str) -> int:
    """The number of components that two dotted names have in common at the end."""
    count = 0
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        count += 1
    return count
