"""How much a layer is trained: a rule from the layer's own numbers. Imports no torch.

An expert with p weights sees n tokens, of which every one gives d equations (d: width of the layer's output). The rule looks at
e = n d / p, the equations a weight, averaged over the experts of the layer:

    e < ENOUGH     the weights outnumber what the text can tell of them: no gradients; the down projections in closed form, with ridges
    otherwise      step_tokens = max(EACH, s) experts / top_k, at most all: an expert gets so many tokens a step, and not fewer than the
                   shorter side s of its matrices, because a step turns the gradient in all of its directions (`healing.muon`)
                   steps = PASSES tokens / step_tokens, at least STEPS, at most MOST

Whatever the user gives wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expertsmith.healing.options import LayerLocal

ENOUGH = 1.0  # equations a weight
EACH = 1024  # tokens of an expert in a step
PASSES = 4  # over the tokens, at least
STEPS, MOST = 200, 1200


@dataclass(frozen=True)
class Layer:
    """What the rule reads of a layer. `tokens`: those to train on; `pairs`: (token, expert) pairs of them; `side`: the shorter
    one of an expert's matrices, at most; `width`: of the output."""

    experts: int
    expert_weights: int  # of one expert, on average
    other_weights: int  # of the router
    side: int
    width: int
    tokens: int
    pairs: int

    @property
    def equations(self) -> float:
        """For every weight of an expert."""
        return self.pairs * self.width / max(1, self.experts * self.expert_weights)


@dataclass(frozen=True)
class Amount:
    """What was chosen for a layer; 0 steps: no gradients. `given`: which of it the user chose."""

    steps: int
    step_tokens: int
    weights: int
    equations: float
    given: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {**asdict(self), "given": list(self.given), "equations": round(self.equations, 2)}


def amount(layer: Layer, options: LayerLocal) -> Amount:
    """Apply the rule to a layer."""
    given = tuple(name for name in ("steps", "step_tokens", "learning_rate") if getattr(options, name))
    slots = max(1.0, layer.pairs / max(1, layer.tokens))
    size = options.step_tokens or math.ceil(max(EACH, layer.side) * layer.experts / slots)
    size = max(1, min(size, layer.tokens))
    steps = options.steps or min(MOST, max(STEPS, math.ceil(PASSES * layer.tokens / size)))
    if not options.steps and layer.equations < ENOUGH:
        steps = 0
    return Amount(steps, size, layer.experts * layer.expert_weights + layer.other_weights, layer.equations, given)


def told(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for every group of layers that got the same, from their rows of the report: what was chosen, and from what."""
    groups: dict[tuple[int, int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        much = row["refined"]["amount"]
        groups.setdefault((much["steps"], much["step_tokens"], much["weights"]), []).append(row)
    return [_sentence(held) for held in groups.values()]


def _sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    found = [row["refined"] for row in rows]
    steps, size, weights, given = (found[0]["amount"][name] for name in ("steps", "step_tokens", "weights", "given"))
    ratios = sorted(entry["amount"]["equations"] for entry in found)
    span = f"{ratios[0]:.3g}" + (f" to {ratios[-1]:.3g}" if ratios[-1] > ratios[0] else "")
    where = (
        f"decoder layers {', '.join(str(row['layer']) for row in rows)}"
        if len(rows) > 1
        else f"decoder layer {rows[0]['layer']}"
    )
    text = f"{where}: {weights:,} weights of router and experts, {span} equations a weight from the text"
    if not steps:
        return (
            f"{text}, fewer than {ENOUGH:g}: only down projections are trained, in closed form. More text lets all be trained"
        )
    rates = sorted({entry["learning_rate"] for entry in found}, reverse=True)
    text += f": {steps} steps of {size:,} tokens, learning rate {' or '.join(f'{rate:g}' for rate in rates)}"
    ended = sum(entry["last_step"] < steps for entry in found)
    text += f", {ended} of {len(found)} layers ended early" if ended else ""
    return text + (f" ({', '.join(given)} given)" if given else "")
