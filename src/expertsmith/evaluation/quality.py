"""Perplexity on held-out text, and the distance of a model's next-token distributions from a reference's.

Over every predicted token t of a domain, with the reference's distribution p and the model's q, all in float32:
  loss = mean -log q(next token), perplexity = exp(loss);
  kl = mean sum_v p log(p / q), in nats;
  agreement = share of tokens with argmax p = argmax q;
  esap = mean sum_v min(p, q) = 1 - mean total variation (EvoESAP, arXiv 2603.06003).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from expertsmith.engine import Batch, LoadedModel, Walk
from expertsmith.engine.shared_reads import sharing
from expertsmith.errors import UserError
from expertsmith.evaluation.paired import ratio
from expertsmith.ranks import ALONE, Ranks
from expertsmith.views.notebook import Shown
from expertsmith.views.progress import Progress, Silent

ROWS = 1024  # predicted tokens whose full distributions are in memory in float32 at a time


@dataclass
class DomainQuality:
    """The measures of one domain: means per predicted token, named as in the JSON, from sums over batches. Measures that need a reference
    are NaN without one."""

    tokens: int = 0
    loss_sum: float = 0.0
    loss_squares: float = 0.0  # sum of squared losses
    reference_loss_sum: float = 0.0
    kl_sum: float = 0.0
    agreements: int = 0
    esap_sum: float = 0.0
    rises: dict[int, tuple[int, float]] = field(default_factory=dict)  # sequence → tokens, sum of loss - reference_loss

    def add(self, other: DomainQuality) -> None:
        """Add the sums over other tokens of the same domain."""
        self.tokens += other.tokens
        self.loss_sum += other.loss_sum
        self.loss_squares += other.loss_squares
        self.reference_loss_sum += other.reference_loss_sum
        self.kl_sum += other.kl_sum
        self.agreements += other.agreements
        self.esap_sum += other.esap_sum
        self.rises |= other.rises

    def _mean(self, total: float, reference: bool = True) -> float:
        return math.nan if reference and not self.rises else total / max(1, self.tokens)

    @property
    def loss(self) -> float:
        """Mean loss, nats per token."""
        return self._mean(self.loss_sum, reference=False)

    @property
    def loss_se(self) -> float:
        """Standard error of `loss` over tokens."""
        n = max(1, self.tokens)
        return math.sqrt(max(0.0, self.loss_squares / n - self.loss * self.loss) / n)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def reference_loss(self) -> float:
        """Mean loss of the reference, nats per token."""
        return self._mean(self.reference_loss_sum)

    @property
    def reference_perplexity(self) -> float:
        """exp(reference_loss)."""
        return math.exp(min(self.reference_loss, 700.0))

    @property
    def kl(self) -> float:
        """Mean KL divergence from the reference, nats per token."""
        return self._mean(self.kl_sum)

    @property
    def top1_agreement(self) -> float:
        """Share of tokens with the same most probable token as the reference."""
        return self._mean(self.agreements)

    @property
    def agree(self) -> float:
        """`top1_agreement`."""
        return self.top1_agreement

    @property
    def esap(self) -> float:
        """Mean overlap of the distribution with the reference's."""
        return self._mean(self.esap_sum)

    @property
    def rise(self) -> float:
        """Mean loss minus the reference's, nats per token."""
        return (self.loss_sum - self.reference_loss_sum) / max(1, self.tokens)

    @property
    def rise_se(self) -> float:
        """Standard error of `rise` over sequences, paired; see `paired.ratio`."""
        return ratio(list(self.rises.values()))[1]

    def to_json(self, reference: bool) -> dict[str, Any]:
        """The means, with their units as in the module docstring, and the standard errors of the loss and of its rise above the reference's
        (`rise_se` is None for a single sequence)."""
        names = ["tokens", "loss", "loss_se", "perplexity"]
        if not reference:
            return {name: getattr(self, name) for name in names}
        names += ["reference_loss", "reference_perplexity", "rise"]
        error = self.rise_se if len(self.rises) > 1 else None
        rest = {name: getattr(self, name) for name in ("kl", "top1_agreement", "esap")}
        return {**{name: getattr(self, name) for name in names}, "rise_se": error, **rest}


@dataclass(repr=False)
class Quality(Shown):
    """Results by domain, and other measurements (`tasks`, `generation`), as plain data."""

    domains: dict[str, DomainQuality] = field(default_factory=dict)
    has_reference: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss over domains."""
        return float(self.to_json()["mean"]["perplexity"]) if self.domains else math.nan

    def _rows(self) -> list[dict[str, Any]]:
        return [{"domain": name, **entry.to_json(self.has_reference)} for name, entry in self.domains.items()]

    def _line(self) -> str:
        told = [f"{name} perplexity {entry.perplexity:.2f}" for name, entry in self.domains.items()]
        return ", ".join([*told, *self.more])

    def to_json(self) -> dict[str, Any]:
        """Results by domain, their unweighted mean over domains (perplexity: exp of the mean loss; `rise_se`: that of the mean of
        independent domains, sqrt(sum se^2) / domains), and the other measurements."""
        if not self.domains:
            return dict(self.more)
        rows = {name: entry.to_json(self.has_reference) for name, entry in self.domains.items()}
        apart = ("tokens", "perplexity", "reference_perplexity", "loss_se", "rise_se")
        keys = [key for key in next(iter(rows.values())) if key not in apart]
        mean: dict[str, Any] = {key: sum(row[key] for row in rows.values()) / len(rows) for key in keys}
        mean["perplexity"] = math.exp(min(mean["loss"], 700.0))
        if self.has_reference:
            errors = [row["rise_se"] for row in rows.values()]
            mean["rise_se"] = None if None in errors else math.hypot(*errors) / len(errors)
        return {"domains": rows, "mean": mean, **self.more}


def measure(
    model: LoadedModel,
    batches: Sequence[Batch],
    reference: LoadedModel | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Quality:
    """Evaluate `model` on batches (each token of a row predicts the next one), against `reference` if there is one.

    A resident model runs one batch at a time; a streamed model runs all batches through one layer after another. Each of several `ranks`
    runs its share of the batches. The sums of all batches are added in the order of the batches, so the result does not depend on the
    number of ranks.

    Raises:
        UserError: the two models have different vocabularies, or there is no token to predict.
    """
    quality = Quality(has_reference=reference is not None)
    models = [model] if reference is None else [model, reference]
    streamed = any(entry.memory == "stream" for entry in models)
    mine = ranks.share(batches)
    parts: list[DomainQuality] = []
    with (
        sharing(models, ranks) as shared,
        (progress or Silent()).task("evaluate", sum(batch.tokens for batch in mine), "tokens") as advance,
    ):
        groups = [mine] if streamed and (mine or shared) else [[batch] for batch in mine]
        for group in groups:
            _measure_group(model, reference, group, parts, advance)
    for batch, part in zip(batches, ranks.joined(parts), strict=True):
        quality.domains.setdefault(batch.domain, DomainQuality()).add(part)
    if not any(entry.tokens for entry in quality.domains.values()):
        raise UserError("the evaluation data has no tokens to predict", "give longer text")
    return quality


def _measure_group(
    model: LoadedModel, reference: LoadedModel | None, group: list[Batch], parts: list[DomainQuality], advance: Any
) -> None:
    with Walk(model, group) as mine:
        if reference is None:
            for _ in mine.layers():
                pass
            for batch, out in zip(group, mine.outputs(), strict=True):
                parts.append(_of_batch(batch, out.logits, None))
                advance(batch.tokens)
            return
        with Walk(reference, group) as theirs:
            for _ in theirs.layers():
                pass
            for _ in mine.layers():
                pass
            for batch, out, ref in zip(group, mine.outputs(), theirs.outputs(), strict=True):
                if out.logits.shape != ref.logits.shape:
                    raise UserError(
                        f"the model predicts {out.logits.shape[-1]} tokens, the reference {ref.logits.shape[-1]}",
                        "they need the same vocabulary",
                    )
                parts.append(_of_batch(batch, out.logits, ref.logits))
                advance(batch.tokens)


def add_batch(quality: Quality, batch: Batch, logits: torch.Tensor, reference: torch.Tensor | None) -> None:
    """Add the predicted tokens of one batch, from the model's logits and the reference's [rows, length, vocabulary]."""
    quality.domains.setdefault(batch.domain, DomainQuality()).add(_of_batch(batch, logits, reference))


def _of_batch(batch: Batch, logits: torch.Tensor, reference: torch.Tensor | None) -> DomainQuality:
    entry = DomainQuality()
    predicted = (batch.mask[:, 1:] & batch.mask[:, :-1]).to(logits.device)
    targets = batch.input_ids.to(logits.device)[:, 1:][predicted]
    mine = logits[:, :-1][predicted]
    theirs = reference[:, :-1][predicted] if reference is not None else None
    rows = predicted.nonzero()[:, 0]
    rises = torch.zeros(len(batch.sequences), dtype=torch.float64, device=logits.device)
    for start in range(0, targets.numel(), ROWS):
        part = slice(start, start + ROWS)
        q = mine[part].float().log_softmax(-1)
        losses = -q.gather(-1, targets[part, None]).squeeze(-1).double()
        entry.tokens += losses.numel()
        entry.loss_sum += float(losses.sum())
        entry.loss_squares += float((losses**2).sum())
        if theirs is None:
            continue
        p = theirs[part].float().log_softmax(-1)
        reference_losses = -p.gather(-1, targets[part, None]).squeeze(-1).double()
        entry.reference_loss_sum += float(reference_losses.sum())
        rises.index_add_(0, rows[part], losses - reference_losses)
        terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))  # 0 log 0 = 0
        entry.kl_sum += float(terms.sum(dtype=torch.float64))
        entry.agreements += int((p.argmax(-1) == q.argmax(-1)).sum())
        entry.esap_sum += float(torch.minimum(p, q).exp().sum(dtype=torch.float64))
    if theirs is not None:
        counts = torch.bincount(rows, minlength=len(batch.sequences))
        pairs = zip(counts.tolist(), rises.tolist(), strict=True)
        entry.rises = {sequence: pair for sequence, pair in zip(batch.sequences, pairs, strict=True) if pair[0]}
    return entry
