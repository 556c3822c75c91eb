"""The healing methods and their options. Imports no torch, because recipes and the command line validate with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, get_type_hints

from expertsmith.errors import UserError
from expertsmith.methods.base import AtLeast, convert
from expertsmith.registry import unknown


@dataclass(frozen=True)
class LeastSquares:
    """Down projections in closed form, layer by layer.

    `sweeps`: rounds over all experts of a layer.
    """

    sweeps: Annotated[int, AtLeast(1)] = 3


@dataclass(frozen=True)
class LayerLocal:
    """Least squares, then router, gate, up and down projections by gradients within each layer, then least squares again.

    `steps`: steps a layer, of `step_tokens` tokens each (0: by the rule, from the layer's weights and tokens); `learning_rate`: the share of
    its own size that a weight moves in the first step, with linear decay to 0 (0: 0.03, and 0.0075 where that lowers no held-out error).
    """

    sweeps: Annotated[int, AtLeast(1)] = 3
    steps: Annotated[int, AtLeast(0)] = 0
    step_tokens: Annotated[int, AtLeast(0)] = 0
    learning_rate: Annotated[float, AtLeast(0)] = 0.0
    seed: int = 42


@dataclass(frozen=True)
class Distilled:
    """Gradients through the whole model, towards the teacher's next-token distributions.

    `epochs`: passes over the tokens that are not held out; `step_tokens`: tokens a step; `learning_rate`: its peak value (0: short trials
    choose the best of `rates` on the held-out tokens); `warmup`: share of the steps; `kl`, `text`: weights of the two losses;
    `temperature`: of the KL.
    """

    epochs: Annotated[float, AtLeast(0)] = 1.0
    step_tokens: Annotated[int, AtLeast(1)] = 4096
    learning_rate: Annotated[float, AtLeast(0)] = 0.0
    kl: Annotated[float, AtLeast(0)] = 1.0
    text: Annotated[float, AtLeast(0)] = 0.0
    temperature: Annotated[float, AtLeast(0)] = 1.0
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    warmup: Annotated[float, AtLeast(0)] = 0.0
    cosine: bool = False
    seed: int = 42

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to try if none is given."""
        return (1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Router(Distilled):
    """Train the router weights only."""


LORA_TARGETS = ("attention", "experts", "router", "shared")


@dataclass(frozen=True)
class Lora(Distilled):
    """Low-rank adapters on chosen weights, merged at the end (extra `heal`: peft).

    `targets`: attention, experts, router, shared, comma-separated; `rank`, `alpha`: the update is (alpha / rank) B A; `dropout`: before
    adapters of linear modules (experts are parameters, which cannot have it); `neftune`: noise on the input embeddings (arXiv 2310.05914).
    `preset` "moeits" heals as in arXiv 2604.10603: rank 64, alpha 16, dropout 0.1, learning rate 2e-4 with 5 % warm-up and cosine decay,
    weight decay 0.05, NEFTune 5, text loss instead of KL, targets attention and experts; options given beside it override it.
    """

    targets: str = "attention,experts"
    rank: Annotated[int, AtLeast(1)] = 16
    alpha: Annotated[float, AtLeast(0)] = 32.0
    dropout: Annotated[float, AtLeast(0)] = 0.0
    neftune: Annotated[float, AtLeast(0)] = 0.0
    preset: Literal["", "moeits"] = ""

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to try if none is given."""
        return (3e-3, 1e-3, 3e-4)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "moeits": {
        "rank": 64, "alpha": 16.0, "dropout": 0.1, "learning_rate": 2e-4, "warmup": 0.05, "cosine": True, "weight_decay": 0.05,
        "neftune": 5.0, "kl": 0.0, "text": 1.0, "targets": "attention,experts",
    }
}  # fmt: skip

HEALERS: Mapping[str, type[Any]] = {"least_squares": LeastSquares, "layer_local": LayerLocal, "router": Router, "lora": Lora}
LAYERWISE = ("least_squares", "layer_local")


def parse_healer(method: str, given: Mapping[str, Any]) -> Any:
    """The options of a healing method: its defaults, overridden by `given`.

    Raises:
        UserError: an unknown method or option, or a value of the wrong type or below its bound.
    """
    if method not in HEALERS:
        raise unknown("healing method", method, HEALERS)
    kind = HEALERS[method]
    hints = get_type_hints(kind, include_extras=True)
    names = [entry.name for entry in fields(kind)]
    values = {}
    for name, value in given.items():
        if name not in names:
            raise unknown(f"option of {method}", name, names)
        values[name] = convert(method, name, value, hints[name])
    chosen = kind(**{**PRESETS.get(str(values.get("preset", "")), {}), **values})
    if isinstance(chosen, Distilled):
        for name in ("temperature", "epochs"):
            if not getattr(chosen, name) > 0:
                raise UserError(f"option {name} of {method} is {getattr(chosen, name)}", "give more than 0")
        if not chosen.kl and not chosen.text:
            raise UserError(
                f"options kl and text of {method} are both 0, so there is nothing to learn", "give one of them a weight"
            )
    return chosen


def as_options(chosen: Any) -> dict[str, Any]:
    """The options as plain data, for files."""
    return asdict(chosen)
