"""Dynamic skipping: a token skips its selected experts with small routing weights, which are then not computed.

"Not All Experts are Equal" (arXiv 2402.14800, ACL 2024), section 3.3 and appendix A.2. With the routing weights of a token sorted,
w_1 >= ... >= w_k (those that multiply the experts' outputs, never the biased scores of the selection), and one threshold per layer:

    ratio (top_k = 2): skip the second expert if w_2 / w_1 < threshold;
    tail: keep the first i experts, with the smallest i >= 1 for which sum_{m>i} w_m / sum_m w_m <= threshold.

At top_k = 2, tail with b / (1 + b) decides like ratio with b, except if w_2 / w_1 is exactly b: `ratio` is strict, as in the authors'
code; `tail` is not, as in appendix A.2. Such ties are frequent with bfloat16 logits, because w_2 / w_1 = exp(logit difference) has few
values.

The kept weights are scaled so that the sum of a token's routing weights does not change. For routers that renormalise over the selected
experts, this is the paper's renormalisation (at top-2 the first weight becomes 1). For other routers, scaling up is our choice, so that
skipping does not shrink the block's output.

Zero experts (ids after the routed experts) cost nothing: they are never skipped, their weights do not change, and rule, sums and counts
include the routed experts only. Both rules divide in float32, here and in the calibration of thresholds, so that a threshold decides the
calibration tokens as counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from expertsmith.arch import Architecture, config_first
from expertsmith.engine.building import layers_of
from expertsmith.engine.experts import flattened_outputs, grouped_outputs
from expertsmith.engine.layout import expert_count, experts_of, has_experts, is_grouped, routing_of, submodule
from expertsmith.engine.loading import LoadedModel
from expertsmith.errors import UserError

Rule = Literal["ratio", "tail"]
Counters = MutableMapping[
    int, tuple[int, int]
]  # decoder layer → (slots that the model would run, slots that ran), of all tokens


def routed_sizes(weights: torch.Tensor, skippable: torch.Tensor | None = None) -> torch.Tensor:
    """|routing weight| of every slot [tokens, top_k], float32; 0 if a slot is not `skippable` (a zero expert)."""
    sizes = weights.abs().float()
    return sizes if skippable is None else sizes.masked_fill(~skippable, 0.0)


def critical_values(sizes: torch.Tensor, rule: Rule) -> torch.Tensor:
    """The values [tokens, top_k - 1], float32, that the rule compares with the threshold, for the 2nd to the last slot of every token.

    `sizes` [tokens, top_k] descending. ratio: w_2 / w_1 (top_k has to be 2). tail: sum_{m>i} w_m / sum_m w_m for i = 1 .. k - 1, which
    falls with i. NaN if a token has no routed expert of weight above 0.
    """
    if rule == "ratio":
        assert sizes.shape[-1] == 2
        return sizes[..., 1:] / sizes[..., :1]
    rest = sizes.flip(-1).cumsum(-1).flip(-1)
    return rest[..., 1:] / rest[..., :1]


def skipped_at(critical: torch.Tensor, rule: Rule, threshold: float) -> torch.Tensor:
    """Whether a critical value is below the threshold (ratio), or at most the threshold (tail); False for NaN."""
    return critical < threshold if rule == "ratio" else critical <= threshold


def keep_slots(weights: torch.Tensor, rule: Rule, threshold: float, skippable: torch.Tensor | None = None) -> torch.Tensor:
    """Which slots of every token to keep [tokens, top_k], bool; at least one each.

    Args:
        weights: routing weights [tokens, top_k], in any order; the rule sorts them by size, equal ones by slot.
        skippable: [tokens, top_k] bool, False for slots that are always kept and that the rule ignores.
    """
    sizes, order = routed_sizes(weights, skippable).sort(dim=-1, descending=True, stable=True)
    drop = torch.zeros_like(sizes, dtype=torch.bool)
    drop[..., 1:] = skipped_at(critical_values(sizes, rule), rule, threshold)
    keep = torch.empty_like(drop).scatter_(-1, order, ~drop)
    return keep if skippable is None else keep | ~skippable


def rescaled_weights(weights: torch.Tensor, keep: torch.Tensor, skippable: torch.Tensor | None = None) -> torch.Tensor:
    """Routing weights times sum_m |w_m| / sum_{m kept} |w_m|, over the skippable slots of each token. If a token keeps all slots, its
    weights do not change, bit for bit. Values at skipped slots have no meaning."""
    sizes = routed_sizes(weights, skippable)
    total = sizes.sum(-1, keepdim=True)
    factor = total / (sizes * keep).sum(-1, keepdim=True)  # exactly 1 if nothing is skipped
    factor = torch.where(total > 0, factor, 1.0)
    if skippable is not None:
        factor = torch.where(skippable, factor, 1.0)
    return (weights.float() * factor).to(weights.dtype)


def skipping_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    active: torch.Tensor,
    *,
    pairs: bool = False,
) -> torch.Tensor:
    """The experts' forward over the active (token, expert) pairs only.

    The pairs are compacted, sorted by expert and computed by grouped matrix products (or by the module's own forward, every pair a
    separate token), weighted, and summed in the order of the slots. With all slots active it is transformers' "grouped_mm" bit for bit.

    Args:
        hidden_states: [tokens, hidden], or [batch, length, hidden] for modules that take that.
        selected, weights, active: [tokens, top_k]; weights as they finally multiply the outputs.
        pairs: the module's own forward needs more than one slot.
    """
    top_k = selected.shape[-1]
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    slots = active.reshape(-1).nonzero().squeeze(-1)
    expert, order = torch.sort(selected.reshape(-1)[slots])
    slots = slots[order]
    token = slots // top_k
    if is_grouped(experts):
        raw = grouped_outputs(experts, x, token, expert)
    else:
        raw = flattened_outputs(experts, x, token, expert, weights.dtype, pairs, hidden_states.dim() == 3)
    weighted = raw * weights.reshape(-1)[slots].unsqueeze(-1)
    every = weighted.new_zeros(active.numel(), weighted.shape[-1])
    every[slots] = weighted
    return every.view(x.shape[0], top_k, -1).sum(dim=1).to(x.dtype).view(hidden_states.shape)


@contextmanager
def skipping(
    model: LoadedModel, thresholds: Mapping[int, float], rule: Rule, counters: Counters | None = None
) -> Iterator[None]:
    """Within the context, the given decoder layers skip experts; their slots are added to `counters`, including padding.

    Raises:
        UserError: as `install`.
    """
    assert model.architecture is not None
    experts = _checked(model.module, model.layers, model.architecture, thresholds, rule)
    before = {layer: module.__dict__.get("forward") for layer, module in experts.items()}
    try:
        for layer, module in experts.items():
            _attach(module, model.architecture, layer, rule, thresholds[layer], counters)
        yield
    finally:
        for layer, module in experts.items():
            module.__dict__.pop("forward", None)
            if before[layer] is not None:
                module.forward = before[layer]


def install(module: nn.Module, architecture: Architecture, thresholds: Mapping[int, float], rule: Rule) -> None:
    """Make a plain transformers model skip experts in the given decoder layers, permanently.

    Raises:
        UserError: an invalid rule, threshold or layer, a model that routes every token to one expert or whose experts take other
            inputs than ids and weights, or weights that are not in memory (offloaded) or spread over processes by expert.
    """
    layers = list(submodule(module, layers_of(module, architecture.layers)))
    for layer, experts in _checked(module, layers, architecture, thresholds, rule).items():
        if any(parameter.is_meta for parameter in experts.parameters()):
            raise UserError(
                f"decoder layer {layer}: the experts' weights are offloaded, but skipping needs them in memory",
                "load the model on a device with enough memory",
            )
        _attach(experts, architecture, layer, rule, thresholds[layer], None)


def _checked(
    module: Any, layers: list[nn.Module], architecture: Architecture, thresholds: Mapping[int, float], rule: str
) -> dict[int, Any]:
    """Check rule, layers and thresholds; return the experts modules of the layers that have a threshold."""
    check_rule(module.config, architecture, rule)
    found = {}
    for layer, threshold in thresholds.items():
        if not 0 <= layer < len(layers) or not has_experts(layers[layer], architecture):
            raise UserError(
                f"decoder layer {layer} has a skip threshold, but no routed experts",
                "remove it: thresholds are for MoE layers",
            )
        if not (math.isfinite(threshold) and threshold >= 0):
            raise UserError(f"decoder layer {layer}: the skip threshold is {threshold}", "it must be at least 0")
        found[layer] = experts_of(layers[layer], architecture)
        if getattr(found[layer], "_is_expert_parallel", False):
            raise UserError(
                f"decoder layer {layer}: the experts are distributed over processes, so no process has all routing weights of a token",
                "skip without expert parallelism",
            )
    return found


def check_rule(config: Any, architecture: Architecture, rule: str) -> None:
    """Refuse a rule by which a model with this transformers config cannot skip.

    Raises:
        UserError: another rule than ratio and tail, one expert a token, experts that take other inputs than ids and weights, or the
            ratio rule if a token has more than two experts.
    """
    if rule not in ("ratio", "tail"):
        raise UserError(f"the skip rule is {rule!r}", "choose ratio or tail")
    kind = architecture.model_type
    if architecture.call == "dense_inputs":
        raise UserError(
            f"{kind}: the router scales the experts' inputs, so experts cannot be skipped by weight",
            "use a model that weights the experts' outputs",
        )
    found = config_first(config.get_text_config().to_dict(), architecture.top_k_key)
    if found is None:
        raise UserError(f"{kind}: the config has no {' or '.join(architecture.top_k_key)}")
    key, top_k = found
    several = top_k if isinstance(top_k, list) else [top_k]
    if min(several) < 2:
        raise UserError(
            f"{kind}: {key} is {top_k}, so a token has no second expert to skip", "skipping needs top_k of at least 2"
        )
    if rule == "ratio" and set(several) != {2}:
        raise UserError(f"{kind}: {key} is {top_k}, but the ratio rule is for two experts per token", "use the rule tail")


def _attach(
    experts: Any, architecture: Architecture, layer: int, rule: Rule, threshold: float, counters: Counters | None
) -> None:
    # a partial with the module as argument, not a closure, so that a deep copy of the model runs its own experts
    pairs = architecture.call == "pairs"
    experts.forward = partial(_forward, experts, expert_count(experts), pairs, rule, threshold, layer, counters)


def _forward(
    experts: Any, count: int, pairs: bool, rule: Rule, threshold: float, layer: int, counters: Counters | None,
    hidden_states: torch.Tensor, *args: Any, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    selected, weights = routing_of(args, kwargs)
    top_k = selected.shape[-1]
    flat, sizes = selected.reshape(-1, top_k), weights.reshape(-1, top_k)
    skippable = None if is_grouped(experts) else flat < count  # grouped modules have no zero experts
    active = keep_slots(sizes, rule, threshold, skippable)
    if counters is not None:
        routed = active.numel() if skippable is None else int(skippable.sum())
        would, ran = counters.get(layer, (0, 0))
        counters[layer] = would + routed, ran + routed - int((~active).sum())
    if bool(active.all()):  # the module's own forward, whichever implementation it is set to
        stock: torch.Tensor = type(experts).forward(experts, hidden_states, *args, **kwargs)
        return stock
    return skipping_forward(experts, hidden_states, flat, rescaled_weights(sizes, active, skippable), active, pairs=pairs)
