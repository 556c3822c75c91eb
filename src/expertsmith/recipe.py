"""A recipe: the stages of one job in a YAML file, checked as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from expertsmith.errors import UserError
from expertsmith.plan import explain
from expertsmith.progress import Progress
from expertsmith.registry import unknown


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


Specs = Annotated[list[str], AfterValidator(_specs)]  # [DOMAIN=]SOURCE[:N] each


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Calibrate(_Step):
    """Options of `expertsmith calibrate`."""

    data: Specs = Field(min_length=1)
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


class PlanStep(_Step):
    """Options of `expertsmith plan`. `stats` defaults to what `calibrate` of the same recipe makes; `data` is for methods that run the
    model themselves."""

    method: str
    keep: float | int | str | None = None
    out: str
    stats: str | None = None
    data: Specs = Field(default_factory=list)
    samples: int = Field(128, ge=1)
    seq_len: int | None = Field(None, ge=2)
    seed: int = 42
    domains: list[str] = Field(default_factory=list)
    budget: Literal["uniform", "global", "threshold"] | None = None
    uniform: bool = False
    options: dict[str, Any] = Field(default_factory=dict)
    router_groups: Literal["keep", "flatten"] = "keep"
    mtp: Literal["keep", "drop"] = "keep"

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
    requantise: bool = False
    overwrite: bool = False


class Verify(_Step):
    """Options of `expertsmith verify`."""

    data: Specs = Field(default_factory=list)
    tokens: int = Field(1024, ge=1)
    tolerance: float = Field(1e-4, gt=0)


class Evaluate(_Step):
    """Options of `expertsmith evaluate`; the recipe's model is the reference unless `reference` is false."""

    data: Specs = Field(default_factory=list)
    tasks: list[str] = Field(default_factory=list)
    task_path: list[str] = Field(default_factory=list)
    limit: int | None = Field(None, ge=1)
    reference: bool = True
    samples: int = Field(128, ge=1)
    seq_len: int | None = Field(None, ge=2)
    seed: int = 42


class Convert(_Step):
    """Options of `expertsmith convert`: the recipe's model is dense, and what this makes of it is the model of every later section."""

    model_config = ConfigDict(extra="allow")
    method: str
    out: str
    data: Specs = Field(default_factory=list)
    eval_data: Specs = Field(default_factory=list)

    @model_validator(mode="after")
    def _request(self) -> Convert:
        from expertsmith.conversion.settings import WAYS, Request

        known = [name for name in Request.__dataclass_fields__ if name not in ("dense", "device", "dtype")]
        extra = self.__pydantic_extra__ or {}
        faults = [unknown("option of convert", name, known) for name in extra if name not in known]
        if self.method not in WAYS:
            faults.append(unknown("way of converting", self.method, WAYS))
        if faults:
            raise ValueError("; ".join(map(str, faults)))
        try:
            TypeAdapter(Request).validate_python({"dense": "", **self.model_dump()})
        except ValidationError as error:
            raise ValueError(explain(error)) from None
        return self


class Analyze(_Step):
    """Options of `expertsmith analyze`, of the model before anything is removed. `stats` defaults to what `calibrate` of the same recipe makes."""

    out: str
    data: Specs = Field(default_factory=list)
    stats: str | None = None
    all_experts: int = Field(0, ge=0)
    dense: str | None = None
    neurons: int = Field(128, ge=2)
    pairs: int = Field(32, ge=1)
    samples: int = Field(128, ge=1)
    seq_len: int | None = Field(None, ge=2)
    seed: int = 42


class SkipStep(_Step):
    """Options of `expertsmith skip`, with the recipe's plan if it has one."""

    data: Specs = Field(min_length=1)
    out: str
    statistic: Literal["median", "mean", "quantile"] = "median"
    quantile: float = Field(0.5, ge=0, le=1)
    active: float | None = Field(None, gt=0)
    eval_data: Specs = Field(default_factory=list)
    measure: bool = True
    samples: int = Field(128, ge=1)
    seq_len: int | None = Field(None, ge=2)
    seed: int = 42
    overwrite: bool = False


class Heal(_Step):
    """Options of `expertsmith heal`: what `apply` wrote, towards the recipe's model. What is healed is evaluated again."""

    data: Specs = Field(min_length=1)
    out: str
    method: str = "least_squares"
    options: dict[str, Any] = Field(default_factory=dict)
    requantise: bool = False
    samples: int = Field(128, ge=1)
    seq_len: int | None = Field(None, ge=2)
    seed: int = 42
    overwrite: bool = False

    @model_validator(mode="after")
    def _known(self) -> Heal:
        from expertsmith.healing.options import parse_healer

        one_by_one = [partial(parse_healer, self.method, {name: value}) for name, value in self.options.items()]
        _all_faults(one_by_one or [partial(parse_healer, self.method, {})])
        return self


class Compare(_Step):
    """Options of `expertsmith compare`."""

    methods: list[str] = Field(min_length=1)
    keep: list[float | int | str] = Field(min_length=1)
    data: Specs = Field(min_length=1)
    eval_data: Specs = Field(min_length=1)
    out: str
    budgets: tuple[Literal["uniform", "global", "threshold"], ...] = Field(("uniform",), min_length=1)
    heal: list[str] = Field(default_factory=list)
    tasks: list[str] = Field(default_factory=list)
    task_path: list[str] = Field(default_factory=list)
    limit: int | None = Field(None, ge=1)
    samples: int = Field(128, ge=1)
    seq_len: int | None = Field(None, ge=2)
    seed: int = 42
    pack: bool | None = None
    overlong: Literal["refuse", "truncate", "drop"] = "refuse"
    batch_tokens: int = Field(8192, ge=1)

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, value: list[str]) -> list[str]:
        from expertsmith.comparison.cells import contenders

        _all_faults([partial(contenders, [text]) for text in value])
        return value

    @field_validator("heal")
    @classmethod
    def _known_heal(cls, value: list[str]) -> list[str]:
        from expertsmith.comparison.cells import parse_heal

        _all_faults([partial(parse_heal, text) for text in value])
        return value

    @field_validator("keep")
    @classmethod
    def _sensible_keep(cls, value: list[float | int | str]) -> list[float | int | str]:
        from expertsmith.selection import parse_keep

        _all_faults([partial(parse_keep, share) for share in value])
        return value


class Recipe(_Step):
    """A whole job: convert → calibrate → analyze → plan → apply → verify → evaluate → skip → heal → compare; stages that are left out are skipped.

    `revision` and `as` are the options `--revision` and `--as` of every command.
    """

    model: str
    revision: str | None = None
    as_type: str | None = Field(None, alias="as")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory: Literal["auto", "resident", "stream"] = "auto"
    convert: Convert | None = None
    calibrate: Calibrate | None = None
    analyze: Analyze | None = None
    plan: PlanStep | None = None
    apply: Apply | None = None
    verify: Verify | None = None
    evaluate: Evaluate | None = None
    skip: SkipStep | None = None
    heal: Heal | None = None
    compare: Compare | None = None


WORK = {"convert", "calibrate", "analyze", "plan", "evaluate", "skip", "compare"}  # sections that need no other one


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
    if "heal" in there and "apply" not in there:
        faults.append("heal: there is no apply section, so nothing that could be healed")
    analyze = there["analyze"] if isinstance(there.get("analyze"), Mapping) else {}
    if analyze.get("all_experts") and not analyze.get("data"):
        faults.append("analyze: all_experts runs the model on text: add analyze.data")
    evaluate = there["evaluate"] if isinstance(there.get("evaluate"), Mapping) else None
    if evaluate is not None and not evaluate.get("data") and not evaluate.get("tasks"):
        faults.append("evaluate: there is nothing to measure: add evaluate.data or evaluate.tasks")
    outs: dict[str, list[str]] = {}
    for name, section in there.items():
        if isinstance(section, Mapping) and isinstance(section.get("out"), str):
            outs.setdefault(section["out"], []).append(name)
    if sections.get("as") and "convert" in there:
        faults.append(
            "as: convert makes a dense model into one of a family that is known, so there is nothing to treat as another"
        )
    faults += [f"{' and '.join(names)} have the same out, {out}" for out, names in outs.items() if len(names) > 1]
    if not there.keys() & WORK:
        faults.append(f"nothing to do: add {', '.join(sorted(WORK))}")
    return faults


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
        raise UserError(f"{path} is not a table of sections", "`expertsmith recipes` has examples")
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
    """Run the sections in order; returns what each made, by section, and as `evaluate_healed` the quality after healing."""
    from expertsmith.calibration.spec import refuse_missing
    from expertsmith.checkpoint.hub import pinned
    from expertsmith.opening import opened_as

    sections = [getattr(recipe, name) for name in Recipe.model_fields]
    refuse_missing([spec for section in sections for key in ("data", "eval_data") for spec in getattr(section, key, ())])
    for asking in (recipe.evaluate, recipe.compare):
        if asking and asking.tasks:
            from expertsmith.evaluation import tasks

            tasks.refuse_missing(asking.task_path)
    model = str(pinned(recipe.model, recipe.revision))
    with opened_as(model, recipe.as_type):
        return _run(recipe, model, progress)


def _run(recipe: Recipe, model: str, progress: Progress | None) -> dict[str, Any]:
    from expertsmith import api

    results: dict[str, Any] = {}
    where: dict[str, Any] = {"device": recipe.device, "memory": recipe.memory, "progress": progress}
    run: dict[str, Any] = {**where, "dtype": recipe.dtype}
    stats = recipe.calibrate.out if recipe.calibrate else None
    if recipe.convert:
        asked = recipe.convert.model_dump()
        results["convert"] = api.convert(
            model, asked.pop("method"), asked.pop("out"), device=recipe.device, dtype=recipe.dtype, progress=progress, **asked
        )
        model = recipe.convert.out
    if recipe.calibrate:
        results["calibrate"] = api.calibrate(model, **recipe.calibrate.model_dump(), **run)
    if recipe.analyze:
        options = recipe.analyze.model_dump()
        options["stats"] = options["stats"] or stats
        results["analyze"] = api.analyze(model, options.pop("out"), **options, **run)
    if recipe.plan:
        options = recipe.plan.model_dump()
        options["stats"] = options["stats"] or stats
        results["plan"] = api.plan(model, **options, **run)
    if recipe.apply:
        results["apply"] = api.apply(model, results["plan"], **recipe.apply.model_dump(), progress=progress)
    if recipe.verify and recipe.apply:
        results["verify"] = api.verify(model, recipe.apply.out, **recipe.verify.model_dump(), **where)
    if recipe.evaluate:
        results["evaluate"] = _evaluate(recipe.evaluate, recipe.apply.out if recipe.apply else model, model, run)
    if recipe.skip:
        options = recipe.skip.model_dump()
        results["skip"] = api.skip(model, options.pop("data"), options.pop("out"), plan=results.get("plan"), **options, **run)
    if recipe.heal and recipe.apply:
        options = recipe.heal.model_dump()
        dtype = "float32" if recipe.dtype == "auto" else recipe.dtype  # what `heal` itself takes
        results["heal"] = api.heal(
            recipe.apply.out, model, options.pop("data"), options.pop("out"), dtype=dtype, **options, **where
        )
        if recipe.evaluate:
            results["evaluate_healed"] = _evaluate(recipe.evaluate, recipe.heal.out, model, run)
    if recipe.compare:
        results["compare"] = api.compare(model, **recipe.compare.model_dump(), **run)
    return results


def _evaluate(section: Evaluate, target: str, model: str, run: Mapping[str, Any]) -> Any:
    from expertsmith import api

    options = section.model_dump()
    against = model if options.pop("reference") and target != model else None
    return api.evaluate(target, reference=against, **options, **run)
