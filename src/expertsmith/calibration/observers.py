"""Observe one MoE layer and sum the statistics of every criterion.

Experts run once, on the tokens that the model routes to them, with the ids and weights that the router returned. Padding tokens never
count. Every statistic is a sum, a count or a maximum (float64 or int64), so batches, shards, ranks and domains can be combined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from expertsmith.arch import Architecture
from expertsmith.engine.experts import Slots, flattened_forward, grouped_forward, outputs_of_all
from expertsmith.engine.layout import is_grouped, routing_of, submodule
from expertsmith.engine.walk import Batch
from expertsmith.errors import UserError

MOMENTS_AT_ONCE = 256  # dimensions of the outputs
RATIO_BINS = 1000  # histogram of second / first routing weight over [0, 1]


class Statistic(NamedTuple):
    """Description of one statistic of a layer. Symbols: E experts of the layer, g a routing weight, f an expert's raw output, x the
    residual stream, r the routed output. `option`: the option of `calibrate` that enables it; empty if it is always collected."""

    shape: str
    unit: str
    definition: str
    option: str = ""


ACTIVATION = "activation units"
STATISTICS = {
    "tokens": Statistic("[1]", "tokens", "that passed the layer"),
    "selections": Statistic("[E]", "tokens", "routed to the expert, N"),
    "coselections": Statistic("[E, E]", "tokens", "routed to both experts; the diagonal is N"),
    "weight_sum": Statistic("[E]", "routing weight", "sum of g over the tokens routed to the expert"),
    "weight_sq_sum": Statistic("[E]", "routing weight²", "sum of g²"),
    "score_sum": Statistic("[E]", "router score", "sum of the full router scores (softmax or sigmoid over all experts), routed or not"),
    "norm_sum": Statistic("[E]", ACTIVATION, "sum of raw output norms ‖f‖"),
    "norm_sq_sum": Statistic("[E]", ACTIVATION + "²", "sum of ‖f‖²"),
    "norm_max": Statistic("[E]", ACTIVATION, "largest ‖f‖"),
    "weighted_norm_sum": Statistic("[E]", ACTIVATION, "sum of g‖f‖"),
    "weighted_norm_sq_sum": Statistic("[E]", ACTIVATION + "²", "sum of (g‖f‖)²"),
    "easy_ep": Statistic("[E]", ACTIVATION, "sum of g‖f‖s, s = max(0, 1 - cos(x, x + r)): how much the routed output r changes the direction of the residual stream x"),
    "turn_sum": Statistic("[1]", "1 - cosine", "sum of s over tokens"),
    "ratio_histogram": Statistic(f"[{RATIO_BINS}]", "tokens", "by their second routing weight over their first, in equal bins from 0 to 1"),
    "logit_gram": Statistic("[E, E]", "logit²", "sum of l_i l_j over tokens, l the router's raw logits"),
    "entropy_sum": Statistic("[1]", "nats", "sum over tokens of the entropy of the full router scores, scaled to sum 1"),
    "easy_ep_by_sequence": Statistic("[sequences, E]", ACTIVATION, "easy_ep of every sequence"),
    "output_sum": Statistic("[E, hidden]", ACTIVATION, "sum of raw outputs f over the tokens routed to the expert", "--output-sum, --output-moments"),
    "output_sq_sum": Statistic("[E, hidden]", ACTIVATION + "²", "sum of f² in each dimension, over the same tokens", "--output-moments"),
    "weighted_sq_output_sum": Statistic("[E, hidden]", ACTIVATION, "sum of g²f over the same tokens", "--output-moments"),
    "neuron_sq_sum": Statistic("[E, I]", ACTIVATION + "²", "sum of h² over the tokens routed to the expert, h the hidden activation of a neuron (input of the down projection)", "--neurons"),
    "neuron_grad_sq_sum": Statistic("[E, I]", "(nats / activation unit)²", "sum of (dL/dh)² over the same tokens, L the sum of the next-token losses of all predicted tokens", "--neurons"),
    "neuron_product_sq_sum": Statistic("[E, I]", "nats²", "sum of (h dL/dh)² over the same tokens", "--neurons"),
    "all_output_sum": Statistic("[E, hidden]", ACTIVATION, "sum of raw outputs f(x) over all tokens x, routed to the expert or not", "--all-outputs"),
    "all_scored_output_sum": Statistic("[E, hidden]", ACTIVATION, "sum of s f(x) over all tokens x, s the expert's full router score (softmax or sigmoid over all experts)", "--all-outputs"),
    "sample_inputs": Statistic("[n, hidden]", ACTIVATION, "block inputs of a seeded sample of tokens", "--sample-tokens"),
    "sample_outputs": Statistic("[n, hidden]", ACTIVATION, "routed outputs of the same tokens", "--sample-tokens"),
    "sample_index": Statistic("[n, 2]", "position", "sequence and place in it of the same tokens", "--sample-tokens"),
}  # fmt: skip
SAMPLES = ("sample_inputs", "sample_outputs", "sample_index")


@dataclass(frozen=True)
class Extras:
    """Optional statistics: expert outputs summed over routed tokens (with `output_moments` also their squares, and weighted), or over all
    tokens (which runs every expert on every token), a seeded sample of block inputs and outputs a domain, and sums over neurons that need
    gradients (`neurons`)."""

    output_sum: bool = False
    all_outputs: bool = False
    sample_tokens: int = 0
    seed: int = 42
    output_moments: bool = False
    neurons: bool = False


@dataclass
class LayerSums:
    """The accumulators of one layer: domain → statistic → tensor."""

    num_experts: int
    sequences: dict[str, int]  # domain → number of sequences
    device: torch.device
    extras: Extras = field(default_factory=Extras)
    by_domain: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    chosen: dict[str, set[tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, f64, i64 = self.num_experts, torch.float64, torch.int64
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "tokens": ((), i64), "selections": ((n,), i64), "coselections": ((n, n), i64), "weight_sum": ((n,), f64),
            "weight_sq_sum": ((n,), f64), "score_sum": ((n,), f64), "norm_sum": ((n,), f64), "norm_sq_sum": ((n,), f64),
            "norm_max": ((n,), f64), "weighted_norm_sum": ((n,), f64), "weighted_norm_sq_sum": ((n,), f64), "easy_ep": ((n,), f64),
            "turn_sum": ((), f64), "ratio_histogram": ((RATIO_BINS,), i64), "entropy_sum": ((), f64), "logit_gram": ((n, n), f64),
        }  # fmt: skip
        for domain, count in self.sequences.items():
            sums = {name: torch.zeros(shape, dtype=dtype, device=self.device) for name, (shape, dtype) in shapes.items()}
            sums["easy_ep_by_sequence"] = torch.zeros((count, n), dtype=torch.float32, device=self.device)
            self.by_domain[domain] = sums


@contextmanager
def observing(layer: nn.Module, architecture: Architecture, sums: LayerSums, current: Callable[[], Batch]) -> Iterator[None]:
    """Within the context, add the statistics of a decoder layer to `sums`. `current` returns the running batch."""
    watch = _Watch(layer, architecture, sums, current)
    with ExitStack() as stack:
        for handle in watch.attach():
            stack.callback(handle)
        yield


class _Watch:
    """The hooks on one decoder layer, and the values they share while a batch passes."""

    def __init__(self, layer: nn.Module, architecture: Architecture, sums: LayerSums, current: Callable[[], Batch]) -> None:
        self.layer, self.arch, self.sums, self.current = layer, architecture, sums, current
        self.block = submodule(layer, architecture.block)
        self.router = submodule(self.block, architecture.router)
        self.experts = submodule(self.block, architecture.experts)
        self.residual: torch.Tensor | None = None
        self.router_input: torch.Tensor | None = None
        self.router_output: Any = None
        self.dims = 2  # number of axes of the experts' input

    def attach(self) -> list[Callable[[], None]]:
        """Install the hooks; returns the functions that remove them."""
        arch, removers = self.arch, []
        if arch.residual == "block_input":
            removers.append(self.block.register_forward_pre_hook(self._residual_from_args, with_kwargs=True).remove)
        else:
            norm = submodule(self.layer, arch.norm or "")
            if arch.residual == "norm_input":
                removers.append(norm.register_forward_pre_hook(self._residual_from_args, with_kwargs=True).remove)
            else:
                removers.append(norm.register_forward_hook(self._residual_from_output).remove)
        removers.append(self.router.register_forward_hook(self._keep_router_output).remove)
        if arch.call == "dense_inputs":
            removers.append(self.experts.register_forward_hook(self._dense_experts).remove)
        else:
            self.experts.forward = self._experts_forward
            removers.append(lambda: self.experts.__dict__.pop("forward", None))
        return removers

    def _residual_from_args(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.residual = args[0] if args else kwargs["hidden_states"]

    def _residual_from_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.residual = output

    def _keep_router_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.router_input, self.router_output = (args[0] if args else None), output

    def _experts_forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        selected, weights = routing_of(args, kwargs)
        shape = hidden_states.shape
        self.dims = len(shape)
        x = hidden_states.reshape(-1, shape[-1])
        if is_grouped(self.experts):
            out, slots = grouped_forward(self.experts, x, selected, weights)
        else:
            out, slots = flattened_forward(self.experts, x, selected, weights, self.arch.call == "pairs", shape)
        self._add(x, out, slots, selected.shape[-1])
        return out.reshape(shape)

    def _dense_experts(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Llama-4: every expert gets its own copy of the tokens, scaled by its score; copies scaled by 0 are not routed.

        The weight acts inside the expert, so the output's norm already is "weight x norm" and is used for both statistics.
        """
        scores = self.router_output[0]
        count = self.sums.num_experts
        raw = output.reshape(count, -1, output.shape[-1])
        token, expert = torch.nonzero(scores > 0, as_tuple=True)
        order = torch.argsort(expert, stable=True)
        token, expert = token[order], expert[order]
        top_k = int((scores > 0).sum(-1).max())
        slots = Slots(raw[expert, token], expert, scores[token, expert].float(), token, inside=True)
        assert self.router_input is not None  # the experts' own input is scaled by the scores already
        self._add(self.router_input.reshape(-1, output.shape[-1]), raw.sum(0), slots, top_k)

    @torch.no_grad()
    def _add(self, x: torch.Tensor, out: torch.Tensor, slots: Slots, top_k: int) -> None:
        batch, arch, n = self.current(), self.arch, self.sums.num_experts
        sums = self.sums.by_domain[batch.domain]
        valid = batch.mask.reshape(-1).to(out.device)
        tokens = valid.numel()
        if out.shape[0] != tokens:
            raise UserError(
                f"the MoE block of {arch.model_type} saw {out.shape[0]} tokens, but the batch has {tokens}",
                "please report this family",
            )
        expert, token = slots.expert, slots.token
        counted = valid[token] & (expert < n)
        if arch.unrouted_zero:
            counted &= slots.weight != 0
        weight = slots.weight.abs().double() * counted
        norm = torch.linalg.vector_norm(slots.raw, dim=-1, dtype=torch.float32).double() * counted
        weighted = norm if slots.inside else weight * norm
        turn = self._turn(out).double() * valid
        turned = weighted * turn[token]
        columns = torch.stack((counted.double(), weight, weight**2, norm, norm**2, weighted, weighted**2, turned), dim=-1)
        # slots are sorted by expert; the last segment (no routed expert) is left out. Nothing here waits for the device
        ends = torch.searchsorted(expert, torch.arange(n, device=expert.device), right=True)
        lengths = torch.diff(ends, prepend=ends.new_zeros(1), append=ends.new_full((1,), expert.numel()))
        totals = torch.segment_reduce(columns, "sum", lengths=lengths, axis=0, unsafe=True)[:n]
        names = (
            "weight_sum",
            "weight_sq_sum",
            "norm_sum",
            "norm_sq_sum",
            "weighted_norm_sum",
            "weighted_norm_sq_sum",
            "easy_ep",
        )
        sums["tokens"] += valid.sum()
        sums["selections"] += totals[:, 0].round().long()
        for name, column in zip(names, totals[:, 1:].unbind(-1), strict=True):
            sums[name] += column
        top = torch.segment_reduce(norm, "max", lengths=lengths, initial=0.0, unsafe=True)[:n]
        sums["norm_max"] = torch.maximum(sums["norm_max"], top)
        sums["turn_sum"] += turn.sum()
        # each (token, expert) is written at most once, so the scatters below are deterministic on every device
        hit = torch.zeros(tokens, n + 1, dtype=torch.float32, device=out.device)
        hit[token, torch.where(counted, expert, n)] = 1.0
        hit = hit[:, :n]
        sums["coselections"] += (hit.T @ hit).round().long()
        table = torch.zeros(tokens, n + 1, dtype=torch.float64, device=out.device)
        table[token, expert.clamp(max=n)] = turned
        rows = batch.input_ids.shape[0]
        sums["easy_ep_by_sequence"][batch.sequences] = table[:, :n].reshape(rows, -1, n).sum(1).float()
        if top_k > 1:
            self._add_ratio(sums, slots, counted, valid)
        self._add_scores(sums, valid, n)
        self._add_extras(sums, batch, x, out, slots, counted, lengths)

    @staticmethod
    def _add_ratio(sums: dict[str, torch.Tensor], slots: Slots, counted: torch.Tensor, valid: torch.Tensor) -> None:
        by_token = torch.argsort(slots.token, stable=True)
        per_token = int(slots.token.numel() // valid.numel())
        weights = (slots.weight.abs() * counted)[by_token].reshape(valid.numel(), per_token)
        first, second = weights.topk(2, dim=-1).values.unbind(-1)
        place = (second / first * RATIO_BINS).long().clamp(0, RATIO_BINS - 1)
        place = torch.where(valid & (first > 0), place, RATIO_BINS)  # the last bin is left out
        counts = place.new_zeros(RATIO_BINS + 1).scatter_add_(0, place, torch.ones_like(place))
        sums["ratio_histogram"] += counts[:RATIO_BINS]

    def _add_scores(self, sums: dict[str, torch.Tensor], valid: torch.Tensor, n: int) -> None:
        counts = valid[:, None]
        scores = torch.where(counts, full_scores(self.router_output, self.arch).float(), 0.0)
        sums["score_sum"] += scores[:, :n].sum(0, dtype=torch.float64)
        logits = torch.where(counts, raw_logits(self.router_output, self.arch)[:, :n].double(), 0.0)
        sums["logit_gram"] += logits.T @ logits
        p = scores / scores.sum(-1, keepdim=True).clamp_min(1e-30)
        sums["entropy_sum"] += torch.special.entr(p).sum(dtype=torch.float64)

    def _turn(self, routed: torch.Tensor) -> torch.Tensor:
        """s = 1 - cos(x, x + r) >= 0 of every token (EASY-EP, token contribution), r without shared experts.

        With y = x + r, Lagrange's identity gives 1 - cos = (|x|^2 |r|^2 - (x.r)^2) / (|x||y| (|x||y| + x.y)), without cancellation if
        r is small against x, the usual case. A token with x = 0 or r = 0 has s = 0.
        """
        arch = self.arch
        assert self.residual is not None
        x = self.residual.reshape(-1, self.residual.shape[-1])
        r = routed
        if arch.after_experts:
            r = submodule(self.block, arch.after_experts)(r)
        for owner, name in ((self.block, arch.block_scale), (self.layer, arch.layer_scale)):
            if name:
                r = r * getattr(owner, name)
        if arch.post_norm:
            r = submodule(self.layer, arch.post_norm)(r)
        if arch.residual_scale:
            x = x * getattr(self.layer, arch.residual_scale)
        x, r = x.float(), r.float()
        xx, xr, rr = (torch.linalg.vecdot(a, b).double() for a, b in ((x, x), (x, r), (r, r)))
        yy = (xx + 2 * xr + rr).clamp_min(0)
        length, xy = (xx * yy).sqrt(), xx + xr
        same_side = (xx * rr - xr * xr).clamp_min(0) / (length * (length + xy))
        turn = torch.where(xy > 0, same_side, 1 - xy / length)
        turn = torch.where(length > 0, turn, (xx > 0).double())  # x + r = 0: no direction left, cosine taken as 0
        return torch.where((xx > 0) & (rr > 0), turn, 0.0).clamp(0, 2)

    def _add_extras(
        self, sums: dict[str, torch.Tensor], batch: Batch, x: torch.Tensor, out: torch.Tensor, slots: Slots,
        counted: torch.Tensor, lengths: torch.Tensor,
    ) -> None:  # fmt: skip
        extras = self.sums.extras
        if extras.output_moments:
            for name, total in _moments(slots, counted, lengths).items():
                sums[name] = sums[name] + total if name in sums else total
        elif extras.output_sum:
            raw = slots.raw.float() * counted[:, None]
            total = torch.segment_reduce(raw, "sum", lengths=lengths, axis=0, unsafe=True)[:-1].double()
            sums["output_sum"] = sums["output_sum"] + total if "output_sum" in sums else total
        if extras.all_outputs:
            valid = batch.mask.reshape(-1).to(x.device)
            scores = full_scores(self.router_output, self.arch).float()[valid, : self.sums.num_experts]
            totals = outputs_of_all(self.experts, x[valid], scores, self.arch, self.dims)
            for name, value in zip(("all_output_sum", "all_scored_output_sum"), totals, strict=True):
                sums[name] = sums[name] + value if name in sums else value.clone()
        if extras.sample_tokens:
            wanted = self.sums.chosen[batch.domain]
            length = batch.input_ids.shape[1]
            picks = [(row, s, p) for row, s in enumerate(batch.sequences) for p in range(length) if (s, p) in wanted]
            if picks:
                at = torch.tensor([row * length + p for row, _, p in picks], device=out.device)
                index = torch.tensor([(s, p) for _, s, p in picks], dtype=torch.int64)
                for name, value in (("sample_inputs", x[at]), ("sample_outputs", out[at]), ("sample_index", index)):
                    sums[name] = torch.cat((sums[name], value.cpu())) if name in sums else value.cpu()


def _moments(slots: Slots, counted: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums of f, f² and g²f by expert [E, hidden], in float64: a variance is the small difference of two of them."""
    square = slots.weight.double() ** 2
    names = ("output_sum", "output_sq_sum", "weighted_sq_output_sum")
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for raw in torch.split(slots.raw, MOMENTS_AT_ONCE, dim=-1):  # float64 copies of a few dimensions at a time
        f = torch.where(counted[:, None], raw.double(), 0.0)
        for name, values in zip(names, (f, f * f, square[:, None] * f), strict=True):
            total = torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True)[:-1]
            parts[name].append(total)
    return {name: torch.cat(held, dim=-1) for name, held in parts.items()}


def raw_logits(router_output: Any, architecture: Architecture) -> torch.Tensor:
    """Router logits [tokens, num_experts + extra classes] as the router returned them. If it returns probabilities (Gemma 4): their
    logarithms, which differ from the logits by one constant a token."""
    kind = architecture.router_output
    first: torch.Tensor = router_output if kind == "logits_only" else router_output[1 if kind == "scores_logits" else 0]
    first = first.reshape(-1, first.shape[-1]).float()
    return first.clamp_min(1e-30).log() if kind == "probabilities" else first


def full_scores(router_output: Any, architecture: Architecture) -> torch.Tensor:
    """Scores over all experts [tokens, num_experts + extra classes] from what the router returned."""
    if architecture.router_output == "probabilities":
        return router_output[0].reshape(-1, router_output[0].shape[-1]).float()  # type: ignore[no-any-return]
    return scores_of(raw_logits(router_output, architecture), architecture)


def scores_of(logits: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Full router scores from raw logits, before any bias that acts on the selection."""
    if architecture.score == "sigmoid":
        return logits.sigmoid()
    if architecture.score == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits).sqrt()
    return logits.softmax(-1)


def choose_sample(lengths: Sequence[int], count: int, seed: int, domain: str) -> set[tuple[int, int]]:
    """A seeded sample of (sequence, position) over a domain's tokens, without replacement."""
    import random

    total = sum(lengths)
    places = sorted(random.Random(f"{seed}/sample/{domain}").sample(range(total), min(count, total)))
    chosen, start, sequence = set(), 0, 0
    for place in places:
        while place >= start + lengths[sequence]:
            start += lengths[sequence]
            sequence += 1
        chosen.add((sequence, place - start))
    return chosen
