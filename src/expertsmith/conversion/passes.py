"""One pass of calibration text through a dense model. Every MLP is converted on the inputs from the layers converted before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch

from expertsmith.conversion.split import Split, mlps_of, sparse_forward
from expertsmith.engine import Batch, LoadedModel, Walk
from expertsmith.views.progress import Progress

Decide = Callable[[int, Any, torch.Tensor, torch.Tensor], Split | None]


@torch.no_grad()
def decide_layers(
    model: LoadedModel, batches: Sequence[Batch], decide: Decide, progress: Progress, label: str = "convert"
) -> list[Split | None]:
    """Call `decide(layer, mlp, x, sequences)` for one layer after another; returns the answers.

    mlp, x and sequences are on the CPU, where all decisions are made, on whatever device the model runs. x [tokens, hidden]: the inputs of
    the layer's MLP for all tokens that count; sequences [tokens]: the sequence of each token. The returned split is used for the following
    layers; None leaves the MLP dense.
    """
    mlps = mlps_of(model.layers)
    waiting: dict[int, torch.Tensor] = {}
    made: list[Split | None] = []
    starts = [sum(len(batch.input_ids) for batch in batches[:i]) for i in range(len(batches))]
    masks = [batch.mask.to(model.device) for batch in batches]
    rows = [
        torch.arange(start, start + len(mask), device=model.device)[:, None].expand_as(mask)[mask]
        for start, mask in zip(starts, masks, strict=True)
    ]
    sequences = torch.cat(rows)

    def arrive(index: int, number: int, x: torch.Tensor) -> None:
        waiting[number] = x[masks[number]]

    def instead(index: int, forward: Any, x: torch.Tensor) -> torch.Tensor:
        if len(made) == index:  # all batches have arrived at this MLP, and none has passed it
            inputs = torch.cat([waiting[number] for number in range(len(batches))])
            made.append(decide(index, _on_cpu(mlps[index]), inputs.cpu(), sequences.cpu()))
        split = made[index]
        result: torch.Tensor = forward(x) if split is None else sparse_forward(mlps[index], split, x)
        return result

    tokens = sum(batch.tokens for batch in batches)
    with (
        progress.task(label, tokens * len(mlps), "layer tokens") as advance,
        Walk(model, batches, doors=mlps, arrive=arrive, instead=instead) as walk,
    ):
        for _ in walk.layers():
            advance(tokens)
    return made


def _on_cpu(mlp: Any) -> Any:
    """The MLP, or a copy of its matrices if it is on another device."""
    if mlp.gate_proj.weight.device.type == "cpu":
        return mlp
    parts = {name: deepcopy(getattr(mlp, name)).cpu() for name in ("gate_proj", "up_proj", "down_proj")}
    return SimpleNamespace(act_fn=mlp.act_fn, **parts)
