"""Train chosen weights of a resident student so that its next-token distributions come close to the teacher's.

    L = (1 / N) sum_t [ kl tau^2 KL(p_t || q_t) + text (-log q_t(next token)) ],    KL over the whole vocabulary

p is the teacher's distribution, q the student's, both at temperature tau in the KL (Router KD, arXiv 2603.02217); N is the number of predicted
tokens in a step. Logits are computed for a few tokens at a time: the hidden states before the head are a leaf that collects their gradients.
The optimizer is AdamW with a linear warm-up, then linear or cosine decay to 0. The held-out loss is measured several times, before the first
step too, and the weights with the lowest one are kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from expertsmith.engine import Batch, LoadedModel
from expertsmith.engine.layout import submodule
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory
from expertsmith.healing.options import Distilled
from expertsmith.healing.work import Work
from expertsmith.healing.written import trainable_router
from expertsmith.surgery.merge import router_tensor
from expertsmith.views.progress import Progress

LOGITS = 2**24  # logits that exist at a time
TRIAL = 5  # a trial of a learning rate has one step for so many of the full run
LOOKS = 10  # times that a run looks at the held-out tokens


class _Captured(Exception):  # noqa: N818  (a signal)
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Headed:
    """A causal LM in two halves: up to the hidden states before the head; and the head, with everything the model does to logits."""

    def __init__(self, model: LoadedModel) -> None:
        self.module: Any = model.module
        self.device = model.device
        place = next(name for name, module in self.module.named_modules() if module is model.layers[0])
        self.base: Any = self.module.get_submodule(place.rsplit(".", 2)[0])  # what holds the list of layers
        self._last: Any = None

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The hidden states before the head, [rows, length, hidden]."""
        forward = type(self.base).forward

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Captured(forward(self.base, *args, **kwargs))

        self.base.forward = stop
        try:
            self.module(**batch.inputs(self.device), use_cache=False)
        except _Captured as captured:
            self._last = captured.output
        finally:
            del self.base.forward
        found: torch.Tensor = self._last[0]
        return found

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits [n, vocabulary] of hidden states [n, hidden]."""
        output = copy.copy(self._last)
        output["last_hidden_state"] = hidden.unsqueeze(0)
        self.base.forward = lambda *args, **kwargs: output
        try:
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
            found: torch.Tensor = self.module(input_ids=ids, use_cache=False).logits[0]
        finally:
            del self.base.forward
        return found


@dataclass
class Distillation:
    """One training run: the weights, the data, the options."""

    student: LoadedModel
    teacher: LoadedModel
    batches: Sequence[Batch]
    held: Sequence[torch.Tensor]
    weights: Mapping[str, nn.Parameter]
    options: Distilled
    work: Work
    progress: Progress
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mine, self._theirs = Headed(self.student), Headed(self.teacher)
        predicted = [batch.mask[:, 1:] & batch.mask[:, :-1] for batch in self.batches]
        self._judged = [mask[:, 1:] & mask[:, :-1] for mask in self.held]
        self._train = [every & ~held[:, 1:] for every, held in zip(predicted, self.held, strict=True)]
        self.steps = max(1, math.ceil(self.options.epochs * sum(int(m.sum()) for m in self._train) / self.options.step_tokens))

    def run(self) -> None:
        """Train, and leave the best weights in the student. An interrupted training resumes from its last held-out measurement."""
        start = {name: weight.detach().clone() for name, weight in self.weights.items()}
        rates = (self.options.learning_rate,) if self.options.learning_rate else self.options.rates
        trial = max(1, self.steps // TRIAL) if len(rates) > 1 else 0
        phases = len(rates) if trial else 0
        tokens = self.options.step_tokens
        facts: dict[str, Any] = {"phase": 0, "step": 0, "trials": [], "best": None, "best_step": 0, "curve": []}
        kept, resumed = start, self.work.state()
        if resumed is not None:
            facts = resumed[1]
            kept = {name: resumed[0][f"kept.{name}"].to(start[name].device) for name in start}
            self.progress.note(f"resuming: step {facts['step']} of training run {facts['phase'] + 1} of {phases + 1}")
        else:
            facts["best"] = self.held_loss()
            facts["curve"].append([0, facts["best"]])
        with self.progress.task("distil", (trial * phases + self.steps) * tokens, "tokens") as advance:
            while facts["phase"] <= phases:
                full = facts["phase"] == phases
                rate = rates[facts["phase"]] if not full else self._chosen(rates, facts["trials"])
                run = self._descend(
                    rate, self.steps if full else trial, LOOKS if full else 1, advance, start, facts["step"], resumed
                )
                resumed = None
                for step, loss, optimizer in run:
                    self.progress.log({"held_out_loss": loss, "learning_rate": rate}, facts["phase"] * self.steps + step)
                    if full:
                        facts["curve"].append([step, loss])
                        if loss < facts["best"]:
                            facts |= {"best": loss, "best_step": step}
                            kept = {name: weight.detach().clone() for name, weight in self.weights.items()}
                    else:
                        facts["trials"].append(loss)
                    ended = step == (self.steps if full else trial)
                    facts |= {"step": 0, "phase": facts["phase"] + 1} if ended else {"step": step}
                    self._keep(kept, facts, optimizer)
        self._set(kept)
        self.report = {
            "learning_rate": self._chosen(rates, facts["trials"]),
            "trials": {f"{rate:g}": loss for rate, loss in zip(rates, facts["trials"], strict=False)},
            "steps": self.steps,
            "tokens_seen": (self.steps + trial * phases) * tokens,
            "trained_parameters": sum(weight.numel() for weight in self.weights.values()),
            "best_step": facts["best_step"],
            "held_out_loss": facts["curve"],
        }

    @staticmethod
    def _chosen(rates: Sequence[float], losses: Sequence[float]) -> float:
        return min(zip(losses, rates, strict=False))[1] if losses else rates[0]

    def _keep(self, kept: Mapping[str, torch.Tensor], facts: Mapping[str, Any], optimizer: torch.optim.AdamW) -> None:
        tensors = {f"kept.{name}": value for name, value in kept.items()}
        for name, weight in self.weights.items():
            state = optimizer.state[weight]
            tensors |= {f"now.{name}": weight, f"first.{name}": state["exp_avg"], f"second.{name}": state["exp_avg_sq"]}
        self.work.save_state(tensors, facts)

    @torch.no_grad()
    def _set(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])

    def _descend(
        self,
        rate: float,
        steps: int,
        looks: int,
        advance: Any,
        start: Mapping[str, torch.Tensor],
        begin: int,
        resumed: tuple[dict[str, torch.Tensor], Any] | None,
    ) -> Iterator[tuple[int, float, torch.optim.AdamW]]:
        """Train from the start weights, or resume at step `begin`; yields (step, held-out loss, optimizer) at every measurement."""
        self._set(start)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        options = self.options
        optimizer = torch.optim.AdamW(self.weights.values(), lr=rate, weight_decay=options.weight_decay)
        if begin and resumed is not None:
            self._set({name: resumed[0][f"now.{name}"] for name in self.weights})
            for name, weight in self.weights.items():
                moments = {"exp_avg": resumed[0][f"first.{name}"], "exp_avg_sq": resumed[0][f"second.{name}"]}
                held = {key: value.to(weight.device) for key, value in moments.items()}
                optimizer.state[weight] = {"step": torch.tensor(float(begin)), **held}
        drawn = self._draw()
        every = max(1, -(-steps // looks))
        warm = max(1, round(options.warmup * steps)) if options.warmup else 0
        for step in range(steps):
            numbers = next(drawn)
            advance(options.step_tokens)
            if step < begin:
                continue
            for group in optimizer.param_groups:
                group["lr"] = rate * self._schedule(step, steps, warm)
            count = sum(int(self._train[number].sum()) for number in numbers)
            for number in numbers:
                self._loss(number, self._train[number], gradients=True, count=count)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % every == 0 or step + 1 == steps:
                yield step + 1, self.held_loss(), optimizer
        for weight in self.weights.values():
            weight.requires_grad_(False)

    def _schedule(self, step: int, steps: int, warm: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        return 0.5 * (1 + math.cos(math.pi * done)) if self.options.cosine else 1 - done

    def _draw(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.options.seed)
        usable = [number for number, mask in enumerate(self._train) if bool(mask.any())]
        if not usable:
            raise UserError("the data is too short to train on", "give more or longer sequences")
        taken: list[int] = []
        while True:
            for place in torch.randperm(len(usable), generator=generator).tolist():
                taken.append(usable[place])
                if sum(int(self._train[number].sum()) for number in taken) >= self.options.step_tokens:
                    yield taken
                    taken = []

    def held_loss(self) -> float:
        """The loss on the held-out tokens."""
        total = count = 0.0
        for number, mask in enumerate(self._judged):
            if bool(mask.any()):
                total += self._loss(number, mask, gradients=False, count=1)
                count += int(mask.sum())
        return total / count

    def _loss(self, number: int, chosen: torch.Tensor, gradients: bool, count: int) -> float:
        """Sum the loss over the chosen predictions of a batch and divide by `count`. With `gradients`, add them to the weights' gradients."""
        batch = self.batches[number]
        chosen = chosen.to(self.student.device)
        targets = batch.input_ids.to(self.student.device)[:, 1:][chosen]
        with torch.no_grad():
            theirs = self._theirs.hidden(batch)[:, :-1][chosen] if self.options.kl else None
        with torch.set_grad_enabled(gradients):
            hidden = self._mine.hidden(batch)
            mine = hidden[:, :-1][chosen]
        leaf = mine.detach().requires_grad_(gradients)
        vocabulary = int(self.student.config.get_text_config().vocab_size)
        rows = max(1, LOGITS // vocabulary)
        total = 0.0
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            with torch.no_grad():
                reference = None if theirs is None else self._theirs.logits(theirs[part]).float()
            with torch.set_grad_enabled(gradients):
                loss = self._objective(self._mine.logits(leaf[part]).float(), reference, targets[part]) / count
                if gradients:
                    torch.autograd.backward(loss, inputs=[leaf])
            total += float(loss.detach())
        if gradients:
            torch.autograd.backward(mine, leaf.grad, inputs=list(self.weights.values()))
        return total

    def _objective(self, mine: torch.Tensor, theirs: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        loss = mine.new_zeros(())
        if theirs is not None:
            tau = self.options.temperature
            p, q = (theirs / tau).log_softmax(-1), (mine / tau).log_softmax(-1)
            terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
            loss = loss + self.options.kl * tau**2 * terms.sum()
        if self.options.text:
            loss = loss + self.options.text * nn.functional.cross_entropy(mine, targets, reduction="sum")
        return loss


def router_weights(student: LoadedModel, inventory: Inventory) -> dict[str, nn.Parameter]:
    """Name → router weights of every MoE layer that gradients reach (biases that only act on the selection are left out)."""
    found: dict[str, nn.Parameter] = {}
    record = inventory.architecture
    for layer in student.moe_layers:
        block = submodule(student.layers[layer], record.block)
        for claim in inventory.by_layer[layer]:
            if trainable_router(claim, inventory):
                weight = router_tensor(block, claim, record)
                if isinstance(weight, nn.Parameter):
                    found[claim.info.name] = weight
    return found
