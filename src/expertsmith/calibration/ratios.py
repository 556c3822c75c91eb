"""Skip thresholds from calibration data: the distribution of a layer's routing weights, and the threshold computed from it.

"Not All Experts are Equal" (arXiv 2402.14800), section 3.3: the threshold of a layer is the median over the calibration tokens of
w_2 / w_1, so that half of the tokens skip their second expert. The rules are those of `engine.skipping`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from expertsmith.calibration.data import TokenData
from expertsmith.engine import Batch, LoadedModel, Walk
from expertsmith.engine.layout import expert_count, experts_of, routing_of
from expertsmith.engine.skipping import Rule, check_rule, critical_values, routed_sizes, skipped_at
from expertsmith.errors import UserError
from expertsmith.views.progress import Progress, Silent

Weights = NDArray[np.float32]  # [tokens, top_k], every row descending
Statistic = Literal["median", "mean", "quantile"]


@dataclass(frozen=True)
class LayerThreshold:
    """The threshold of one layer and its effect on the calibration tokens.

    `why`: "tokens" seen; "median" and "mean" of the value that decides a token's last routed expert (ratio: w_2 / w_1, tail: w_last /
    sum w), and the "quantile" if requested; "skip_rate", the share of all routed slots that is skipped (half of the second experts at
    top-2 is 0.25); "active", the mean number of experts that a token still runs. Neither counts zero experts.
    """

    threshold: float
    why: dict[str, float | int]


def collect_ratios(
    model: LoadedModel, data: TokenData, *, batch_tokens: int = 8192, progress: Progress | None = None
) -> dict[int, Weights]:
    """Routing weights of every MoE layer over the data [tokens, top_k], float32, each row descending, in one pass.

    They are the absolute values of the weights passed to the experts module. Padding is left out. A slot with a zero expert (an id after
    the routed experts, which costs nothing and is never skipped) is 0.

    Raises:
        UserError: no MoE layer, one expert a token, experts that take other inputs than ids and weights, or weights that are not finite.
    """
    arch = model.architecture
    assert arch is not None
    wanted = model.moe_layers
    if not wanted:
        raise UserError(f"{model.checkpoint.source} has no layer with routed experts")
    check_rule(model.config, arch, "tail")
    batches = data.batches(batch_tokens)
    parts: dict[int, list[Weights]] = {layer: [] for layer in wanted}
    now: list[Batch] = []

    def before(layer: int, number: int, batch: Batch) -> None:
        now[:] = [batch]

    def note(layer: int, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        selected, weights = routing_of([*args, *kwargs.values()][1:], {})
        top_k = selected.shape[-1]
        sizes = routed_sizes(weights.reshape(-1, top_k), selected.reshape(-1, top_k) < count)
        valid = now[0].mask.reshape(-1).to(sizes.device)
        parts[layer].append(sizes[valid].sort(dim=-1, descending=True).values.cpu().numpy())

    walk = Walk(model, batches, before)
    total = sum(batch.tokens for batch in batches)
    with (
        (progress or Silent()).task("skip thresholds", total * (max(wanted) + 1), "layer tokens") as advance,
        ExitStack() as hooks,
    ):
        for layer in wanted:
            experts = experts_of(model.layers[layer], arch)

            def hook(_: Any, args: Any, kwargs: Any, layer: int = layer, count: int = expert_count(experts)) -> None:
                note(layer, count, args, kwargs)

            hooks.callback(experts.register_forward_pre_hook(hook, with_kwargs=True).remove)
        with walk:
            for _ in walk.layers(until=max(wanted)):
                advance(total)
    found = {layer: np.concatenate(rows) for layer, rows in parts.items()}
    for layer, rows in found.items():
        if not np.isfinite(rows).all():
            raise UserError(
                f"decoder layer {layer}: routing weights are not finite",
                "the activations overflow in this dtype: try --dtype float32",
            )
    return found


def thresholds(
    weights_by_layer: Mapping[int, Weights],
    rule: Rule,
    *,
    quantile: float = 0.5,
    statistic: Statistic = "median",
    active: float | None = None,
) -> dict[int, LayerThreshold]:
    """One threshold a layer from the weights that `collect_ratios` returns.

    Let r be the value that decides a token's last routed expert: w_2 / w_1 for the rule ratio, w_last / sum w for tail (the tail after
    the last expert is removed; at top_k = 2 its median makes the same decisions as the paper's). The threshold is the median, the mean
    or a quantile of r over the tokens with at least two routed experts of weight above 0, in float32, so that it compares exactly. If r
    equals the threshold, ratio keeps the expert and tail skips it. With an even number of tokens and no tie, the median skips exactly
    half. With ties (bfloat16 logits have many), ratio skips fewer and tail more, by at most the tokens of that value.

    `active` (tail) chooses the smallest threshold at which the mean number of routed experts a token runs, over all tokens, is at most
    `active`. It is an order statistic of all tails, since a token runs 1 + the number of its tails above the threshold. Zero experts
    are not counted. With ties the mean may be lower; `why` has the mean achieved.

    Raises:
        UserError: an unknown statistic or rule, a quantile outside [0, 1], an `active` that cannot be met or with the rule ratio, the rule
            ratio if top_k is not 2, or a layer in which no token has two routed experts.
    """
    if rule not in ("ratio", "tail"):
        raise UserError(f"the skip rule is {rule!r}", "choose ratio or tail")
    if statistic not in ("median", "mean", "quantile"):
        raise UserError(f"the statistic for thresholds is {statistic!r}", "choose median, mean or quantile")
    if not 0 <= quantile <= 1:
        raise UserError(f"the quantile for thresholds is {quantile}", "it must be between 0 and 1")
    if active is not None and rule == "ratio":
        raise UserError(
            "a target for the mean number of active experts needs the rule tail, for more than two experts per token",
            "choose a quantile instead, the share of tokens that skip",
        )
    return {
        layer: _threshold(layer, weights, rule, quantile if statistic == "quantile" else None, statistic, active)
        for layer, weights in weights_by_layer.items()
    }


def _threshold(
    layer: int, weights: Weights, rule: Rule, quantile: float | None, statistic: Statistic, active: float | None
) -> LayerThreshold:
    tokens, top_k = weights.shape
    if rule == "ratio" and top_k != 2:
        raise UserError(
            f"decoder layer {layer}: top_k is {top_k}, but the ratio rule is for two experts per token",
            "use the rule tail",
        )
    if active is not None and not 1 <= active <= top_k:
        raise UserError(
            f"{active:g} active experts of {top_k} per token are impossible", f"choose a number between 1 and {top_k}"
        )
    critical = critical_values(torch.from_numpy(weights), rule).numpy()
    routed = weights > 0
    several = routed[:, 1]
    if not several.any():
        raise UserError(
            f"decoder layer {layer}: no calibration token has a second routed expert",
            "use other data, as there is nothing to skip",
        )
    last = critical[several, routed[several].sum(-1) - 2]
    why: dict[str, float | int] = {
        "tokens": tokens,
        "median": float(np.median(last)),
        "mean": float(np.float32(last.mean(dtype=np.float64))),
    }
    if quantile is not None:
        why["quantile"] = float(np.float32(np.quantile(last, quantile)))
    value = float(why[statistic]) if active is None else _for_active(critical, routed, active)
    skipped = skipped_at(torch.from_numpy(critical), rule, value).numpy() & routed[:, 1:]
    slots = int(routed.sum())
    gone = int(skipped.sum())
    return LayerThreshold(value, why | {"skip_rate": gone / slots, "active": (slots - gone) / tokens})


def _for_active(critical: Weights, routed: NDArray[np.bool_], active: float) -> float:
    """The smallest threshold >= 0 that leaves at most active * tokens slots."""
    tails = np.sort(critical[routed[:, 1:]])[::-1]
    first = int(routed[:, 0].sum())
    room = math.floor(active * len(routed)) - first  # slots after the first that may be kept
    return float(tails[room]) if room < len(tails) else 0.0
