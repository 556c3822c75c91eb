"""Definition of a method: a function whose keyword arguments are its options, and what it reads and returns.

    reads        the first argument of the function            gives      what it returns
    statistics   LayerStatistics of one layer                  saliency   one per expert; the highest are kept
    weights      ExpertWeights of a layer, one by one          order      order of removal, and where to stop
    arrays       result of its own `measure` on the weights    choice     kept and merged experts for a given count
    model        a probe that runs a block with any kept set   neurons    a saliency [experts, neurons]; the highest are kept
    nothing      -

A method does not depend on families, tensor names or devices. Names, types and defaults of the options are read from the signatures, so
`-O name=value`, the plan and `expertsmith methods` agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Union, get_args, get_origin, get_type_hints

import numpy as np

from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules
from expertsmith.experts.weights import ExpertWeights
from expertsmith.methods.information import Counting
from expertsmith.registry import unknown

Array = np.ndarray[Any, Any]
Reads = Literal["statistics", "weights", "arrays", "model", "nothing"]
Gives = Literal["saliency", "order", "choice", "neurons"]
Budget = Literal["uniform", "global", "threshold", "sensitivity", "esap"]


class AtLeast(NamedTuple):
    """The smallest value of an option."""

    bound: int


Natural = Annotated[int, AtLeast(0)]
Positive = Annotated[int, AtLeast(1)]


class Projections(Protocol):
    """The experts' matrices of one layer by role, read on request."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles among "gate", "up" and "down" that the experts have."""

    def of(self, role: str) -> Iterator[Array]:
        """Yield the matrices of all experts in ascending order, float32."""


@dataclass(frozen=True)
class Facts:
    """Further facts about the layer that a method may use."""

    layer: int
    num_experts: int
    sequence_lengths: Mapping[str, list[int]] = field(default_factory=dict)  # tokens of every calibration sequence, by domain
    model_type: str = ""
    rules: Rules = field(default_factory=lambda: Rules(1, 1))
    advance: Callable[[float], object] = lambda _: None  # called with the further share of the layer that has been measured
    counting: Counting = field(default_factory=Counting)  # how arrays are binned and pairs of them counted


@dataclass(frozen=True)
class Choice:
    """The choice for one layer. `keep`: kept ids in ascending order; `merge`: as in the plan's format; `why`: for its reader."""

    keep: list[int]
    merge: list[dict[str, Any]] = field(default_factory=list)
    why: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """Experts in order of removal. `height`: strength of the case for each removal (it never increases along the order); `stop`: number of
    experts that the method's own threshold removes."""

    experts: list[int]
    height: list[float]
    stop: int
    why: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A registered method.

    `measure` turns a layer's `Projections` into arrays that are costly to compute and are stored next to the plan; a method that reads
    statistics gets them as its second argument. `allot` turns the statistics of all layers into counts for budget "global". `constants`
    turns the statistics of a layer into one vector an expert: dropped experts are then not removed, but return it, and the router stays
    unchanged. `cut` turns the neurons' saliencies of all layers into the numbers of neurons that each expert keeps. `budgets`: the first is the
    default.
    """

    name: str
    title: str
    paper: str
    reads: Reads
    gives: Gives
    function: Callable[..., Any]
    ties: Literal["keep_lower", "keep_higher"]
    doc: str
    cost: str
    limits: str
    budgets: tuple[Budget, ...]
    averages: bool = False  # a mean over an expert's tokens, noisy if they are few
    all_outputs: bool = False  # needs the statistic all_output_sum, which is collected on request
    output_moments: bool = False  # needs the statistics of --output-moments, which are collected on request
    neurons: bool = False  # needs the statistics of --neurons, which are collected on request
    measure: Callable[..., dict[str, Array]] | None = None
    allot: Callable[..., dict[int, int]] | None = None
    constants: Callable[..., Array] | None = None
    cut: Callable[..., dict[int, list[int]]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    @property
    def data_free(self) -> bool:
        """Whether it needs no calibration."""
        return self.reads in ("weights", "arrays", "nothing")

    @property
    def options(self) -> dict[str, Any]:
        """Option → default."""
        return {name: default for function in self._functions for name, default in _keywords(function).items()}

    @property
    def measure_options(self) -> tuple[str, ...]:
        """The options that `measure` depends on."""
        return tuple(_keywords(self.measure)) if self.measure else ()

    @property
    def _functions(self) -> tuple[Callable[..., Any], ...]:
        return tuple(function for function in (self.measure, self.function, self.constants, self.cut) if function)

    def values_for(self, function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the options' values that one of the method's functions takes."""
        return {name: values[name] for name in _keywords(function)}

    def parse_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values: defaults, overridden by `given`, converted by the signatures' types.

        Raises:
            UserError: an unknown option, a value of the wrong type, or one below its bound.
        """
        for name in given:
            if name not in self.options:
                if not self.options:
                    raise UserError(f"method {self.name} has no options, but {name!r} was given")
                raise unknown(f"option of {self.name}", name, self.options)
        return {key: value for function in self._functions for key, value in parse(self.name, function, given).items()}


def parse(owner: str, function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a function with their values: defaults, overridden by those of `given`, converted by the signature's types.

    Raises:
        UserError: a value of the wrong type, or one below its bound.
    """
    hints = get_type_hints(function, include_extras=True)
    return {
        name: convert(owner, name, given[name], hints[name]) if name in given else default
        for name, default in _keywords(function).items()
    }


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def method(
    name: str,
    title: str,
    paper: str,
    reads: Reads = "statistics",
    gives: Gives = "saliency",
    ties: Literal["keep_lower", "keep_higher"] = "keep_higher",
    cost: str = "",
    limits: str = "",
    budgets: tuple[Budget, ...] = ("uniform", "global", "sensitivity", "esap"),
    **more: Any,
) -> Callable[[Callable[..., Any]], Method]:
    """Register a function as a method. `ties`: which of two equally salient experts is kept, the lower or the higher id; `more`: other
    fields of `Method`."""
    usual = {"statistics": "one calibration pass", "weights": "one read of the weights", "nothing": "none"}

    def register(function: Callable[..., Any]) -> Method:
        doc = inspect.getdoc(function) or ""
        return Method(
            name, title, paper, reads, gives, function, ties, doc, cost or usual.get(reads, ""), limits, budgets, **more
        )

    return register


def convert(owner: str, name: str, value: Any, kind: Any) -> Any:
    """Convert an option's value to the type in its signature.

    Raises:
        UserError: a value of the wrong type, or one below its bound.
    """
    where = f"option {name} of {owner}"
    if get_origin(kind) is Union:  # a number or one of some words
        number, words = get_args(kind)
        return value if value in get_args(words) else convert(owner, name, value, number)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{where} is {value!r}", f"choose one of {', '.join(map(str, get_args(kind)))}")
        return value
    if get_origin(kind) is Annotated:
        plain, limit = get_args(kind)
        converted = convert(owner, name, value, plain)
        if converted < limit.bound:
            raise UserError(f"{where} is {value}", f"give {limit.bound} or more")
        return converted
    try:
        if kind is bool:
            if isinstance(value, str):
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
            return bool(value)
        converted = kind(value)
        if isinstance(converted, float) and not np.isfinite(converted):
            raise ValueError
        return converted
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{where} is {value!r}, which is not {'true or false' if kind is bool else f'of type {kind.__name__}'}"
        ) from None


def mean(total: Array, count: Array) -> Array:
    """total / count; 0 where count is 0 (an expert that no token reached)."""
    return np.divide(total, count, out=np.zeros_like(total, dtype=np.float64), where=count > 0)


def every(weights: Iterable[ExpertWeights], score: Callable[[ExpertWeights], float], num_experts: int) -> Array:
    """One score per expert."""
    scores = np.zeros(num_experts)
    for entry in weights:
        scores[entry.expert] = score(entry)
    return scores
