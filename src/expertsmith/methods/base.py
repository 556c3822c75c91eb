"""What a method is: a function from a layer's statistics (or weights) to one saliency an expert, higher stays.

A method knows no families, tensor names or devices. Its keyword arguments are its options: name, type and default are read from the
signature, so that `-O name=value`, the plan and `expertsmith methods` agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from expertsmith.errors import UserError
from expertsmith.registry import unknown

Array = np.ndarray[Any, Any]
Reads = Literal["statistics", "weights", "nothing"]


@dataclass(frozen=True)
class ExpertWeights:
    """The weight matrices of one expert, in float32 (whatever their names are)."""

    expert: int
    matrices: tuple[Array, ...]


@dataclass(frozen=True)
class Facts:
    """What a method may know of the layer besides its statistics."""

    layer: int
    num_experts: int
    sequence_lengths: Mapping[str, list[int]] = field(default_factory=dict)  # tokens of every calibration sequence, by domain


@dataclass(frozen=True)
class Method:
    """A registered method.

    `reads` tells what `saliency` gets as its first argument: `LayerStatistics`, an iterable of `ExpertWeights`, or nothing.
    """

    name: str
    title: str
    paper: str
    reads: Reads
    saliency: Callable[..., Array]
    ties: Literal["keep_lower", "keep_higher"]
    doc: str
    averages: bool = False  # a mean over an expert's tokens: noise where they are few

    @property
    def data_free(self) -> bool:
        """Whether it needs no calibration."""
        return self.reads != "statistics"

    @property
    def options(self) -> dict[str, Any]:
        """Option → default."""
        return {p.name: p.default for p in inspect.signature(self.saliency).parameters.values() if p.kind is p.KEYWORD_ONLY}

    def parse_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values: defaults, overridden by `given`, converted by the signature's types.

        Raises:
            UserError: an unknown option or a value of the wrong type.
        """
        hints = get_type_hints(self.saliency)
        values = dict(self.options)
        for name, value in given.items():
            if name not in values:
                if not values:
                    raise UserError(f"method {self.name} has no options, but {name!r} was given")
                raise unknown(f"option of {self.name}", name, values)
            values[name] = _convert(self.name, name, value, hints[name])
        return values


def method(
    name: str,
    title: str,
    paper: str,
    reads: Reads = "statistics",
    ties: Literal["keep_lower", "keep_higher"] = "keep_higher",
    averages: bool = False,
) -> Callable[[Callable[..., Array]], Method]:
    """Register a saliency function. `ties`: which of two equally salient experts stays, the lower or the higher id."""

    def register(function: Callable[..., Array]) -> Method:
        return Method(name, title, paper, reads, function, ties, inspect.getdoc(function) or "", averages)

    return register


def _convert(owner: str, name: str, value: Any, kind: Any) -> Any:
    where = f"option {name} of {owner}"
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{where} is {value!r}", f"choose one of {', '.join(map(str, get_args(kind)))}")
        return value
    try:
        if kind is bool:
            if isinstance(value, str):
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
            return bool(value)
        return kind(value)
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{where} is {value!r}, which is not {'true or false' if kind is bool else f'of type {kind.__name__}'}"
        ) from None


def mean(total: Array, count: Array) -> Array:
    """total / count, and 0 where count is 0 (an expert that no token reached)."""
    return np.divide(total, count, out=np.zeros_like(total, dtype=np.float64), where=count > 0)


def every(weights: Iterable[ExpertWeights], score: Callable[[ExpertWeights], float], num_experts: int) -> Array:
    """One score an expert."""
    scores = np.zeros(num_experts)
    for entry in weights:
        scores[entry.expert] = score(entry)
    return scores
