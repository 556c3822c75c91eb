"""ToMoE's training loop: accelerate for devices, resumable at any saved step, with the same result on CPU whether interrupted or not.

Every random number of a step comes from (seed, step), so the only state is the weights, the optimiser and the step number.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expertsmith.conversion import tomoe
from expertsmith.conversion.attention import Heads, Mode, masked_heads, pruned_heads, sampled
from expertsmith.conversion.sampling import BIAS, gumbel, keep_probability, sample_mask
from expertsmith.conversion.split import Split, activations, mlps_of, sparse
from expertsmith.conversion.tomoe import Losses, MaskNet
from expertsmith.errors import UserError
from expertsmith.views.progress import Progress

ROWS = 256  # positions whose logits over the vocabulary are in memory at a time
STATE = "state.pt"
LOG = "training.jsonl"


@dataclass(frozen=True)
class Recipe:
    """Settings of the mask training. Learning rates have a linear warm-up and cosine decay to 10 %. The noise factor eta is 1 up to 60 % of
    the steps, falls linearly to 0 at 90 %, and stays 0. The budget falls linearly from `first_ratio` to `ratio` over the first 30 %."""

    ratio: float  # wanted share of the MLPs' neurons that a token runs; with attention, of the parameters of attention and MLPs
    steps: int = 300
    experts: int = 8
    batch: int = 1  # sequences per step, over all processes
    seed: int = 42
    lr: float = 2e-3  # decoders and hypernetwork
    router_lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 20
    clip: float = 1.0
    equal: bool = True  # the same width in every layer
    first_ratio: float = 1.0  # 1: start from the dense model; `ratio`: from a start with that budget
    noise: float = 1.0  # eta of the first steps
    attention: Mode = "none"
    attention_share: float = 0.0  # of the parameters of attention and MLPs, if attention is pruned
    losses: Losses = field(default_factory=Losses)
    save_every: int = 20
    watch_every: int = 25

    def at(self, step: int) -> tuple[float, float, float]:
        """(factor on the learning rates, eta, budget) of a step."""
        done = step / max(1, self.steps)
        rate = min(1.0, (step + 1) / max(1, self.warmup)) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        eta = self.noise * min(1.0, max(0.0, (0.9 - done) / 0.3))
        return rate, eta, self.ratio + (self.first_ratio - self.ratio) * max(0.0, 1 - done / 0.3)


class Student(nn.Module):
    """The frozen LLM with masks in its MLPs. It is one module, so that data-parallel training synchronises both routers and masks."""

    def __init__(self, llm: Any, layers: Sequence[nn.Module], net: MaskNet) -> None:
        super().__init__()
        self.net = net
        self._llm = [
            llm
        ]  # in a list, like the layers, so it is no submodule: its frozen weights are not trained, saved or broadcast
        self._layers, self._mlps = list(layers), mlps_of(layers)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, recipe: Recipe, step: int, rank: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(total loss, its parts) of sequences [rows, length]; `mask` marks the tokens that count."""
        _, eta, wanted = recipe.at(step)
        llm = self._llm[0]
        with torch.no_grad():
            teacher = llm.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0][mask]
        shared = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)  # masks: the same on every rank
        own = torch.Generator().manual_seed((recipe.seed * 1_000_003 + step) * 1009 + 1 + rank)
        embeddings = self.net.embeddings()
        masks = [
            sample_mask(q, gumbel(q.shape, shared, q.device) if eta else torch.zeros_like(q), eta)
            for q in self.net.logits(embeddings)
        ]
        heads = None
        if self.net.attention is not None:
            heads = sampled(self.net.attention, self.net.summaries(embeddings), eta, shared, own, mask)
        balance: list[torch.Tensor] = []
        try:
            for layer, mlp in enumerate(self._mlps):
                mlp.forward = self._masked(layer, mlp, masks[layer], mask, eta, own, balance)
            with masked_heads(self._layers, heads.query_key, heads.values) if heads else nullcontext():
                hidden = llm.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0][mask]
        finally:
            for mlp in self._mlps:
                mlp.__dict__.pop("forward", None)
        kl = tomoe.ChunkedKL.apply(hidden, teacher, llm.get_output_embeddings().weight, ROWS) / len(hidden)  # type: ignore[no-untyped-call]
        counted = torch.stack([m.mean() for m in masks])
        union, coverage = tomoe.union_loss(masks)
        even = torch.stack(balance).mean() if balance else kl.new_zeros(())
        if heads and self.net.attention is not None:
            counted = counted.mean()[None] * (1 - recipe.attention_share)
            counted = counted + recipe.attention_share * heads.counted(self.net.attention.width)
            if heads.widths:
                self.net.value_widths.mul_(0.9).add_(0.1 * torch.stack(heads.widths).detach())  # type: ignore[operator]
        weights = recipe.losses
        budget = tomoe.budget_loss(counted if recipe.equal else counted.mean()[None], wanted)
        total = weights.kd * kl + weights.budget * budget + weights.union * union + weights.balance * even
        parts = {
            "kl": kl,
            "budget": budget,
            "union": union,
            "balance": even,
            "ratio": counted.mean(),
            "coverage": coverage.mean(),
        }
        return total, {name: value.detach() for name, value in parts.items()}

    def _masked(
        self,
        layer: int,
        mlp: Any,
        masks: torch.Tensor,
        counts: torch.Tensor,
        eta: float,
        generator: torch.Generator,
        balance: list[Any],
    ) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            a = activations(mlp, x)
            if self.net.experts == 1:
                made: torch.Tensor = mlp.down_proj(a * masks[0].to(a.dtype))
                return made
            logits = self.net.routers[layer](x.float())
            noise = gumbel(logits.shape, generator, logits.device) if eta else None
            y, probabilities = tomoe.route(logits, noise, eta)
            balance.append(tomoe.balance_loss(y[counts], probabilities[counts]))
            routed: torch.Tensor = mlp.down_proj(a * (y @ masks).to(a.dtype))
            return routed

        return forward


@torch.no_grad()
def measured_kl(
    llm: Any,
    layers: Sequence[nn.Module],
    splits: Sequence[Split],
    heads: Sequence[Heads],
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> float:
    """Mean KL to the dense model, in nats per position, of the noise-free model that would be written."""
    total, count = 0.0, 0
    weight = llm.get_output_embeddings().weight
    for ids, mask in batches:
        inputs = {"input_ids": ids.to(weight.device), "attention_mask": mask.long().to(weight.device), "use_cache": False}
        teacher = llm.model(**inputs)[0][mask]
        with sparse(layers, dict(enumerate(splits))), pruned_heads(layers, heads):
            student = llm.model(**inputs)[0][mask]
        total += float(tomoe.ChunkedKL.apply(student, teacher, weight, ROWS))  # type: ignore[no-untyped-call]
        count += len(teacher)
    return total / max(1, count)


@torch.no_grad()
def outcome(net: MaskNet, recipe: Recipe, align: int) -> tuple[list[Split], list[Heads]]:
    """Splits and heads from the current masks: deterministic, by ranking, with widths that meet the budget as closely as `align` allows."""
    noisy = recipe.at(recipe.steps)[1] > 0

    def expected(q: torch.Tensor) -> float:
        kept = keep_probability(q) if noisy else (q + BIAS > 0).float()
        return float(kept.sum(-1).mean())

    ratio, heads = recipe.ratio, []
    if net.attention is not None:
        width, r = net.attention.width, net.summaries()
        step = max(1, width // 16)  # of pairs, so that rows stay multiples of 16 bytes
        pairs = [min(width // 2, max(step, round(expected(q) / step) * step)) for q in net.attention.query_key_logits(r)]
        values = [min(width, max(1, round(float(value)))) for value in net.value_widths]  # type: ignore[union-attr]
        heads = net.attention.heads(r, pairs, values)
        taken = [2 * pair + (value if net.attention.dynamic else width) for pair, value in zip(pairs, values, strict=True)]
        attention = sum(taken) / (2 * width * len(taken))
        ratio = (recipe.ratio - recipe.attention_share * attention) / (1 - recipe.attention_share)
        ratio = min(1.0, max(align / net.neurons, ratio))
    widths = tomoe.layer_widths([expected(q) for q in net.logits()], net.neurons, ratio, recipe.equal, align)
    return tomoe.splits_of(net, widths), heads


def train(
    llm: Any,
    layers: Sequence[nn.Module],
    net: MaskNet,
    recipe: Recipe,
    sequences: Sequence[Sequence[int]],
    watch: Sequence[tuple[torch.Tensor, torch.Tensor]],
    folder: Path,
    *,
    align: int,
    fingerprint: str,
    accelerator: Any,
    progress: Progress,
    resume: bool = True,
) -> None:
    """Train `net` on token sequences; state and log are in `folder`. `outcome` returns the learned splits.

    Args:
        watch: held-out (ids, mask) on which the noise-free model is measured every `watch_every` steps.
        fingerprint: of model, data and everything else that the result depends on; a state with another one is refused.

    Raises:
        UserError: fewer sequences per step than processes, the state of another training in the folder, or a loss that is not finite.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    if recipe.batch < world:
        raise UserError(f"--batch is {recipe.batch}, but there are {world} processes", f"give --batch {world} or more")
    student = Student(llm, layers, net)
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in net.named_parameters() if "routers." not in name], "lr": recipe.lr},
        {"params": [p for name, p in net.named_parameters() if "routers." in name], "lr": recipe.router_lr},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=recipe.weight_decay)
    wrapped, optimizer = accelerator.prepare(student, optimizer)
    identity = {"fingerprint": fingerprint, "recipe": json.loads(json.dumps(asdict(recipe)))}
    first = _restore(folder, identity, net, optimizer, accelerator.device) if resume else 0
    if first:
        progress.note(f"resuming at step {first} of {recipe.steps}")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _cut_log(folder / LOG, first)
    base = [group["lr"] for group in optimizer.param_groups] if not first else [g["lr"] for g in groups if g["params"]]
    tokens_a_step = recipe.batch * max(map(len, sequences))
    with progress.task("train", tokens_a_step * recipe.steps, "tokens") as advance:
        advance(tokens_a_step * first, earlier=True)
        for step in range(first, recipe.steps):
            begin = time.monotonic()
            rate = recipe.at(step)[0]
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * lr
            ids, mask = batch_of(sequences, recipe, step, rank, world)
            loss, parts = wrapped(ids.to(accelerator.device), mask.to(accelerator.device), recipe, step, rank)
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {float(loss)} at step {step}", "use a smaller --lr, or --dtype float32")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(net.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            advance(tokens_a_step)
            if accelerator.is_main_process:
                row: dict[str, Any] = {"step": step + 1, "seconds": round(time.monotonic() - begin, 3)}
                row |= {name: round(float(value), 6) for name, value in parts.items()}
                if (step + 1) % recipe.watch_every == 0 or step + 1 == recipe.steps:
                    row |= _watch(llm, layers, net, recipe, watch, align)
                    progress.note(_sentence(row, recipe))
                with open(folder / LOG, "a", encoding="utf-8") as log:
                    log.write(json.dumps(row) + "\n")
                progress.log({name: value for name, value in row.items() if name != "step"}, step + 1)
                if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
                    _save(folder, identity, net, optimizer, step + 1)


def batch_of(
    sequences: Sequence[Sequence[int]], recipe: Recipe, step: int, rank: int = 0, world: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of one rank's share of a step. Every epoch has each sequence once, in an order drawn from the seed and the epoch."""
    rows = []
    for i in range(step * recipe.batch + rank, (step + 1) * recipe.batch, world):
        epoch, place = divmod(i, len(sequences))
        generator = torch.Generator().manual_seed(recipe.seed * 7919 + epoch)
        rows.append(sequences[int(torch.randperm(len(sequences), generator=generator)[place])])
    return padded(rows)


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of sequences, padded on the right. The mask follows from lengths, never from token ids."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return ids, mask


def _watch(
    llm: Any,
    layers: Sequence[nn.Module],
    net: MaskNet,
    recipe: Recipe,
    watch: Sequence[tuple[torch.Tensor, torch.Tensor]],
    align: int,
) -> dict[str, float]:
    splits, heads = outcome(net, recipe, align)
    overlap = sum(tomoe.mean_jaccard(split.experts) for split in splits) / len(splits)
    return {"kl_written": round(measured_kl(llm, layers, splits, heads, watch), 6), "overlap": round(overlap, 4)}


def _sentence(row: dict[str, Any], recipe: Recipe) -> str:
    return (
        f"step {row['step']}/{recipe.steps}: KL {row['kl']:.3f} with noise, {row['kl_written']:.3f} as written; width {row['ratio']:.3f}, "
        f"coverage {row['coverage']:.3f}, balance {row['balance']:.2f}, expert overlap {row['overlap']:.2f}"
    )


def _save(folder: Path, identity: dict[str, Any], net: MaskNet, optimizer: Any, step: int) -> None:
    part = folder / f"{STATE}.part"
    state = {"identity": json.dumps(identity), "step": step, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
    with open(part, "wb") as stream:  # torch's own writer does not report a full disk
        torch.save(state, stream)
    os.replace(part, folder / STATE)


def _restore(folder: Path, identity: dict[str, Any], net: MaskNet, optimizer: Any, device: torch.device) -> int:
    file = folder / STATE
    if not file.exists():
        return 0
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many types of errors for a damaged file
        raise UserError(f"{file} cannot be read ({type(error).__name__})", "pass --fresh to start again") from None
    theirs = json.loads(state["identity"])
    if theirs != identity:
        keys = [key for key in identity["recipe"] if theirs["recipe"].get(key) != identity["recipe"][key]]
        what = f"other settings ({', '.join(keys)})" if keys else "another model or other data"
        raise UserError(f"{folder} has a training run with {what}", "pass --fresh to start again, or another output")
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _cut_log(file: Path, step: int) -> None:
    """Remove log entries after the step from which the training resumes."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    kept = [line for line in lines if line.strip() and json.loads(line)["step"] <= step]
    file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
