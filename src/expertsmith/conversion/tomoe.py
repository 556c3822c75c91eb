"""The mathematics of ToMoE: a dense LLM as a top-1 MoE by learned neuron masks (Gao et al., arXiv 2501.15316). `training` has the loop.

All weights of the LLM stay frozen. A hypernetwork makes E masks over the neurons of every MLP:

    s = BiGRU(z), z [M, E, 32] fixed noise, the sequence runs over the modules in forward order, the batch over experts; s [M, E, 128]
    q = C GELU(LayerNorm(s))                                          mask logits [E, neurons], a separate decoder C in every layer
    m = round(sigmoid((q + eta G + b) / tau)), straight-through       G = -log Exp(1): P(m = 1) = 1 - exp(-exp(q + b)) at eta = 1
    y = onehot argmax(R x + eta g), straight-through softmax(./tau)   router R [E, hidden], g Gumbel
    MLP(x) = down(act(gate x) * up x * (y m))

Deviations from the authors' code, all of which change numbers: the masks are drawn once per expert and step, and both the quality loss and
the budget use this draw (theirs: once per token); the mask multiplies once (theirs: both factors of the product, so that a dropped neuron
gets no gradient); the noise factor eta is annealed to 0; conversion by ranking instead of one noisy draw; argmax without noise
at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from expertsmith.conversion.attention import AttentionNet, Mode
from expertsmith.conversion.sampling import EMBEDDING, HALF, NOISE, TAU, seeded, straight_through
from expertsmith.conversion.split import Split

FLOOR = 1e-3  # keeps the logarithms of the losses finite


def route(logits: torch.Tensor, noise: torch.Tensor | None, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(straight-through one-hot of the chosen expert [..., E], softmax of the noise-free logits [..., E])."""
    noisy = logits if noise is None else logits + eta * noise
    hard = F.one_hot(noisy.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return straight_through(hard, (noisy / TAU).softmax(-1)), logits.softmax(-1)


class MaskNet(nn.Module):
    """The hypernetwork, and the router, norm and decoder of every MLP. float32.

    Args:
        layers: number of MLPs of the model.
        experts: E; with 1 there is no router, and the mask is static.
        hidden, neurons: width of the residual stream and of the MLPs.
        attention: if attention is pruned too, each layer's attention comes before its MLP in the GRU's sequence.
        head: width of an attention head.
    """

    def __init__(
        self, layers: int, experts: int, hidden: int, neurons: int, seed: int, attention: Mode = "none", head: int = 0
    ) -> None:
        super().__init__()
        self.experts, self.hidden, self.neurons = experts, hidden, neurons
        self.per_layer = 1 if attention == "none" else 2
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(layers * self.per_layer, experts, NOISE, generator=generator)
        self.register_buffer("z", z)  # fixed noise: no gradient
        self.gru = nn.GRU(NOISE, HALF, bidirectional=True)
        self.norms = nn.ModuleList(nn.LayerNorm(EMBEDDING) for _ in range(layers))
        self.decoders = nn.ModuleList(nn.Linear(EMBEDDING, neurons, bias=False) for _ in range(layers))
        self.routers = nn.ModuleList(nn.Linear(hidden, experts, bias=False) for _ in range(layers if experts > 1 else 0))
        seeded(self, generator)
        self.attention: AttentionNet | None = None
        if attention != "none":
            self.attention = AttentionNet(layers, hidden, head, attention == "dynamic", generator)
            self.register_buffer(
                "value_widths", torch.full((layers,), float(head))
            )  # running mean over steps of the mean over tokens

    def embeddings(self) -> torch.Tensor:
        """The embeddings s [M, E, 128]."""
        made: torch.Tensor = self.gru(self.z)[0]
        return made

    def features(self, s: torch.Tensor | None = None) -> list[torch.Tensor]:
        """GELU(LayerNorm(s)) of every MLP, [E, 128]."""
        rows = (self.embeddings() if s is None else s)[self.per_layer - 1 :: self.per_layer]
        return [F.gelu(norm(row)) for norm, row in zip(self.norms, rows, strict=True)]

    def logits(self, s: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The mask logits q of every MLP, [E, neurons]."""
        return [decoder(row) for decoder, row in zip(self.decoders, self.features(s), strict=True)]

    def summaries(self, s: torch.Tensor | None = None) -> torch.Tensor:
        """r of every attention, [layers, 128]: the mean of its s over experts."""
        made: torch.Tensor = (self.embeddings() if s is None else s)[:: self.per_layer].mean(1)
        return made

    @torch.no_grad()
    def start_from(self, targets: Sequence[torch.Tensor], routers: Sequence[torch.Tensor]) -> None:
        """Set the routers' rows, and the decoders such that `logits` returns `targets` ([E, neurons] each; least-norm solution)."""
        for decoder, row, target in zip(self.decoders, self.features(), targets, strict=True):
            solved = torch.linalg.lstsq(row.double(), target.double(), driver="gelsd").solution  # [128, neurons]
            decoder.weight.copy_(solved.T)  # type: ignore[operator]
        for module, rows in zip(self.routers, routers, strict=False):
            module.weight.copy_(rows)  # type: ignore[operator]


@dataclass(frozen=True)
class Losses:
    """Weights of the losses (card ToMoE, section 4 and recipe D).

    kd      2      mean over positions of KL(teacher || student), in nats: the authors' cross-entropy less the teacher's entropy, a constant
    budget  16     |log((r + .001) / (p + .001))|, r the counted share of neurons, p the wanted share
    union   1.5    mean over MLPs of -log((c + .001) / 1.001), c the share of neurons in some expert. The authors' 3 is for a mean over MLPs
                   and attention modules, half of which contribute nothing
    balance 0.05   mean over MLPs of E sum_e f_e P_e, f the share of tokens, P the mean router probability: 1 when balanced. The authors' 1
                   is for sum_e f_e P_e, without E
    """

    kd: float = 2.0
    budget: float = 16.0
    union: float = 1.5
    balance: float = 0.05


def budget_loss(counted: torch.Tensor, wanted: float) -> torch.Tensor:
    """Mean of |log((r + .001) / (p + .001))|: one r for the whole model, or one per layer if all layers have the same width."""
    return torch.log((counted + FLOOR) / (wanted + FLOOR)).abs().mean()


def union_loss(masks: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, coverage c of every MLP): c = mean_i [1 - prod_e (1 - m_e,i)]."""
    coverage = torch.stack([(1 - (1 - m).prod(0)).mean() for m in masks])
    return -torch.log((coverage + FLOOR) / (1 + FLOOR)).mean(), coverage


def balance_loss(hard: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """E sum_e f_e P_e over tokens [N, E]; the gradient goes through P only."""
    share = hard.detach().mean(0)
    return hard.shape[-1] * (share * probabilities.mean(0)).sum()


class ChunkedKL(torch.autograd.Function):
    """The sum over positions of KL(p || q): p from the teacher's last hidden states, q from the student's, with the same output matrix.

    Works on one chunk of positions at a time, so that logits of all positions are never in memory. The gradient is computed in the same
    pass: dKL/dlogits = q - p.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor:
        """Inputs: hidden states [N, hidden] of student and teacher, the output matrix [vocabulary, hidden], positions per chunk."""
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student)
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            log_p = (teacher[part] @ weight.T).float().log_softmax(-1)
            log_q = (student[part] @ weight.T).float().log_softmax(-1)
            p = log_p.exp()
            total += torch.einsum("nv,nv->", p, log_p.sub_(log_q)).double()
            gradient[part] = log_q.exp_().sub_(p).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The stored gradient times the incoming one."""
        (gradient,) = ctx.saved_tensors
        return (grads[0] * gradient).to(gradient.dtype), None, None, None


def layer_widths(
    expected: Sequence[float], neurons: int, ratio: float, equal: bool, align: int, bounds: tuple[float, float] = (0.5, 1.5)
) -> list[int]:
    """The width of an expert in every layer: multiples of `align` whose sum is `ratio` of all neurons, as closely as `align` allows.

    Args:
        expected: expected width per layer, mean over experts; only its proportions count.
        equal: the same width in every layer, so that a checkpoint needs no padding.
        bounds: limits of a layer's width, in units of the mean.
    """
    layers = len(expected)
    if equal:
        return [min(neurons, max(align, round(ratio * neurons / align) * align))] * layers
    mean = ratio * neurons
    low, high = bounds[0] * mean, min(float(neurons), bounds[1] * mean)

    def widths(scale: float) -> list[float]:
        return [min(high, max(low, scale * value)) for value in expected]

    left, right = 0.0, neurons / max(1e-9, min(expected))
    for _ in range(60):  # bisection: the sum increases with the scale
        middle = (left + right) / 2
        left, right = (middle, right) if sum(widths(middle)) < mean * layers else (left, middle)
    wanted = widths(right)
    units = [max(1, int(value // align)) for value in wanted]
    spare = round(mean * layers / align) - sum(units)
    by_rest = sorted(range(layers), key=lambda i: (units[i] * align - wanted[i], i))  # largest remainders first
    for i in by_rest[: max(0, spare)]:
        units[i] += 1
    return [min(neurons - neurons % align or neurons, unit * align) for unit in units]


@torch.no_grad()
def rank_masks(logits: Sequence[torch.Tensor], widths: Sequence[int]) -> list[list[torch.Tensor]]:
    """Every expert's `width` neurons with the highest mask logits, ids ascending; the lower id first on a tie. Deterministic."""
    return [
        [row.argsort(descending=True, stable=True)[:width].sort().values for row in q]
        for q, width in zip(logits, widths, strict=True)
    ]


@torch.no_grad()
def splits_of(net: MaskNet, widths: Sequence[int]) -> list[Split]:
    """The splits from the trained masks, without noise, by ranking (`rank_masks`)."""
    none = torch.zeros(0, dtype=torch.long)
    made = []
    for layer, experts in enumerate(rank_masks([q.cpu() for q in net.logits()], widths)):
        router = (
            cast(torch.Tensor, net.routers[layer].weight).float().cpu().clone()
            if net.experts > 1
            else torch.zeros(1, net.hidden)
        )
        made.append(Split(experts, none, router, 1))
    return made


def mean_jaccard(experts: Sequence[torch.Tensor]) -> float:
    """Mean over pairs of experts of |A and B| / |A or B|; 1 for one static mask."""
    sets = [set(ids.tolist()) for ids in experts]
    pairs = [(a, b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    return sum(len(a & b) / max(1, len(a | b)) for a, b in pairs) / len(pairs) if pairs else 1.0
