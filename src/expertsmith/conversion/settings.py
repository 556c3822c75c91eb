"""The settings of a conversion, checked against the dense model before anything runs. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from expertsmith.arch import config_get, families
from expertsmith.arch.dense import BLOCKED, DENSE, TARGETS, Dense, Target
from expertsmith.errors import UserError
from expertsmith.registry import unknown

LEARNED = "learned"  # the router of a method that trains it
STEP = 64  # neurons; narrower experts have steps of 8
LEAST_STEP = 8


@dataclass(frozen=True)
class Way:
    """A method of conversion."""

    name: str
    title: str
    paper: str
    doc: str
    router: str  # its default router
    experts: int  # its default number of experts
    needs_data: bool = True

    @property
    def learned(self) -> bool:
        """Whether masks are trained."""
        return self.router == LEARNED


WAYS = {
    way.name: way
    for way in (
        Way(
            "random",
            "random groups",
            "-",
            "a seeded random split of the neurons and a random router, the baseline",
            "random",
            8,
            False,
        ),
        Way(
            "moefication",
            "MoEfication",
            "arXiv 2110.01786",
            "balanced k-means on the gate rows; a linear router fitted to the experts' energy",
            "ridge",
            8,
        ),
        Way(
            "cmoe",
            "CMoE",
            "arXiv 2502.04416",
            "the most frequently active neurons always run, the others are grouped by co-activation",
            "ridge",
            8,
        ),
        Way(
            "expertweaver",
            "ExpertWeaver",
            "arXiv 2602.15521",
            "neurons with large gate activations always run, the others are grouped by their profile over texts; router: mean gate rows",
            "gate_mean",
            8,
        ),
        Way(
            "tomoe",
            "ToMoE",
            "arXiv 2501.15316",
            "overlapping experts and a top-1 router, learned by distillation with all weights of the model frozen",
            LEARNED,
            4,
        ),
    )
}
ROUTERS = ("ridge", "centroid", "gate_mean", "random")


@dataclass(frozen=True)
class Asked:
    """A conversion checked against the model; numbers of neurons are per layer."""

    way: Way
    family: Dense
    target: Target
    experts: int
    top_k: int
    width: int  # neurons of a routed expert
    shared: int  # neurons that always run
    router: str
    active: float  # share of the MLP's neurons that a token runs


@dataclass(frozen=True, kw_only=True)
class Request:
    """All options of `expertsmith convert`, with their names on the command line."""

    dense: str
    out: Path
    method: str
    experts: int | None = None
    top_k: int | None = None
    shared: int = 0
    active: float | None = None
    active_of: Literal["mlp", "block"] = "mlp"
    router: str | None = None
    target: str | None = None
    export: Literal["plain", "core"] = "plain"
    max_growth: float = 2.0
    markers: int | None = None
    steps: int = 300
    batch: int = 1
    lr: float = 2e-3
    router_lr: float = 1e-3
    start: Literal["grouped", "dense"] = "grouped"
    widths: Literal["equal", "per_layer"] = "equal"
    attention: Literal["none", "static", "dynamic"] = "none"
    data: Sequence[str] = ()
    eval_data: Sequence[str] = ()
    measure: bool = True
    samples: int | None = None
    seq_len: int | None = None
    pack: bool | None = None
    columns: Mapping[str, str] | None = None
    seed: int = 42
    gguf_file: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    resume: bool = True
    overwrite: bool = False


def dense_family(config: Mapping[str, Any], where: str) -> Dense:
    """The record of a dense model's family.

    Raises:
        UserError: the model is already a Mixture of Experts, its family has a feature that no target has (with the reason), or is unknown.
    """
    model_type = str(config_get(config, "model_type") or "")
    if model_type in families():
        raise UserError(
            f"{where} is already a Mixture of Experts ({families()[model_type].title})",
            "prune or merge its experts with `expertsmith compress`",
        )
    if model_type in BLOCKED:
        raise UserError(f"{where} is a {model_type} model, which cannot be converted: {BLOCKED[model_type]}")
    if model_type not in DENSE:
        raise unknown("convertible dense family", model_type, DENSE)
    return DENSE[model_type]


def ask(
    config: Mapping[str, Any],
    where: str,
    method: str,
    *,
    experts: int | None = None,
    top_k: int | None = None,
    shared: int = 0,
    active: float | None = None,
    active_of: Literal["mlp", "block"] = "mlp",
    router: str | None = None,
    target: str | None = None,
    attention: str = "none",
    core: bool = False,
) -> Asked:
    """Check the requested conversion.

    Args:
        experts: number of routed experts; None: the method's default.
        shared: number of always-on experts, of the routed experts' width (training-free methods).
        core: ToMoE's experts share an always-on part.
        active: wanted share of the parameters that a token uses, of the MLPs or (`active_of` "block") of attention and MLPs together.

    Raises:
        UserError: options that do not fit together, with the numbers and a remedy.
    """
    if method not in WAYS:
        raise unknown("conversion method", method, WAYS)
    way, family = WAYS[method], dense_family(config, where)
    count = way.experts if experts is None else experts
    neurons = int(config["intermediate_size"])
    goal = _target(family, config, where, target, always=shared > 0 or core)
    if core and (not way.learned or goal.shared_key is None):
        raise UserError(
            f"--export core needs {'--method tomoe' if not way.learned else f'an always-on part, which a {goal.model_type} model does not have'}",
            "use --export plain",
        )
    if count < 1 or shared < 0:
        raise UserError(f"--experts is {count} and --shared {shared}; at least one routed expert is needed")
    if attention != "none":
        if not way.learned:
            raise UserError(
                f"--attention {attention} is learned, but method {method} is not", "use --method tomoe, or remove --attention"
            )
        if active_of != "block":
            raise UserError(
                f"with --attention {attention} the budget covers attention and MLPs together", "pass --active-of block"
            )
        active_of = "mlp"  # training divides it between the two; MLPs start with the same share as the whole
    ratio = _mlp_ratio(config, active, active_of)
    kind = router or way.router
    if way.learned:
        return _tomoe(way, family, goal, count, top_k, shared, router, ratio, neurons)
    if kind not in ROUTERS:
        raise unknown("router", kind, ROUTERS)
    if count < 2:
        raise UserError("a router needs at least two routed experts", "give --experts 2 or more")
    width, rest = _groups(neurons, count, shared)
    chosen = _top_k(ratio, top_k, count, width, rest, neurons, active)
    goal = _target(family, config, where, target, always=rest > 0, several=1 < chosen < count)
    return Asked(way, family, goal, count, chosen, width, rest, kind, (rest + chosen * width) / neurons)


def _target(
    family: Dense, config: Mapping[str, Any], where: str, name: str | None, *, always: bool = False, several: bool = False
) -> Target:
    """The architecture of the result. For an `always`-on part, one that has it, if any. For `several` experts per token, one that takes the
    top_k of logits, since those weights can be made equal without ties (`export`). Else the first."""
    if name is not None and name not in family.targets:
        raise UserError(f"a {family.model_type} model cannot become a {name}", f"choose {' or '.join(family.targets)}")
    known = [TARGETS[entry] for entry in family.targets]
    goal = known[0]
    if name is not None:
        goal = TARGETS[name]
    elif always:
        goal = known[0] if known[0].shared_key else known[-1]
    elif several:
        goal = next((t for t in known if t.selects_on == "logits" and not family.refusal(config, t.model_type)), goal)
    reason = family.refusal(config, goal.model_type)
    if reason:
        raise UserError(f"{where} cannot be converted: {reason}")
    return goal


def _mlp_ratio(config: Mapping[str, Any], active: float | None, active_of: str) -> float | None:
    if active is None:
        return None
    if not 0 < active <= 1:
        raise UserError(f"--active is {active:g}", "give a share between 0 and 1")
    if active_of == "mlp":
        return active
    attention, mlp = block_parameters(config)
    ratio = (active * (attention + mlp) - attention) / mlp
    if ratio <= 0:
        least = attention / (attention + mlp)
        raise UserError(
            f"--active {active:g} of attention and MLPs is impossible if attention is kept, which alone is {least:.3f} of them",
            f"give more than {least + 0.02:.2f}, or prune attention too (--method tomoe --attention static)",
        )
    return ratio


def block_parameters(config: Mapping[str, Any]) -> tuple[int, int]:
    """(attention, MLP) weight counts of one layer, without biases and norms."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head = int(config.get("head_dim") or hidden // heads)
    kv = int(config.get("num_key_value_heads") or heads)
    return 2 * hidden * head * (heads + kv), 3 * hidden * int(config["intermediate_size"])


def _groups(neurons: int, experts: int, shared: int) -> tuple[int, int]:
    width = neurons // (experts + shared)
    step = STEP if width >= STEP and shared else LEAST_STEP if width >= LEAST_STEP and shared else 1
    width -= width % step
    rest = neurons - experts * width
    if not shared and rest:
        divisors = [n for n in range(2, neurons + 1) if neurons % n == 0]
        close = [*[n for n in divisors if n < experts][-1:], *[n for n in divisors if n > experts][:1]]
        raise UserError(
            f"{neurons} neurons do not divide into {experts} experts ({rest} would be left)",
            (f"give --experts {' or '.join(map(str, close))}, or " if close else "")
            + "--shared 1, whose expert takes the remainder",
        )
    if width < 1:
        raise UserError(f"{neurons} neurons are too few for {experts + shared} experts", "give fewer --experts")
    return width, rest


def _top_k(
    ratio: float | None, top_k: int | None, experts: int, width: int, shared: int, neurons: int, active: float | None
) -> int:
    shares = [(shared + k * width) / neurons for k in range(1, experts + 1)]
    if ratio is not None and ratio < shares[0] - 0.5 * width / neurons:
        raise UserError(
            f"--active {active:g} means {ratio:.3f} of the MLP, but the always-on part and one expert alone are {shares[0]:.3f}",
            f"give --active {shares[0]:.2f} or more, more --experts, or fewer --shared",
        )
    if top_k is None:
        if ratio is None:
            ratio = 0.5
        return 1 + min(range(experts), key=lambda i: abs(shares[i] - ratio))
    if not 1 <= top_k <= experts:
        raise UserError(f"--top-k is {top_k}, but there are {experts} routed experts")
    if ratio is not None and abs(shares[top_k - 1] - ratio) > 0.5 * width / neurons:
        raise UserError(
            f"--top-k {top_k} of {experts} runs {shares[top_k - 1]:.3f} of the MLP, but --active sets {ratio:.3f}",
            "remove one of the two",
        )
    return top_k


def _tomoe(
    way: Way,
    family: Dense,
    target: Target,
    experts: int,
    top_k: int | None,
    shared: int,
    router: str | None,
    ratio: float | None,
    neurons: int,
) -> Asked:
    if top_k not in (None, 1):
        raise UserError(f"--top-k is {top_k}, but ToMoE's router selects one expert", "leave --top-k out")
    if shared or router:
        raise UserError(
            f"--{'shared' if shared else 'router'} has no effect on ToMoE, which learns its experts and router",
            "use --export core for an always-on part" if shared else "leave it out",
        )
    wanted = 0.5 if ratio is None else ratio
    width = tomoe_width(wanted, neurons)
    return Asked(way, family, target, experts, 1, width, 0, LEARNED, width / neurons)


def tomoe_width(ratio: float, neurons: int) -> int:
    """The width of an expert for a share `ratio` of all neurons, in steps of 64 (8 if that is too coarse)."""
    step = step_of(ratio, neurons)
    return min(neurons, max(step, round(ratio * neurons / step) * step))


def step_of(ratio: float, neurons: int) -> int:
    """64 if that is at most an eighth of the wanted width; else 8, which grouped matrix products need in bfloat16."""
    return STEP if ratio * neurons >= 8 * STEP else LEAST_STEP
