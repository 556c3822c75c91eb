"""A recipe: the stages of one job in a YAML file, checked as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from expertsmith.errors import UserError
from expertsmith.plan import explain
from expertsmith.progress import Progress


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Calibrate(_Step):
    """Options of `expertsmith calibrate`."""

    data: list[str] = Field(min_length=1)
    out: str
    samples: int = Field(128, ge=1)
    seq_len: int | None = Field(None, ge=2)
    seed: int = 42
    pack: bool | None = None
    overlong: Literal["refuse", "truncate", "drop"] = "refuse"
    batch_tokens: int = Field(8192, ge=1)
    output_sum: bool = False
    all_outputs: bool = False
    sample_tokens: int = Field(0, ge=0)

    @field_validator("data")
    @classmethod
    def _specs(cls, value: list[str]) -> list[str]:
        return _specs(value)


class PlanStep(_Step):
    """Options of `expertsmith plan`. `stats` defaults to what `calibrate` of the same recipe makes; `data` is for methods that run the
    model themselves."""

    method: str
    keep: float | int | str | None = None
    out: str
    stats: str | None = None
    data: list[str] = Field(default_factory=list)
    samples: int = Field(128, ge=1)
    seq_len: int | None = Field(None, ge=2)
    seed: int = 42
    domains: list[str] = Field(default_factory=list)
    budget: Literal["uniform", "global", "threshold"] | None = None
    uniform: bool = False
    options: dict[str, Any] = Field(default_factory=dict)
    router_groups: Literal["keep", "flatten"] = "keep"

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        from expertsmith.methods import find

        _all_faults([partial(find, value)])
        return value

    @field_validator("keep")
    @classmethod
    def _sensible_keep(cls, value: float | int | str | None) -> float | int | str | None:
        from expertsmith.selection import parse_keep

        if value is not None:
            _all_faults([partial(parse_keep, value)])
        return value

    @field_validator("data")
    @classmethod
    def _data_specs(cls, value: list[str]) -> list[str]:
        return _specs(value)

    @field_validator("options")
    @classmethod
    def _known_options(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from expertsmith.methods import find

        if "method" in info.data:  # else the method itself is the fault
            method = find(info.data["method"])
            _all_faults([partial(method.parse_options, {name: given}) for name, given in value.items()])
        return value


class Apply(_Step):
    """Options of `expertsmith apply`."""

    out: str
    pad: bool = False
    overwrite: bool = False


class Verify(_Step):
    """Options of `expertsmith verify`."""

    data: list[str] = Field(default_factory=list)
    tokens: int = Field(1024, ge=1)
    tolerance: float = Field(1e-4, gt=0)


class Evaluate(_Step):
    """Options of `expertsmith evaluate`; the recipe's model is the reference unless `reference` is false."""

    data: list[str] = Field(default_factory=list)
    tasks: list[str] = Field(default_factory=list)
    task_path: list[str] = Field(default_factory=list)
    limit: int | None = Field(None, ge=1)
    reference: bool = True
    samples: int = Field(128, ge=1)
    seq_len: int | None = Field(None, ge=2)
    seed: int = 42

    @field_validator("data")
    @classmethod
    def _specs(cls, value: list[str]) -> list[str]:
        return _specs(value)


class Recipe(_Step):
    """A whole job: calibrate → plan → apply → verify → evaluate; stages that are left out are skipped."""

    model: str
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory: Literal["auto", "resident", "stream"] = "auto"
    calibrate: Calibrate | None = None
    plan: PlanStep | None = None
    apply: Apply | None = None
    verify: Verify | None = None
    evaluate: Evaluate | None = None


def _chain_faults(sections: Mapping[str, Any]) -> list[str]:
    """Sections that need another one, told from the sections as they stand in the file, whatever is wrong inside them."""
    from expertsmith.methods import methods

    there = {name: section for name, section in sections.items() if section is not None}
    faults = []
    plan = there["plan"] if isinstance(there.get("plan"), Mapping) else {}
    method = methods().get(str(plan.get("method")))
    if method and method.reads == "statistics" and not plan.get("stats") and "calibrate" not in there:
        faults.append(f"plan: method {method.name} needs statistics: add a calibrate section or plan.stats")
    if method and method.reads == "model" and not plan.get("data"):
        faults.append(f"plan: method {method.name} runs the model on text: add plan.data")
    calibrate = there["calibrate"] if isinstance(there.get("calibrate"), Mapping) else None
    if method and method.all_outputs and calibrate is not None and not plan.get("stats") and not calibrate.get("all_outputs"):
        faults.append(
            f"plan: method {method.name} needs every expert's output on all tokens: set calibrate.all_outputs to true"
        )
    if method and plan.get("keep") is None and plan.get("budget") in (None, "threshold") and "threshold" not in method.budgets:
        faults.append(f"plan: method {method.name} has to be told how many experts stay: add plan.keep")
    if "apply" in there and "plan" not in there:
        faults.append("apply: there is no plan section")
    if "verify" in there and "apply" not in there:
        faults.append("verify: there is no apply section")
    evaluate = there["evaluate"] if isinstance(there.get("evaluate"), Mapping) else None
    if evaluate is not None and not evaluate.get("data") and not evaluate.get("tasks"):
        faults.append("evaluate: there is nothing to measure: add evaluate.data or evaluate.tasks")
    if not there.keys() & {"calibrate", "plan", "evaluate"}:
        faults.append("nothing to do: add calibrate, plan or evaluate")
    return faults


def _all_faults(checks: Iterable[Callable[[], object]]) -> None:
    """Run every check; the messages of all that fail in one error."""
    faults = []
    for check in checks:
        try:
            check()
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("; ".join(faults))


def _specs(value: list[str]) -> list[str]:
    from expertsmith.calibration.spec import parse_spec

    _all_faults([partial(parse_spec, text) for text in value])
    return value


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UserError: no such file, not YAML, or all faults of the file in one message.
    """
    import yaml

    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no recipe at {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a recipe") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a table of sections", "see recipes/ for examples")
    faults = []
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        faults.append(explain(error, limit=50))
    faults += _chain_faults(raw)
    if faults:
        raise UserError(f"{path}: " + "; ".join(faults))
    return recipe


def run_recipe(recipe: Recipe, progress: Progress | None = None) -> dict[str, Any]:
    """Run the sections in order; returns what each made, by section."""
    from expertsmith import api
    from expertsmith.calibration.spec import refuse_missing

    sections = (recipe.calibrate, recipe.plan, recipe.verify, recipe.evaluate)
    refuse_missing([spec for section in sections if section for spec in section.data])
    if recipe.evaluate and recipe.evaluate.tasks:
        from expertsmith.evaluation import tasks

        tasks.refuse_missing(recipe.evaluate.task_path)
    results: dict[str, Any] = {}
    where: dict[str, Any] = {"device": recipe.device, "memory": recipe.memory, "progress": progress}
    if recipe.calibrate:
        results["calibrate"] = api.calibrate(recipe.model, **recipe.calibrate.model_dump(), dtype=recipe.dtype, **where)
    if recipe.plan:
        options = recipe.plan.model_dump()
        options["stats"] = options["stats"] or (recipe.calibrate.out if recipe.calibrate else None)
        results["plan"] = api.plan(recipe.model, **options, dtype=recipe.dtype, **where)
    if recipe.apply:
        results["apply"] = api.apply(recipe.model, results["plan"], **recipe.apply.model_dump(), progress=progress)
    if recipe.verify and recipe.apply:
        results["verify"] = api.verify(recipe.model, recipe.apply.out, **recipe.verify.model_dump(), **where)
    if recipe.evaluate:
        options = recipe.evaluate.model_dump()
        target = recipe.apply.out if recipe.apply else recipe.model
        against = recipe.model if options.pop("reference") and recipe.apply else None
        results["evaluate"] = api.evaluate(target, reference=against, dtype=recipe.dtype, **options, **where)
    return results
