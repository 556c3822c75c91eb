"""ToMoE's attention: one static mask over query-key dimensions per layer, and one mask over value-output dimensions per token.

    r = mean over experts of the hypernetwork's s for the attention module                                      [128]
    q_k = last h/2 rows of C GELU(LayerNorm(r)); mask m_k, repeated to [m_k, m_k]: a rotary pair (i, i + h/2) is kept or dropped together
    q_v = first h rows of C GELU(LayerNorm(x R^T + r)); mask m_v of a token, the same in all heads

Queries and keys are masked after the projection (and its bias), before norms and rotary embeddings. Values are masked by their own token's
mask, the attention's output by the query token's. Deviation from the authors' code: the output is masked in training as after conversion.

"static" prunes only queries and keys, which shrinks their matrices. "dynamic" also masks values. The paper counts this as fewer active
parameters, but it saves no arithmetic: value and output projections are computed in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from expertsmith.conversion.sampling import EMBEDDING, gumbel, sample_mask, seeded

Mode = Literal["none", "static", "dynamic"]
Mask = Callable[[torch.Tensor], torch.Tensor | None]  # an attention's input → the mask of its value dimensions


@dataclass
class Heads:
    """The kept dimensions of one attention."""

    kept: torch.Tensor  # query-key dimensions of a head, [first halves of the pairs, second halves], int64
    value_width: int | None = None  # value dimensions a token keeps; None: all
    parts: dict[str, torch.Tensor] | None = None  # with value_width: tensors by their names below the attention

    def query_key(self, width: int) -> torch.Tensor:
        """The query-key mask [width], 0 or 1."""
        return torch.zeros(width).index_fill_(0, self.kept, 1)

    def value_mask(self, x: torch.Tensor) -> torch.Tensor | None:
        """The value mask [..., width], 0 or 1: the `value_width` dimensions with the highest scores. None if all are kept."""
        if self.value_width is None or self.parts is None:
            return None
        part = {name: tensor.to(x.device) for name, tensor in self.parts.items()}
        hidden = F.linear(x.float(), part["vo_router.weight"], part["vo_router.bias"])
        scores = F.linear(
            F.gelu(F.layer_norm(hidden, (EMBEDDING,), part["vo_norm.weight"], part["vo_norm.bias"])), part["vo_decoder.weight"]
        )
        return torch.zeros_like(scores).scatter_(-1, scores.topk(self.value_width, -1).indices, 1)


class AttentionNet(nn.Module):
    """Norm, decoder and (dynamic) router of every attention."""

    def __init__(self, layers: int, hidden: int, width: int, dynamic: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.width, self.dynamic = width, dynamic
        rows = width + width // 2 if dynamic else width // 2
        self.norms = nn.ModuleList(nn.LayerNorm(EMBEDDING) for _ in range(layers))
        self.decoders = nn.ModuleList(nn.Linear(EMBEDDING, rows, bias=False) for _ in range(layers))
        self.routers = nn.ModuleList(nn.Linear(hidden, EMBEDDING, bias=False) for _ in range(layers if dynamic else 0))
        seeded(self, generator)

    def query_key_logits(self, r: torch.Tensor) -> list[torch.Tensor]:
        """q_k [h/2] of every layer, from r [layers, 128]."""
        pairs = self.width // 2
        return [
            F.linear(F.gelu(norm(row)), decoder.weight[-pairs:])  # type: ignore[index]
            for norm, decoder, row in zip(self.norms, self.decoders, r, strict=True)
        ]

    def value_logits(self, layer: int, r: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """q_v [..., h] of one layer for the attention's inputs x."""
        hidden = self.routers[layer](x.float()) + r[layer]
        return F.linear(F.gelu(self.norms[layer](hidden)), self.decoders[layer].weight[: self.width])  # type: ignore[index]

    @torch.no_grad()
    def heads(self, r: torch.Tensor, pairs: Sequence[int], value_widths: Sequence[int]) -> list[Heads]:
        """The dimensions kept by the trained masks: the `pairs` rotary pairs with the highest logits in every layer, and `value_widths`."""
        made = []
        for layer, logits in enumerate(self.query_key_logits(r)):
            first = logits.cpu().argsort(descending=True, stable=True)[: pairs[layer]].sort().values
            kept = torch.cat([first, first + self.width // 2])
            if not self.dynamic:
                made.append(Heads(kept))
                continue
            norm, decoder = self.norms[layer], self.decoders[layer].weight[: self.width]  # type: ignore[index]
            parts = {
                "vo_router.weight": self.routers[layer].weight,
                "vo_router.bias": r[layer],
                "vo_norm.weight": norm.weight,
                "vo_norm.bias": norm.bias,
                "vo_decoder.weight": decoder,
            }
            copies = {name: value.detach().float().cpu().clone() for name, value in parts.items()}  # type: ignore[union-attr,operator]
            made.append(Heads(kept, value_widths[layer], copies))
        return made


def attentions_of(layers: Sequence[nn.Module]) -> list[Any]:
    """The attentions (q_proj, k_proj, v_proj, o_proj, head_dim) of decoder layers."""
    return [layer.self_attn for layer in layers]


@contextmanager
def masked_heads(layers: Sequence[nn.Module], query_key: Sequence[torch.Tensor], values: Sequence[Mask]) -> Iterator[None]:
    """Run attentions with masks: `query_key[layer]` [h] on queries and keys, `values[layer](input)` [..., h] on values and outputs."""
    hooks: list[Any] = []
    now: dict[int, torch.Tensor | None] = {}

    def scale(layer: int, width: int, _: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return _times(output, query_key[layer].to(output), width)

    def value(layer: int, width: int, _: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        now[layer] = mask = values[layer](args[0])
        return output if mask is None else _times(output, mask.to(output.dtype), width)

    def result(layer: int, width: int, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        mask = now[layer]
        return None if mask is None else (_times(args[0], mask.to(args[0].dtype), width), *args[1:])

    try:
        for layer, attention in enumerate(attentions_of(layers)):
            width = attention.head_dim
            hooks += [attention.q_proj.register_forward_hook(partial(scale, layer, width))]
            hooks += [attention.k_proj.register_forward_hook(partial(scale, layer, width))]
            hooks += [attention.v_proj.register_forward_hook(partial(value, layer, width))]
            hooks += [attention.o_proj.register_forward_pre_hook(partial(result, layer, width))]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _times(states: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    """Multiply every head of [..., heads * width] by [..., width]."""
    made: torch.Tensor = states.reshape(*states.shape[:-1], -1, width) * mask[..., None, :]
    return made.flatten(-2)


@contextmanager
def pruned_heads(layers: Sequence[nn.Module], heads: Sequence[Heads]) -> Iterator[None]:
    """Run attentions pruned as in `heads`: the reference for a written checkpoint. Without heads nothing changes."""
    if not heads:
        yield
        return
    widths = [attention.head_dim for attention in attentions_of(layers)]
    masks = [entry.query_key(width) for entry, width in zip(heads, widths, strict=True)]
    with masked_heads(layers, masks, [entry.value_mask for entry in heads]):
        yield


@dataclass
class Sampled:
    """The attention masks of one step, and their widths for the budget."""

    query_key: list[torch.Tensor]  # [h] each, straight-through
    values: list[Mask]
    widths: list[torch.Tensor]  # value width of every layer that has run: mean over tokens

    def counted(self, width: int) -> torch.Tensor:
        """The active share of the attention's matrices: (w_qk + w_vo) / 2h, mean over layers."""
        static = torch.stack([mask.mean() for mask in self.query_key]).mean()
        dynamic = torch.stack(self.widths).mean() / width if self.widths else torch.ones_like(static)
        return (static + dynamic) / 2


def sampled(
    net: AttentionNet, r: torch.Tensor, eta: float, shared: torch.Generator, own: torch.Generator, counts: torch.Tensor
) -> Sampled:
    """Sample masks. Noise for queries and keys is drawn from `shared` (the same on every rank), for values from `own`."""
    logits = net.query_key_logits(r)
    halves = [sample_mask(q, gumbel(q.shape, shared, q.device) if eta else torch.zeros_like(q), eta) for q in logits]
    widths: list[torch.Tensor] = []

    def values(layer: int, x: torch.Tensor) -> torch.Tensor | None:
        if not net.dynamic:
            return None
        q = net.value_logits(layer, r, x)
        mask = sample_mask(q, gumbel(q.shape, own, q.device) if eta else torch.zeros_like(q), eta)
        widths.append(mask[counts].sum(-1).mean())
        return mask

    return Sampled([torch.cat([half, half]) for half in halves], [partial(values, i) for i in range(len(logits))], widths)
