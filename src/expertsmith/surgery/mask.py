"""Apply a plan to a loaded model, reversibly: dropped experts cannot be selected, and routing renormalises over the rest.

This defines "the same model without some experts": logits of dropped experts are -inf inside the router's own forward
(a finite value if -inf breaks it), and so are their selection biases. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from expertsmith.arch import Architecture, config_get
from expertsmith.calibration.replay import hidden_biases
from expertsmith.engine import LoadedModel
from expertsmith.engine.skipping import skipping
from expertsmith.surgery.skip import skip_of


@contextmanager
def masked(model: LoadedModel, keep: Mapping[int, Sequence[int]], num_experts: int | Mapping[int, int]) -> Iterator[None]:
    """Within the context, decoder layer l routes only to the experts `keep[l]` of its `num_experts` (one number, or one a layer).

    Raises:
        RuntimeError: a router that does not compute its logits where the family's record says (a defect of the record).
    """
    assert model.architecture is not None
    with ExitStack() as stack:
        for layer, kept in keep.items():
            if layer >= len(model.layers):  # multi-token prediction, which this model was loaded without
                continue
            count = num_experts if isinstance(num_experts, int) else num_experts[layer]
            rows = _router_rows(model, count)
            dropped = torch.ones(count, dtype=torch.bool)
            dropped[list(kept)] = False
            if dropped.any():
                stack.callback(_mask_router(model.layers[layer], model.architecture, dropped, rows))
        yield


@contextmanager
def in_force(model: LoadedModel, counters: dict[int, tuple[int, int]] | None = None) -> Iterator[None]:
    """Within the context, apply the skip thresholds of the model's own config.json, if it has any."""
    found = skip_of(model.checkpoint.config)
    with skipping(model, found[1], found[0], counters) if found else nullcontext():
        yield


def _router_rows(model: LoadedModel, num_experts: int) -> frozenset[int]:
    """Rows that a router weight of this family has: the experts and any extra classes."""
    assert model.architecture is not None
    config = model.config.get_text_config().to_dict()
    extras = [entry.extra for entry in model.architecture.stacked if entry.role == "router"]
    return frozenset(
        num_experts + (extra if isinstance(extra, int) else int(config_get(config, extra) or 0)) for extra in extras
    )


def _mask_router(layer: nn.Module, arch: Architecture, dropped: torch.Tensor, rows: frozenset[int]) -> Callable[[], None]:
    block = layer.get_submodule(arch.block) if arch.block else layer
    router: Any = block.get_submodule(arch.router)
    original = router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        drop = dropped.to(next(router.parameters()).device)
        with hidden_biases(_biases(block, arch), drop), _DropLogits(rows, drop, arch.mask_value) as mode:
            result = original(*args, **kwargs)
        if mode.count != 1:
            raise RuntimeError(f"{type(router).__name__}: {mode.count} products look like router logits, expected 1")
        return result

    router.forward = forward
    return lambda: router.__dict__.pop("forward", None)


def _biases(block: nn.Module, arch: Architecture) -> list[torch.Tensor]:
    found = []
    for path in arch.selection_bias:
        owner, _, leaf = path.rpartition(".")
        found.append(getattr(block.get_submodule(owner) if owner else block, leaf))
    return found


class _DropLogits(TorchFunctionMode):
    """While a router runs: mask the product whose rows are the experts (and any extra classes after them)."""

    def __init__(self, rows: frozenset[int], dropped: torch.Tensor, value: float) -> None:
        super().__init__()
        self.rows, self.dropped, self.value, self.count = rows, dropped, value, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and args[1].dim() == 2 and args[1].shape[0] in self.rows:
            self.count += 1
            out = out.clone()
            out[..., : self.dropped.numel()].masked_fill_(self.dropped, self.value)
        return out
