"""The cells of a comparison: the combined methods, ratios, budgets and healing methods, and the files of finished cells. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from expertsmith.errors import UserError
from expertsmith.experts.rules import parse_keep
from expertsmith.healing.options import as_options, parse_healer
from expertsmith.methods import Method, find, methods
from expertsmith.methods.base import Budget
from expertsmith.planning.budgets import SEARCHED, option_names, parse_options

CELLS, WORK = "cells", "work"  # folders of a comparison
BASELINE, SEEDS = "random", (0, 1, 2)
ALL = "all"
FORMAT = "expertsmith.comparison.cell"
VERSION = 2  # 2: includes the rise of every sequence


@dataclass(frozen=True)
class Contender:
    """A method with its options; `label` is as the user wrote it."""

    label: str
    method: Method
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One entry of the table. `budget`: as the user wrote it, with the options of a search; `heal`: a healing method as the user wrote it, or
    None. `progressive`: chosen on statistics of its own, which follow the choice layer by layer."""

    contender: Contender
    keep: float | int | None
    budget: str
    heal: str | None = None
    progressive: bool = False

    @property
    def reader(self) -> str | None:
        """What of its plan reads calibration text: the method, or the budget; None if nothing does."""
        if not self.contender.method.data_free:
            return self.contender.label
        return f"budget {self.budget}" if self.searched else None

    @property
    def searched(self) -> bool:
        """Whether its budget is searched."""
        return parse_budget(self.budget)[0] in SEARCHED

    @property
    def plan_name(self) -> str:
        """The name of its plan file, without `.json`; all healings of the same plan share it."""
        share = "" if self.keep is None else f"-{self.keep:g}" if isinstance(self.keep, float) else f"-{self.keep}"
        how = ("" if self.budget == "uniform" else f"-{self.budget}") + ("-progressive" if self.progressive else "")
        return _file_name(f"{self.contender.label}{share}{how}")

    @property
    def name(self) -> str:
        """The name of its result file, without `.json`."""
        return self.plan_name if self.heal is None else _file_name(f"{self.plan_name}-{self.heal}")


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=]+", "-", text)


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """`NAME[:KEY=VALUE,…]` → name and options.

    Raises:
        UserError: an option without a value.
    """
    name, _, rest = text.partition(":")
    values = {}
    for pair in rest.split(",") if rest else ():
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UserError(f"{text!r}: {pair!r} is not KEY=VALUE", "write NAME or NAME:KEY=VALUE,KEY=VALUE")
        values[key] = value
    return name, values


def contenders(asked: Sequence[str]) -> list[Contender]:
    """The methods of a comparison, each given as `NAME[:KEY=VALUE,…]` or "all", in the given order; the random draws come last.

    Raises:
        UserError: no method, an unknown one, or an unknown option.
    """
    if not asked:
        raise UserError("no method given", "pass --method NAME (repeatable), or --method all")
    names = [name for text in asked for name in (methods() if text == ALL else (text,)) if name != BASELINE]
    made = {}
    for label in [*names, *(f"{BASELINE}:seed={seed}" for seed in SEEDS)]:
        name, options = split_options(label)
        method = find(name)
        made[label] = Contender(label, method, method.parse_options(options))
    return list(made.values())


def short_names(labels: Iterable[str]) -> dict[str, str]:
    """Label → name for a table, without the options that all labels of a method have in common."""
    held = [(label, *split_options(label)) for label in dict.fromkeys(labels)]
    made = {}
    for label, name, options in held:
        common = [other.items() for _, also, other in held if also == name]
        told = [f"{key}={value}" for key, value in options.items() if not all((key, value) in other for other in common)]
        made[label] = " ".join([name, *told])
    return made


def parse_heal(text: str) -> tuple[str, dict[str, Any]]:
    """`NAME[:KEY=VALUE,…]` → a healing method and all of its options.

    Raises:
        UserError: an unknown healing method or option.
    """
    name, options = split_options(text)
    return name, as_options(parse_healer(name, options))


def parse_budget(text: str) -> tuple[str, dict[str, str]]:
    """`NAME[:KEY=VALUE,…]` → a budget, and the options of its search.

    Raises:
        UserError: an unknown budget or option, or a wrong value.
    """
    name, options = split_options(text)
    if name not in (allowed := get_args(Budget)):
        raise UserError(f"there is no budget {name!r}", f"choose {' or '.join(allowed)}")
    for key in options:
        if key not in (known := option_names(name)):
            raise UserError(
                f"there is no option of budget {name} {key!r}",
                f"choose from {', '.join(known)}" if known else "only sensitivity and esap have any",
            )
    parse_options(name, options)
    return name, options


def cells_of(
    asked: Sequence[str],
    keeps: Sequence[float | int | str],
    budgets: Sequence[str],
    heals: Sequence[str],
    progressive: bool = False,
) -> tuple[list[Cell], list[str]]:
    """(cells, notes on unsupported combinations). Every plan is judged unhealed, and once more with each healing method. With `progressive`,
    every method that reads statistics has a second plan for each ratio, with the uniform budget.

    Raises:
        UserError: as `contenders`, `parse_keep` and `parse_heal`; an unknown budget; no method besides the random draws.
    """
    names = {budget: parse_budget(budget)[0] for budget in budgets}
    for way in heals:
        parse_heal(way)
    shares: list[float | int] = list(dict.fromkeys(map(parse_keep, keeps)))
    if not shares:
        raise UserError("no ratio given", "pass --keep 0.5 (repeatable)")
    cells, notes = [], []
    for entry in contenders(asked):
        mine = [budget for budget in names if names[budget] in entry.method.budgets]
        notes += [
            f"{entry.label} does not support budget {budget}, so it is not in the table"
            for budget in names
            if budget not in mine and entry.method.name != BASELINE
        ]
        cells += [
            Cell(entry, keep, budget, heal)
            for heal in (None, *heals)
            for budget in mine
            for keep in ((None,) if budget == "threshold" else shares)
        ]
        if progressive and entry.method.reads == "statistics" and "uniform" in mine:
            cells += [Cell(entry, keep, "uniform", heal, True) for heal in (None, *heals) for keep in shares]
    if progressive and not any(cell.progressive for cell in cells):
        raise UserError(
            "--progressive needs a method that reads statistics, and budget uniform",
            "add one, e.g. --method reap, or leave it out",
        )
    if all(cell.contender.method.name == BASELINE for cell in cells):
        raise UserError(
            f"there is no method to compare with the random draws at budget {' or '.join(names)}",
            "pass --method NAME, or another --budget",
        )
    return cells, notes


def load(path: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """The finished result in `path` if it has the same `made_with` (model, data, method, options, …), else None."""
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    same = (
        isinstance(held, dict)
        and (held.get("format"), held.get("version")) == (FORMAT, VERSION)
        and held.get("made_with") == json.loads(json.dumps(made_with))
    )
    return held if same else None


def save(path: Path, made_with: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Write a result under a temporary name, then rename; returns the same as `load`."""
    held = {"format": FORMAT, "version": VERSION, "made_with": made_with, **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return held
