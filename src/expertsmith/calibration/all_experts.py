"""Run every expert on a bounded sample of tokens, with clean inputs. Numbers from the outputs are kept, never the vectors.

The model runs once with its own routing. Every expert also runs on the sampled tokens' inputs to each MoE block ("all
experts, clean input": arXiv 2406.18219 re-runs each layer with top_k set to all, which gives the same outputs with more forward passes).
The output norm and the router score are stored per token and expert. Similarities between experts' outputs are summed over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from expertsmith.calibration.data import TokenData
from expertsmith.calibration.observers import scores_of
from expertsmith.calibration.places import Places, sample_places
from expertsmith.calibration.replay import RoutedBlock, Seen, router_extras
from expertsmith.engine import Batch, LoadedModel, Walk
from expertsmith.engine.experts import flattened_outputs, hidden_of_all, run_all
from expertsmith.engine.layout import is_grouped, submodule
from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules
from expertsmith.views.progress import Progress, Silent

Array = np.ndarray[Any, Any]
AT_ONCE = 2**24  # elements of all experts' outputs in memory at once
WRONG = 0.05  # relative error of the recombined output above which names, hooks or weights do not match the record


@dataclass
class LayerSample:
    """Statistics of all E experts of a layer on T sampled tokens.

    norms [T, E]: output norms before the routing weight; scores [T, E]: the router's full scores before any selection bias; selected [T, k]
    ids (E and above: no routed expert) with weights [T, k]. `output_angular` [M, M], `output_cosine` [M, M]: similarity of outputs, mean
    over tokens; M is E, plus the shared expert (last) if `members` lists it. `angular_by_token` [T]: mean over expert pairs.
    `activation_cosine` [E, E]: similarity of the down projections' inputs, neuron by neuron. `domain`, `sequence` [T]: origin of the
    tokens. `recombined`: largest relative difference between sum(weight * output) and the block's own routed output. `routed_counts`
    [U, E]: how often each distinct token id (`token_ids` [U]) of ALL tokens was routed to each expert; `token_counts` [U].
    """

    layer: int
    num_experts: int
    norms: Array
    scores: Array
    selected: Array
    weights: Array
    output_angular: Array
    output_cosine: Array
    angular_by_token: Array
    activation_cosine: Array
    members: list[str]
    recombined: float
    domain: list[str]
    sequence: Array
    token_ids: Array
    token_counts: Array
    routed_counts: Array


@dataclass
class _Seen:
    """A layer's inputs, routing and outputs for the sampled tokens of all batches, in the order of places."""

    count: int
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    dims: int = 2

    def put(self, name: str, places: torch.Tensor, values: torch.Tensor) -> None:
        if name not in self.parts:
            self.parts[name] = values.new_zeros(self.count, *values.shape[1:])
        self.parts[name][places] = values


def sample_layers(
    model: LoadedModel,
    data: TokenData,
    *,
    rules: dict[int, Rules],
    max_tokens: int,
    batch_tokens: int = 8192,
    seed: int = 42,
    progress: Progress | None = None,
) -> Iterator[LayerSample]:
    """Run the data through the model once; yields every MoE layer's sample of `max_tokens` tokens a domain.

    Raises:
        UserError: no layer with routed experts, or outputs that are not finite.
        RuntimeError: the experts' outputs do not add up to the block's (a defect of the family's record).
    """
    assert model.architecture is not None
    progress = progress or Silent()
    todo = model.moe_layers
    if not todo:
        raise UserError(f"{model.checkpoint.source} has no layer with routed experts")
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    batches = data.batches(batch_tokens, pad_id=pad if isinstance(pad, int) and pad >= 0 else 0)
    places = sample_places(data, batches, max_tokens, seed, model.device)
    extras = router_extras(model.architecture, model.config.get_text_config().to_dict())
    ids, counts = np.unique(np.concatenate([batch.input_ids[batch.mask].numpy() for batch in batches]), return_counts=True)
    made: dict[int, LayerSample] = {}
    watch = ExitStack()
    look: _Look | None = None

    def before(layer: int, number: int, batch: Batch) -> None:
        nonlocal look
        if layer not in todo:
            return
        if number == 0:
            block = RoutedBlock(model.layers[layer], model.architecture, rules[layer], extras)  # type: ignore[arg-type]
            look = _Look(layer, block, places.on(model.places[layer]), ids)
            watch.enter_context(look.watching(model.layers[layer]))
        assert look is not None
        look.number, look.batch = number, batch

    def after(layer: int, number: int, output: Any) -> None:
        nonlocal look
        advance(batches[number].tokens)
        if look is not None and number == len(batches) - 1:
            domains = _domains(batches, places)
            made[layer] = look.finish(domains, counts)
            watch.close()
            look = None

    total = sum(batch.tokens for batch in batches) * (todo[-1] + 1)
    walk = Walk(model, batches, before, after)
    with progress.task("all experts", total, "layer tokens") as advance, watch, walk:
        for layer in walk.layers(until=todo[-1]):
            if layer in made:
                yield made.pop(layer)


def _domains(batches: Sequence[Batch], places: Places) -> list[str]:
    found = [""] * places.count
    for batch, at in zip(batches, places.places, strict=True):
        for place in at.tolist():
            found[place] = batch.domain
    return found


class _Look:
    """Collect one layer's sample while the batches pass."""

    def __init__(self, layer: int, block: RoutedBlock, places: Places, ids: Array) -> None:
        self.layer, self.block, self.places, self.ids = layer, block, places, ids
        self.number, self.batch = 0, Batch(torch.zeros(0, 0), torch.zeros(0, 0), "", [])
        self.seen = _Seen(places.count)
        self.routed = np.zeros((len(ids), block.num_experts), dtype=np.int64)

    @contextmanager
    def watching(self, decoder_layer: nn.Module) -> Iterator[None]:
        arch = self.block.arch
        with ExitStack() as stack:
            stack.enter_context(self.block.watching(self._visit))
            if arch.shared:
                shared = submodule(submodule(decoder_layer, arch.block), arch.shared)
                stack.callback(shared.register_forward_hook(self._shared).remove)
            yield

    def _visit(self, seen: Seen, routed: Callable[[], torch.Tensor]) -> None:
        rows, at = self.places.rows[self.number], self.places.places[self.number]
        put = self.seen.put
        put("x", at, seen.x[rows])
        put("logits", at, seen.logits[rows])
        put("selected", at, seen.selected[rows].long())
        put("weights", at, seen.weights[rows].float())
        put("routed", at, routed()[rows])
        self.seen.dims = seen.dims
        valid = self.batch.mask.reshape(-1)
        tokens = np.searchsorted(self.ids, self.batch.input_ids.reshape(-1)[valid].numpy())
        selected, weights = (value.detach().cpu()[valid].numpy() for value in (seen.selected, seen.weights.float()))
        for slot in range(selected.shape[1]):
            use = selected[:, slot] < self.block.num_experts
            if self.block.arch.unrouted_zero:
                use &= weights[:, slot] != 0
            np.add.at(self.routed, (tokens[use], selected[use, slot]), 1)

    def _shared(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.dim() >= 2:
            flat = output.reshape(-1, output.shape[-1])
            if flat.shape[0] == self.batch.mask.numel():
                self.seen.put("shared", self.places.places[self.number], flat[self.places.rows[self.number]])

    @torch.no_grad()
    def finish(self, domains: list[str], counts: Array) -> LayerSample:
        """Run every expert on the sampled tokens, a few tokens at a time."""
        parts, n = self.seen.parts, self.block.num_experts
        experts, arch, dims = self.block.experts, self.block.arch, self.seen.dims
        shared = parts.get("shared")
        scores = scores_of(parts["logits"].float(), arch)[:, :n].cpu().numpy()
        norms, by_token, errors = [], [], []
        angular: Any = 0.0
        cosine: Any = 0.0
        activation: Any = 0.0
        size = max(1, AT_ONCE // (n * max(parts["x"].shape[1], _neurons(experts))))
        for start in range(0, self.places.count, size):
            part = slice(start, start + size)
            x = parts["x"][part]
            seen = Seen(x, parts["logits"][part], parts["selected"][part], parts["weights"][part], dims)
            columns = self.block.columns(seen)
            every = self.block.outputs(seen, torch.arange(len(x), device=x.device), columns)
            errors.append(_recombined(every, seen, parts["routed"][part]))
            outputs = run_all(experts, x, n, arch, dims) if arch.call == "dense_inputs" else every[:n]
            outputs = outputs.float()
            norms.append(torch.linalg.vector_norm(outputs, dim=-1).T.cpu().numpy())
            if shared is not None and shared.shape[1] == outputs.shape[-1]:
                outputs = torch.cat((outputs, shared[part].float().unsqueeze(0)))
            similar = _cosines(outputs)
            bent = 1 - similar.double().arccos() / torch.pi
            angular = angular + bent.sum(0)
            cosine = cosine + similar.double().sum(0)
            by_token.append(_pair_mean(bent[:, :n, :n]))
            activation = activation + _cosines(_hidden(experts, x, n, self.block, dims).float()).double().sum(0)
        found = np.concatenate(norms)
        if not np.isfinite(found).all():
            raise UserError(
                f"decoder layer {self.layer}: outputs of experts are not finite",
                "the activations overflow in this dtype: try --dtype float32",
            )
        worst = max(errors, default=0.0)
        if worst > WRONG:
            raise RuntimeError(
                f"decoder layer {self.layer}: weighted expert outputs differ from the block's output by {worst:.2g}"
            )
        total = self.places.count
        members = [*map(str, range(n)), *(["shared"] if len(angular) > n else [])]
        return LayerSample(
            self.layer, n, found, scores, parts["selected"].cpu().numpy(), parts["weights"].cpu().numpy(),
            (angular / total).cpu().numpy(), (cosine / total).cpu().numpy(), np.concatenate(by_token), (activation / total).cpu().numpy(),
            members, worst, domains, self.places.sequence.cpu().numpy(), self.ids, counts, self.routed,
        )  # fmt: skip


def _neurons(experts: Any) -> int:
    down = getattr(experts, "down_proj", None)
    return 1 if down is None or down.dim() < 3 else max(down.shape[1:])


def _cosines(values: torch.Tensor) -> torch.Tensor:
    """[t, M, M] cosines between the M vectors of every token, from [M, t, width]; 0 if a vector is zero, 1 on the diagonal."""
    unit = torch.nn.functional.normalize(values, dim=-1).transpose(0, 1)
    found: torch.Tensor = torch.bmm(unit, unit.transpose(1, 2)).clamp(-1, 1)
    found.diagonal(dim1=1, dim2=2).fill_(1.0)
    return found


def _pair_mean(values: torch.Tensor) -> Array:
    """The mean over pairs of different experts, [t]."""
    n = values.shape[1]
    if n < 2:
        return np.full(len(values), np.nan)
    found: Array = ((values.sum((1, 2)) - values.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1))).cpu().numpy()
    return found


def _recombined(every: torch.Tensor, seen: Seen, routed: torch.Tensor) -> float:
    """Relative difference between the sum over slots of weight * output and the block's own routed output, over the given tokens."""
    chosen = every[seen.selected.T, torch.arange(len(seen.x), device=every.device)].float()  # [slots, t, hidden]
    made = (chosen * seen.weights.T.unsqueeze(-1)).sum(0)
    scale = float(torch.linalg.vector_norm(routed.float()))
    return float(torch.linalg.vector_norm(made - routed.float())) / scale if scale else 0.0


def _hidden(experts: Any, x: torch.Tensor, count: int, block: RoutedBlock, dims: int) -> torch.Tensor:
    """The inputs [count, t, neurons] of every expert's down projection. For modules of unknown layout: the operand of their last matrix
    product."""
    if is_grouped(experts):
        return hidden_of_all(experts, x, count)
    if block.arch.call == "dense_inputs":
        with _Products() as products:
            run_all(experts, x, count, block.arch, dims)
        every: torch.Tensor = products.last.reshape(count, len(x), -1)
        return every
    found: list[torch.Tensor] = []
    token = torch.arange(len(x), device=x.device)
    for expert in range(count):
        with _Products() as products:
            flattened_outputs(
                experts, x, token, torch.full_like(token, expert), torch.float32, block.arch.call == "pairs", dims == 3
            )
        found.append(products.last.reshape(-1, products.last.shape[-1])[: len(x)])
    return torch.stack(found)


class _Products(TorchFunctionMode):
    """Record the first operand of the last non-empty matrix product."""

    FUNCTIONS = (torch.nn.functional.linear, torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm)

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.FUNCTIONS and args[0].numel():
            self.last = args[0]
        return func(*args, **(kwargs or {}))
