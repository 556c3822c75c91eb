"""How much of a model's next-token distributions is left when something about it is changed, many times with the same text.

ESAP = (1 / T) sum_t sum_v min(p_t(v), q_t(v)), with p the model's own distribution at predicted token t and q the changed model's, both from a
softmax in float32 (EvoESAP, arXiv 2603.06003). It lies in [0, 1] and is 1 - mean total variation.

p is computed once. If all of it takes at most `STORED` bytes, it is stored whole and ESAP is exact. Otherwise the `LISTED` most probable tokens and
the mass of all others are stored, and the others count as one token: then the number is an upper bound of ESAP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from expertsmith.engine import Batch, LoadedModel, Walk
from expertsmith.evaluation.quality import ROWS
from expertsmith.ranks import ALONE, Ranks

STORED = 4 * 2**30  # bytes of float32 distributions, of all ranks together
LISTED = 256

Piece = tuple[
    torch.Tensor, torch.Tensor | None, torch.Tensor | None
]  # probabilities, their token ids, mass of the other tokens


class Overlap:
    """A model's own distributions on some batches, to hold changed ones against.

    A resident model runs one batch at a time; a streamed model runs all batches through one layer after another. Each of several `ranks` runs
    its share of the batches, and the sums are added in the order of the batches.
    """

    def __init__(self, model: LoadedModel, batches: Sequence[Batch], ranks: Ranks = ALONE) -> None:
        self._model, self._ranks, self._mine = model, ranks, ranks.share(batches)
        self.tokens = sum(int(_predicted(batch).sum()) for batch in batches)
        self.exact = True
        self._own: list[list[Piece]] = []  # by batch of this rank
        for logits in self._logits():
            self.exact = self.tokens * logits.shape[-1] * 4 <= STORED
            self._own.append([self._stored(part.float().softmax(-1)) for part in _pieces(logits)])

    def of(self, change: AbstractContextManager[object]) -> float:
        """ESAP of the model within the context `change`."""
        sums = []
        with change:
            for own, logits in zip(self._own, self._logits(), strict=True):
                parts = zip(own, _pieces(logits), strict=True)
                sums.append(sum(_shared(piece, part.float().softmax(-1)) for piece, part in parts))
        return sum(self._ranks.joined(sums)) / max(1, self.tokens)

    def _logits(self) -> Iterator[torch.Tensor]:
        """Logits [predicted tokens, vocabulary] of each batch."""
        groups = [self._mine][: len(self._mine)] if self._model.memory == "stream" else [[batch] for batch in self._mine]
        for group in groups:
            with Walk(self._model, group) as walk:
                for _ in walk.layers():
                    pass
                for batch, out in zip(group, walk.outputs(), strict=True):
                    yield out.logits[:, :-1][_predicted(batch).to(out.logits.device)]

    def _stored(self, p: torch.Tensor) -> Piece:
        if self.exact or p.shape[-1] <= LISTED:
            return p.cpu(), None, None
        values, ids = p.topk(LISTED, dim=-1)
        return values.cpu(), ids.to(torch.int32).cpu(), (1 - values.sum(-1)).clamp_min(0).cpu()


def _predicted(batch: Batch) -> torch.Tensor:
    """[rows, length - 1], True where a token that counts predicts one that counts."""
    return batch.mask[:, 1:] & batch.mask[:, :-1]


def _pieces(logits: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, logits.shape[0], ROWS):
        yield logits[start : start + ROWS]


def _shared(piece: Piece, q: torch.Tensor) -> float:
    """sum_t sum_v min(p, q) over the tokens of a piece."""
    p, ids, rest = (None if part is None else part.to(q.device) for part in piece)
    assert p is not None
    if ids is None or rest is None:
        return float(torch.minimum(p, q).sum(dtype=torch.float64))
    listed = q.gather(-1, ids.long())
    others = torch.minimum(rest, (1 - listed.sum(-1)).clamp_min(0))
    return float(torch.minimum(p, listed).sum(dtype=torch.float64) + others.sum(dtype=torch.float64))
