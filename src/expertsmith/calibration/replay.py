"""The routing of one decoder layer: observed in the model, and re-run from the router's logits with some experts masked.

The re-run uses the family's own forward. Everything before the logits runs on the meta device at no cost, so only what follows
from the logits is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from expertsmith.arch import Architecture, config_get
from expertsmith.engine.experts import run_all
from expertsmith.engine.layout import routing_of, submodule
from expertsmith.experts.rules import Rules


@dataclass
class Seen:
    """The inputs and routing of a batch of T tokens at a layer's experts."""

    x: torch.Tensor  # [T, hidden] inputs of the experts
    logits: torch.Tensor  # [T, E and any extra classes] of the router
    selected: torch.Tensor  # [T, slots]
    weights: torch.Tensor  # [T, slots]
    dims: int  # number of axes of the experts' usual input


# (inputs and routing of a batch, a function that returns its routed output [T, hidden]) → experts [E] to drop for it, or None
Visit = Callable[[Seen, Callable[[], torch.Tensor]], torch.Tensor | None]


def router_extras(arch: Architecture, config: Mapping[str, Any]) -> frozenset[int]:
    """The possible numbers of extra classes of the family's routers (zero experts, skip classes, shared experts)."""
    return frozenset(
        entry.extra if isinstance(entry.extra, int) else int(config_get(config, entry.extra) or 0)
        for entry in arch.stacked
        if entry.role == "router"
    )


class _Reached(Exception):  # noqa: N818  (a signal)
    """The re-run block has reached its experts, with these arguments."""

    def __init__(self, arguments: list[Any]) -> None:
        super().__init__()
        self.arguments = arguments


class _Again(Exception):  # noqa: N818  (a signal)
    """The block must be re-run without these experts."""

    def __init__(self, dropped: torch.Tensor) -> None:
        super().__init__()
        self.dropped = dropped


class RoutedBlock:
    """The loaded router and experts of one decoder layer.

    A re-run uses the router's forward alone if the experts take what it returns, otherwise the block's forward up to its experts.

    Raises (all methods):
        RuntimeError: a router that does not do what the family's record says (a defect of the record).
    """

    def __init__(self, layer: nn.Module, arch: Architecture, rules: Rules, extras: frozenset[int]) -> None:
        self.arch, self.num_experts, self.top_k = arch, rules.num_experts, rules.top_k
        self.block: Any = submodule(layer, arch.block)
        self.router: Any = submodule(self.block, arch.router)
        self.experts: Any = submodule(self.block, arch.experts)
        self._rows = frozenset(self.num_experts + extra for extra in extras)
        self._biases = [_at(self.block, path) for path in arch.selection_bias]
        self._own = {id(value) for value in (*self.block.parameters(), *self.block.buffers())}
        self._logits: torch.Tensor | None = None  # of the batch that was routed last
        self._returned: list[torch.Tensor] = []  # by the router
        self._calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}  # how router and block were called last
        self._forwards: dict[str, Callable[..., Any]] = {}
        self._places: tuple[int, int] | None = None  # of the experts' arguments in `_returned`; None: not among them
        self._ghost: _Ghost | None = None
        self._dropping: torch.Tensor | None = None

    @contextmanager
    def watching(self, visit: Visit) -> Iterator[None]:
        """Within the context, `visit` is called with every batch that reaches the experts."""
        wrapped = {
            "router": (self.router, self._router_forward),
            "experts": (self.experts, partial(self._experts_forward, visit)),
        }
        if self.arch.block:  # otherwise the decoder layer is the block, and its router returns the experts' arguments
            wrapped["block"] = (self.block, self._block_forward)
        with ExitStack() as stack:
            for name, (module, forward) in wrapped.items():
                self._forwards[name] = module.forward
                stack.callback(_restore, module, module.__dict__.get("forward"))
                module.forward = forward
            yield

    def route(self, logits: torch.Tensor, dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Selected experts and routing weights [T, slots] from the router's logits [T, rows], T > 0, without the experts
        `dropped`: [E], or [T, E] for each token separately."""
        found = self._replay(logits, dropped)
        if self.arch.call == "dense_inputs":
            return _chosen(found[0], self.top_k)
        selected, weights = (found[place].reshape(len(logits), -1) for place in self._places or (0, 1))
        return selected, weights

    def outputs(self, seen: Seen, rows: torch.Tensor, columns: int) -> torch.Tensor:
        """The outputs [columns, rows, hidden] of every expert (and zero expert) for the batch's tokens `rows`, before routing weights."""
        x = seen.x[rows]
        if self.arch.call != "dense_inputs":
            return run_all(self.experts, x, columns, self.arch, seen.dims)
        scores = []  # an expert's input is scaled by its score, which does not depend on the others: as if only it could be selected
        for expert in range(columns):
            others = torch.ones(columns, dtype=torch.bool, device=x.device)
            others[expert] = False
            scores.append(self._replay(seen.logits[rows], others)[0][:, expert, None] * x)
        outputs: torch.Tensor = self._forwards["experts"](torch.cat(scores)).reshape(columns, len(rows), -1)
        return outputs

    def columns(self, seen: Seen) -> int:
        """The number of outputs of a token: one for each expert and each zero expert."""
        return self.num_experts if self.arch.unrouted_zero else seen.logits.shape[1]

    def _experts_forward(self, visit: Visit, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._ghost is not None:
            raise _Reached([hidden_states, *args, *kwargs.values()])
        forward = partial(self._forwards["experts"], hidden_states)
        if self._dropping is not None:
            return forward(*args, **kwargs)
        run = cache(partial(forward, *args, **kwargs))
        (router_args, router_kwargs), seen = self._calls["router"], self._seen(hidden_states, args, kwargs)

        def routed() -> torch.Tensor:
            out: torch.Tensor = run().reshape(-1, *seen.x.shape)  # dense_inputs: one output an expert
            return out.sum(0) if len(out) > 1 else out[0]

        dropped = visit(seen, routed)
        if dropped is None:
            return run()
        if self.arch.block:
            raise _Again(dropped)
        with self._without(dropped):
            returned = _tensors(self.router.forward(*router_args, **router_kwargs))
        routing = [*args, *kwargs.values()]
        for place in self._places or ():
            like = next(i for i, value in enumerate(routing[:2]) if value.dtype == returned[place].dtype)
            routing[like] = returned[place].reshape(routing[like].shape)
        return forward(*routing)

    def _seen(self, hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Seen:
        logits = self._logits
        assert logits is not None
        flat = partial(torch.reshape, shape=(logits.shape[0], -1))
        if self.arch.call == "dense_inputs":
            selected, weights = _chosen(self._returned[0], self.top_k)
            return Seen(flat(_hidden(*self._calls["router"])), logits, selected, weights, hidden_states.dim())
        selected, weights = map(flat, routing_of(args, kwargs))
        first, second = self._find(selected), self._find(weights)
        self._places = None if first is None or second is None else (first, second)
        if self._places is None and not self.arch.block:
            raise RuntimeError(f"{type(self.router).__name__} does not return the inputs of the experts")
        return Seen(flat(hidden_states), logits, selected, weights, hidden_states.dim())

    def _find(self, wanted: torch.Tensor) -> int | None:
        for place, found in enumerate(self._returned):
            if (found.dtype, found.numel()) == (wanted.dtype, wanted.numel()) and bool(
                (found.reshape(-1) == wanted.reshape(-1)).all()
            ):
                return place
        return None

    def _block_forward(self, *args: Any, **kwargs: Any) -> Any:
        self._calls["block"] = (args, kwargs)
        try:
            return self._forwards["block"](*args, **kwargs)
        except _Again as again:
            dropped = again.dropped
        with self._without(dropped):
            return self._forwards["block"](*args, **kwargs)

    @contextmanager
    def _without(self, dropped: torch.Tensor) -> Iterator[None]:
        self._dropping = dropped
        try:
            yield
        finally:
            self._dropping = None

    def _router_forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._forwards["router"]
        if self._ghost is not None:
            with self._ghost.routing():
                return forward(*args, **kwargs)
        self._calls["router"] = (args, kwargs)
        with hidden_biases(self._biases, self._dropping), _Logits(self._rows, self._dropping, self.arch.mask_value) as kept:
            result = forward(*args, **kwargs)
        if len(kept.found) != 1:
            raise RuntimeError(f"{type(self.router).__name__}: {len(kept.found)} products look like router logits, expected 1")
        self._logits = kept.found[0].reshape(-1, kept.found[0].shape[-1])
        self._returned = _tensors(result)
        return result

    def _replay(self, logits: torch.Tensor, dropped: torch.Tensor) -> list[torch.Tensor]:
        """The router's return values, or the experts' selection and weights if the block must be re-run."""
        alone = self._places is not None or self.arch.call == "dense_inputs"
        args, kwargs = self._calls["router" if alone else "block"]
        convert = partial(_on_meta, shape=_hidden(args, kwargs).shape[:-1], tokens=len(logits), own=self._own)
        args, kwargs = tuple(map(convert, args)), {name: convert(value) for name, value in kwargs.items()}
        masked = logits.clone()
        masked[:, : self.num_experts].masked_fill_(dropped, self.arch.mask_value)
        ghost = self._ghost = _Ghost(self._rows, masked, self._biases, dropped)
        try:
            with ghost:
                found = _tensors((self._router_forward if alone else self._forwards["block"])(*args, **kwargs))
        except _Reached as reached:
            found = list(routing_of(reached.arguments[1:], {}))
        finally:
            self._ghost = None
        needed = [found[0]] if self.arch.call == "dense_inputs" else [found[place] for place in self._places or (0, 1)]
        if ghost.count != 1 or any(value.is_meta for value in needed):
            raise RuntimeError(f"{type(self.router).__name__}: the routing depends on more than the router's logits")
        return found


@contextmanager
def hidden_biases(biases: list[torch.Tensor], dropped: torch.Tensor | None) -> Iterator[None]:
    """Within the context, every selection bias is -inf at the dropped experts, in place (blocks pass them to routers as arguments)."""
    if dropped is None or not biases:
        yield
        return
    saved = [bias.detach().clone() for bias in biases]
    with torch.no_grad():
        for bias in biases:
            bias.view(-1)[: dropped.numel()].masked_fill_(dropped, float("-inf"))
    try:
        yield
    finally:
        with torch.no_grad():
            for bias, value in zip(biases, saved, strict=True):
                bias.copy_(value)


class _Logits(TorchFunctionMode):
    """While a router runs: record the product whose rows are the experts (and any extra classes after them), and mask `dropped` in it."""

    def __init__(self, rows: frozenset[int], dropped: torch.Tensor | None, value: float) -> None:
        super().__init__()
        self.rows, self.dropped, self.value, self.found = rows, dropped, value, list[torch.Tensor]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_logits(func, args, self.rows):
            self.found.append(out.detach().clone())
            if self.dropped is not None:
                out = out.clone()
                out[..., : self.dropped.numel()].masked_fill_(self.dropped, self.value)
        return out


class _Ghost(TorchFunctionMode):
    """During a re-run of a block: its inputs and everything computed from them are meta tensors, up to the router's logits, which are real.
    A selection bias, or a value computed from it alone, is set to -inf at the dropped experts when it is combined with values of tokens."""

    DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]

    def __init__(self, rows: frozenset[int], logits: torch.Tensor, biases: list[torch.Tensor], dropped: torch.Tensor) -> None:
        super().__init__()
        self.rows, self.logits, self.count, self._in_router = rows, logits, 0, False
        self._biases, self._dropped = (
            list(biases),
            dropped,
        )  # the biases and all values computed from them: kept, so that no id is reused

    @contextmanager
    def routing(self) -> Iterator[None]:
        """While the router's own forward runs."""
        self._in_router = True
        try:
            yield
        finally:
            self._in_router = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == self.DEVICE:
            return self.logits.device  # for what a router creates itself
        if self._in_router and _is_logits(func, args, self.rows):
            self.count += 1
            return self.logits.reshape(*args[0].shape[:-1], self.logits.shape[-1])
        if _any_meta(args) or _any_meta(kwargs.values()):
            if func in (torch.Tensor.to, torch.Tensor.type_as) and not args[0].is_meta:
                return args[0].to(next(value for value in _tensors(args[1:]) if value.is_meta).dtype)
            args, kwargs = _ghostly(args), {name: _ghostly(value) for name, value in kwargs.items()}
        if not any(value is bias for value in args for bias in self._biases):
            return func(*args, **kwargs)
        met = [value for value in _tensors(args) if not any(value is bias for bias in self._biases)]
        if met:
            return func(
                *(self._hidden(value, met[0].shape) if isinstance(value, torch.Tensor) else value for value in args), **kwargs
            )
        made = func(*args, **kwargs)
        self._biases += _tensors(made)
        return made

    def _hidden(self, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A bias for every token, -inf at the token's dropped experts; any other value unchanged."""
        if not any(value is bias for bias in self._biases):
            return value
        count = self._dropped.shape[-1]
        by_token = value.expand(shape).clone()
        gone = self._dropped.expand(len(self.logits), count).reshape(*shape[:-1], count)
        by_token[..., :count].masked_fill_(gone, float("-inf"))
        return by_token


def _is_logits(func: Any, args: tuple[Any, ...], rows: frozenset[int]) -> bool:
    return func is nn.functional.linear and args[1].dim() == 2 and args[1].shape[0] in rows


def _any_meta(values: Any) -> bool:
    for value in values:
        if value.is_meta if isinstance(value, torch.Tensor) else isinstance(value, (tuple, list)) and _any_meta(value):
            return True
    return False


def _ghostly(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    return type(value)(map(_ghostly, value)) if type(value) in (tuple, list) else value


def _on_meta(value: Any, shape: tuple[int, ...], tokens: int, own: set[int]) -> Any:
    """A per-token argument as a meta tensor for another number of tokens; anything else, including parameters, unchanged."""
    if not isinstance(value, torch.Tensor) or id(value) in own:
        return value
    if value.shape[: len(shape)] == shape:
        leading, rest = (*(1 for _ in shape[:-1]), tokens), value.shape[len(shape) :]
    elif value.dim() and value.shape[0] == shape.numel():  # type: ignore[attr-defined]
        leading, rest = (tokens,), value.shape[1:]
    else:
        return value
    return torch.empty((*leading, *rest), dtype=value.dtype, device="meta")


def _chosen(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Selected experts and weights [T, top_k] from scores [T, E] that are 0 for experts not selected. The weight is 1, because the expert's
    output already contains the score; 0 in unused slots."""
    selected = (scores > 0).byte().argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return selected, (scores.gather(1, selected) > 0).double()


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [found for part in value for found in _tensors(part)] if isinstance(value, (tuple, list)) else []


def _at(block: nn.Module, path: str) -> torch.Tensor:
    owner, _, leaf = path.rpartition(".")
    found: torch.Tensor = getattr(submodule(block, owner), leaf)
    return found


def _restore(module: Any, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = forward
