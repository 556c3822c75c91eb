"""How many neurons each expert keeps, from their saliencies. Engines want equal widths: one for the model, or at least one a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from expertsmith.errors import UserError
from expertsmith.methods.base import Array, Natural

ROWS = (
    8  # numbers in 16 bytes of bfloat16: kernels for grouped matrix products (torch's too) read rows of a multiple of 16 bytes
)
STEPS = 8  # the default rounding leaves at least so many widths to choose from, if the experts are wide enough


def rounding(width: int) -> int:
    """The default multiple of widths: the largest power of two from 8 to 64 that divides an expert's width and is at most an eighth of it, or 8."""
    return max(n for n in (8, 16, 32, 64) if n == ROWS or (n <= width // STEPS and width % n == 0))


def cut(
    saliency: Mapping[int, Array],
    keep: float,
    *,
    width: Literal["model", "layer", "ragged"] = "model",
    multiple: Natural = 0,
) -> dict[int, list[int]]:
    """Layer → number of neurons that each expert keeps.

    Args:
        saliency: layer → [experts, neurons].
        keep: the share of all neurons that stays.
        width: "model": one number for all experts of all layers, the only form that stock checkpoints have. "layer": one for the experts of
            a layer; all neurons of the model are ranked together, and a layer's number is the mean of what its experts would keep.
            "ragged": every expert its own, as in that ranking.
        multiple: numbers are rounded to multiples of this; 0: `rounding`. Every expert keeps at least so many.

    Raises:
        UserError: a multiple that is not one of 8 or is larger than an expert, or experts of different widths in layers that need one.
    """
    widths = {layer: values.shape[1] for layer, values in saliency.items()}
    if multiple % ROWS:
        raise UserError(
            f"option multiple is {multiple}, but rows of 16 bytes, which kernels read, have {ROWS} numbers of bfloat16",
            f"give a multiple of {ROWS}",
        )
    steps = {layer: multiple or rounding(held) for layer, held in widths.items()}
    layer = next((n for n, step in steps.items() if step > widths[n]), None)
    if layer is not None:
        raise UserError(
            f"the experts of decoder layer {layer} have {widths[layer]} neurons, which cannot be rounded to multiples of {steps[layer]}",
            "give a smaller multiple" if multiple > ROWS else "use a method that removes experts, e.g. reap",
        )
    if width == "model" and len(set(widths.values())) > 1:
        raise UserError(
            f"the experts have {min(widths.values())} to {max(widths.values())} neurons, which differ between layers",
            "pass -O width=layer",
        )
    if keep == 1:
        return {layer: [widths[layer]] * len(values) for layer, values in saliency.items()}
    return rounded(saliency, keep, width, steps)


def rounded(saliency: Mapping[int, Array], keep: float, width: str, steps: Mapping[int, int]) -> dict[int, list[int]]:
    """`cut` with a multiple for each layer."""
    if width == "model":
        layer, values = next(iter(saliency.items()))
        size, step = values.shape[1], steps[layer]
        count = min(size // step, max(1, int(keep * size / step + 0.5))) * step
        return {layer: [count] * len(values) for layer, values in saliency.items()}
    wanted = ranked(saliency, keep)
    if width == "layer":
        units = [(steps[layer] * len(values), values.shape[1] // steps[layer]) for layer, values in saliency.items()]
        found = shared_out([int(counts.sum()) for counts in wanted.values()], units)
        rows = zip(saliency.items(), found, strict=True)
        return {layer: [parts * steps[layer]] * len(values) for (layer, values), parts in rows}
    places = [(layer, expert) for layer, values in saliency.items() for expert in range(len(values))]
    units = [(steps[layer], saliency[layer].shape[1] // steps[layer]) for layer, _ in places]
    found = shared_out([int(wanted[layer][expert]) for layer, expert in places], units)
    counts: dict[int, list[int]] = {layer: [] for layer in saliency}
    for (layer, _), parts in zip(places, found, strict=True):
        counts[layer].append(parts * steps[layer])
    return counts


def ranked(saliency: Mapping[int, Array], keep: float) -> dict[int, Array]:
    """Layer → neurons [experts] among the int(total * keep) most salient of the model; on a tie the lower layer, expert and neuron."""
    flat = np.concatenate([values.reshape(-1) for values in saliency.values()])
    chosen = np.zeros(flat.size, dtype=bool)
    chosen[np.argsort(-flat, kind="stable")[: int(flat.size * keep)]] = True
    parts = np.split(chosen, np.cumsum([values.size for values in saliency.values()])[:-1])
    return {layer: part.reshape(values.shape).sum(1) for (layer, values), part in zip(saliency.items(), parts, strict=True)}


def shared_out(wanted: Sequence[int], units: Sequence[tuple[int, int]]) -> list[int]:
    """Units for each of several parties, at least one and at most its own limit each; the total is that of `wanted`, or as little below as the
    units allow. Each gets the whole units in what it wants. Then those that lack most of the next unit get one more; or, if the least that
    every party has is too much in all, those that lack least lose one.

    Args:
        units: (size of a unit, largest number of units) of each.
    """
    found = [min(most, max(1, count // size)) for count, (size, most) in zip(wanted, units, strict=True)]
    left = sum(wanted) - sum(parts * size for parts, (size, _) in zip(found, units, strict=True))
    order = sorted(range(len(wanted)), key=lambda i: (found[i] - wanted[i] / units[i][0], i))
    while left > 0:
        before = left
        for i in order:
            size, most = units[i]
            if found[i] < most and size <= left:
                found[i], left = found[i] + 1, left - size
        if left == before:
            break
    while left < 0 and any(parts > 1 for parts in found):
        i = max((i for i, parts in enumerate(found) if parts > 1), key=lambda i: (found[i] - wanted[i] / units[i][0], i))
        found[i], left = found[i] - 1, left + units[i][0]
    return found
