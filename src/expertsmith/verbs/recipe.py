"""A recipe: the stages of one job in a YAML file, checked as a whole before anything runs. Its sections are the options of the verbs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from expertsmith.calibration.opening import opened_as
from expertsmith.checkpoint import open_checkpoint, pinned
from expertsmith.checkpoint.output import check_output
from expertsmith.checkpoint.writer import prepare_target
from expertsmith.errors import UserError
from expertsmith.planning.plan import explain
from expertsmith.registry import unknown
from expertsmith.verbs.analyze import analyze
from expertsmith.verbs.apply import apply
from expertsmith.verbs.calibrate import calibrate
from expertsmith.verbs.compare import compare
from expertsmith.verbs.convert import convert
from expertsmith.verbs.definition import VERBS, Option, check_outputs, options_of
from expertsmith.verbs.evaluate import evaluate
from expertsmith.verbs.heal import heal
from expertsmith.verbs.plan import plan
from expertsmith.verbs.skip import skip
from expertsmith.verbs.steps import Steps, made_with, steps_file
from expertsmith.verbs.verify import verify
from expertsmith.views.progress import Progress, Silent

WIDE = {
    "model",
    "dense",
    "teacher",
    "device",
    "dtype",
    "memory",
    "revision",
    "as_type",
    "allow_pickle",
    "progress",
    "resume",
}  # the recipe's


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


def _sensible_keep(value: float | int | str) -> float | int | str:
    from expertsmith.experts.rules import parse_keep

    _all_faults([partial(parse_keep, value)])
    return value


Specs = Annotated[list[str], AfterValidator(_specs)]  # [DOMAIN=]SOURCE[:N] each
Share = Annotated[float | int | str, AfterValidator(_sensible_keep)]
BudgetName = Literal["uniform", "global", "threshold", "sensitivity", "esap"]


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _field(option: Option) -> tuple[Any, Any]:  # noqa: C901  (a case a kind of option)
    """(type, default) of an option in YAML."""
    kind: Any = option.type
    optional = get_origin(kind) is UnionType and NoneType in get_args(kind)
    kinds = [part for part in (get_args(kind) if get_origin(kind) is UnionType else [kind]) if part is not NoneType]
    if option.name in ("data", "eval_data"):
        kind = Specs
    elif option.name == "keep":
        kind = list[Share] if get_origin(kinds[0]) is Sequence else Share
    elif option.name == "budget":
        kind = BudgetName
    elif option.name == "budgets":
        kind = tuple[BudgetName, ...]
    elif any(get_origin(part) is Mapping for part in kinds):
        kind, optional = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)], False
    elif get_origin(kinds[0]) is Sequence:
        kind = list[str]
    elif option.opt.kind is not None:
        kind = str
    else:
        kind = kinds[0] if len(kinds) == 1 else kind
    bounds: dict[str, Any] = {} if option.opt.least is None else {"ge": option.opt.least}
    if get_origin(option.type) is Sequence and option.required:
        bounds["min_length"] = 1
    default = ... if option.required else option.default
    if get_origin(option.type) is Sequence and not option.required:
        default = list(option.default) if option.name != "budgets" else tuple(option.default)
    if option.name == "budgets":
        bounds["min_length"] = 1
    return (kind | None if optional else kind), Field(default, validate_default=False, **bounds)


def _section(verb: Any, *, without: Sequence[str] = (), needed: Sequence[str] = (), doc: str = "", **changed: Any) -> Any:
    """The options of a verb as a section: all but those that the recipe has for all sections, and `without`.

    Args:
        needed: options that a section has to have.
        changed: name → (type, default) of fields that are other than the verb's.
    """
    name = verb.__name__
    options = VERBS[name].options if name in VERBS and VERBS[name].function is verb else options_of(verb.__wrapped__)
    fields = {option.name: _field(option) for option in options if option.name not in {*WIDE, *without}}
    for key in needed:
        fields[key] = (fields[key][0], ...)
    return create_model(
        name.title(), __base__=_Step, __doc__=doc or f"Options of `expertsmith {name}`.", **{**fields, **changed}
    )


PLAN: Any = _section(
    plan, without=("from_file", "work", "pack", "overlong", "batch_tokens"), needed=("out",), method=(str, ...)
)


class PlanStep(PLAN):  # type: ignore[misc]
    """Options of `expertsmith plan`. `stats` defaults to what `calibrate` of the same recipe makes; `data` is for methods that run the
    model themselves."""

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        from expertsmith.methods import find

        _all_faults([partial(find, value)])
        return value

    @model_validator(mode="after")
    def _known_options(self) -> PlanStep:
        from expertsmith.methods import find
        from expertsmith.planning import budgets

        method, options = find(self.method), self.options or {}
        own = [name for name in options if name not in budgets.option_names(self.budget)]
        search = partial(budgets.parse_options, self.budget, options)
        _all_faults([search, *(partial(method.parse_options, {name: options[name]}) for name in own)])
        return self


class Convert(_section(convert)):  # type: ignore[misc]
    """Options of `expertsmith convert`: the recipe's model is dense, and what this makes of it is the model of every later section."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        from expertsmith.conversion.settings import WAYS

        if not isinstance(given, Mapping):
            return given
        faults = [unknown("option of convert", name, cls.model_fields) for name in given if name not in cls.model_fields]
        if isinstance(given.get("method"), str) and given["method"] not in WAYS:
            faults.append(unknown("conversion method", given["method"], WAYS))
        if faults:
            raise ValueError("; ".join(map(str, faults)))
        return given


class HealStep(_section(heal, without=("pack", "overlong", "batch_tokens"))):  # type: ignore[misc]
    """Options of `expertsmith heal`: what `apply` wrote, towards the recipe's model. What is healed is evaluated again."""

    @model_validator(mode="after")
    def _known(self) -> HealStep:
        from expertsmith.healing.options import parse_healer

        options = self.options or {}
        one_by_one = [partial(parse_healer, self.method, {name: value}) for name, value in options.items()]
        _all_faults(one_by_one or [partial(parse_healer, self.method, {})])
        return self


class CompareStep(_section(compare)):  # type: ignore[misc]
    """Options of `expertsmith compare`."""

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


Calibrate = _section(calibrate)
Analyze = _section(
    analyze,
    without=("reference", "plan", "reference_stats"),
    doc="Options of `expertsmith analyze`, run on the model before anything is removed. `stats` defaults to the output of the recipe's `calibrate`.",
)
Apply = _section(apply, without=("plan", "check_values"))
Verify = _section(verify, without=("out", "plan", "seq_len"), tolerance=(float, Field(1e-4, gt=0)))
Evaluate = _section(
    evaluate,
    without=("out", "generate", "formats", "batch_tokens"),
    doc="Options of `expertsmith evaluate`; the recipe's model is the reference unless `reference` is false.",
    reference=(bool, True),
)
SkipStep = _section(
    skip,
    without=("plan", "pack", "overlong", "batch_tokens"),
    doc="Options of `expertsmith skip`, with the recipe's plan if it has one.",
    quantile=(float | None, Field(None, ge=0, le=1)),
    active=(float | None, Field(None, gt=0)),
)


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
    calibrate: Calibrate | None = None  # type: ignore[valid-type]
    analyze: Analyze | None = None  # type: ignore[valid-type]
    plan: PlanStep | None = None
    apply: Apply | None = None  # type: ignore[valid-type]
    verify: Verify | None = None  # type: ignore[valid-type]
    evaluate: Evaluate | None = None  # type: ignore[valid-type]
    skip: SkipStep | None = None  # type: ignore[valid-type]
    heal: HealStep | None = None
    compare: CompareStep | None = None


WORK = {"convert", "calibrate", "analyze", "plan", "evaluate", "skip", "compare"}  # sections that need no other one


NEEDS = (("apply", "plan", ""), ("verify", "apply", ""), ("heal", "apply", ", so there is nothing to heal"))


def _plan_faults(there: Mapping[str, Any]) -> list[str]:
    """What else the method of the plan section needs."""
    from expertsmith.methods import methods

    faults = []
    plan = there["plan"] if isinstance(there.get("plan"), Mapping) else {}
    method = methods().get(str(plan.get("method")))
    if method and method.reads == "statistics" and not plan.get("stats") and "calibrate" not in there:
        faults.append(f"plan: method {method.name} needs statistics: add a calibrate section or plan.stats")
    if method and method.reads == "model" and not plan.get("data"):
        faults.append(f"plan: method {method.name} needs text: add plan.data")
    if plan.get("budget") in ("sensitivity", "esap") and not plan.get("data"):
        faults.append(f"plan: budget {plan['budget']} runs the model on text: add plan.data")
    calibrate = there["calibrate"] if isinstance(there.get("calibrate"), Mapping) else None
    if method and method.all_outputs and calibrate is not None and not plan.get("stats") and not calibrate.get("all_outputs"):
        faults.append(
            f"plan: method {method.name} needs every expert's output on all tokens: set calibrate.all_outputs to true"
        )
    if (
        method
        and method.output_moments
        and calibrate is not None
        and not plan.get("stats")
        and not calibrate.get("output_moments")
    ):
        faults.append(f"plan: method {method.name} needs the variance of outputs: set calibrate.output_moments to true")
    if method and method.neurons and calibrate is not None and not plan.get("stats") and not calibrate.get("neurons"):
        faults.append(f"plan: method {method.name} needs the gradients of neurons: set calibrate.neurons to true")
    counted = plan.get("keep") is not None or plan.get("fit") is not None
    if method and not counted and plan.get("budget") in (None, "threshold") and "threshold" not in method.budgets:
        faults.append(f"plan: keep is required for method {method.name}: add plan.keep")
    return faults


def _chain_faults(sections: Mapping[str, Any]) -> list[str]:
    """Sections that need another one, from the sections present in the file, even if their contents are wrong."""

    there = {name: section for name, section in sections.items() if section is not None}
    faults = _plan_faults(there)
    for name, needed, so in NEEDS:
        if name in there and needed not in there:
            faults.append(f"{name}: there is no {needed} section{so}")
    analyze = there["analyze"] if isinstance(there.get("analyze"), Mapping) else {}
    if analyze.get("all_experts") and not analyze.get("data"):
        faults.append("analyze: all_experts needs text: add analyze.data")
    evaluate = there["evaluate"] if isinstance(there.get("evaluate"), Mapping) else None
    if evaluate is not None and not evaluate.get("data") and not evaluate.get("tasks"):
        faults.append("evaluate: nothing to measure: add evaluate.data or evaluate.tasks")
    outs: dict[str, list[str]] = {}
    for name, section in there.items():
        if isinstance(section, Mapping) and isinstance(section.get("out"), str):
            outs.setdefault(section["out"], []).append(name)
    if sections.get("as") and "convert" in there:
        faults.append("as: has no effect with convert, whose result has a known family")
    faults += [f"{' and '.join(names)} have the same output, {out}" for out, names in outs.items() if len(names) > 1]
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
        raise UserError(f"no recipe found at {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a recipe") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a mapping of sections", "`expertsmith recipes` has examples")
    faults = []
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        faults.append(explain(error, limit=50))
    faults += _chain_faults(raw)
    if faults:
        raise UserError(f"{path}: " + "; ".join(faults))
    return recipe


FEEDS = {  # section → the sections whose outputs it reads
    "convert": (),
    "calibrate": ("convert",),
    "analyze": ("convert", "calibrate"),
    "plan": ("convert", "calibrate"),
    "apply": ("convert", "plan"),
    "verify": ("apply",),
    "evaluate": ("convert", "apply"),
    "skip": ("convert", "plan"),
    "heal": ("convert", "apply"),
    "evaluate_healed": ("evaluate", "heal"),
    "compare": ("convert",),
}


def _needs(recipe: Recipe, model: str) -> dict[str, dict[str, Any]]:
    """What every step of a recipe is made with, by its name in FEEDS; all known before any of them runs."""
    gguf = recipe.convert.gguf_file if recipe.convert else None  # type: ignore[attr-defined]
    source = str(Path(model) / gguf) if gguf else open_checkpoint(model).fingerprint
    more = {"model": source, "as": recipe.as_type, "dtype": recipe.dtype}
    found: dict[str, dict[str, Any]] = {}
    for name, feeds in FEEDS.items():
        section = getattr(recipe, name.removesuffix("_healed"))
        if section is None or (name == "evaluate_healed" and "heal" not in found):
            continue
        if name in ("verify", "heal") and recipe.apply is None:
            continue
        asked = section.model_dump(mode="json") | ({"gguf": source} if gguf else {})
        found[name] = made_with(asked, more, {feed: found[feed] for feed in feeds if feed in found})
    return found


def _out(recipe: Recipe, name: str) -> str | None:
    """What a step writes: its output, or the report of `evaluate` (after healing: NAME_healed.html)."""
    section = getattr(recipe, name.removesuffix("_healed"), None)
    out = getattr(section, "out", None) or getattr(section, "report", None)
    if out is not None and name.endswith("_healed"):
        return str(Path(out).with_stem(f"{Path(out).stem}_healed"))
    return None if out is None else str(out)


def _check_outputs(recipe: Recipe, steps: Steps, needs: Mapping[str, Any], kept: Collection[str]) -> None:
    """Refuse outputs of unfinished steps that exist or cannot be written before any section runs, all in one message.

    Raises:
        UserError: the sections and their outputs.
    """
    faults = []
    for name in needs:
        out = _out(recipe, name)
        if out is None or name in kept:
            continue
        verb = name.removesuffix("_healed")
        given = dict(getattr(recipe, verb))
        given["overwrite"] = bool(given.get("overwrite")) or steps.replace
        if given.get("report"):
            given["report"] = out
        try:
            check_outputs(VERBS[verb].options, given)
            if any(option.opt.writes == "folder" for option in VERBS[verb].options):
                prepare_target(Path(out), None, given["overwrite"])
        except UserError as error:
            faults.append(f"{name}: {error.message}{steps.why(name, needs[name], out)}; {error.remedy}")
    if faults:
        raise UserError("; ".join(faults))


def run_recipe(
    recipe: Recipe, progress: Progress | None = None, *, file: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Run the sections in order; returns what each made, by section, and as `evaluate_healed` the quality after healing.

    Args:
        file: the recipe's own: finished steps are written down beside it (`steps_file`), and those that nothing changed for are kept.
        overwrite: start anew.
    """
    from expertsmith.calibration.spec import refuse_missing

    model = str(pinned(recipe.model, recipe.revision))
    sections = [getattr(recipe, name) for name in Recipe.model_fields]
    refuse_missing([spec for section in sections for key in ("data", "eval_data") for spec in getattr(section, key, ())])
    if file is not None:
        check_output(steps_file(file), "file", overwrite=True)
    steps = Steps(None if file is None else steps_file(file), overwrite)
    for asking in (recipe.evaluate, recipe.compare):
        if asking and asking.tasks:
            from expertsmith.evaluation import tasks

            tasks.refuse_missing(asking.task_path)
    with opened_as(model, recipe.as_type):
        job = _Job(recipe, steps, _needs(recipe, model), model, progress or Silent(), anew=overwrite)
        _check_outputs(recipe, steps, job.needs, job.kept)
        return job.run()


class _Job:
    """A recipe that runs: steps that are finished are not run again.

    Args:
        anew: nothing that an earlier run left is used.
    """

    def __init__(
        self, recipe: Recipe, steps: Steps, needs: dict[str, dict[str, Any]], model: str, progress: Progress, anew: bool
    ) -> None:
        self.recipe, self.steps, self.needs, self.model, self.progress, self.anew = recipe, steps, needs, model, progress, anew
        self.kept = {name for name, held in needs.items() if steps.unchanged(name, held, _out(recipe, name))}
        self.results: dict[str, Any] = {}
        self.where: dict[str, Any] = {"device": recipe.device, "memory": recipe.memory, "progress": progress}

    def run(self) -> dict[str, Any]:
        """Every section that the recipe has, in the order of FEEDS."""
        for name in self.needs:
            out = _out(self.recipe, name)
            if name in self.kept:
                self.progress.note(f"{name}: finished before, kept" + (f" ({out})" if out else ""))
                self.results[name] = self.steps.result(name, out)
            else:
                self.results[name] = getattr(self, f"_{name}")(self._options(name))
                if getattr(self.results[name], "passed", True):
                    self.steps.done(name, self.needs[name], out, self.results[name])
            if name == "convert":
                self.model = str(out)
        self.steps.end()
        return self.results

    def _options(self, name: str) -> dict[str, Any]:
        """The options of a section, as its verb takes them."""
        section = getattr(self.recipe, name.removesuffix("_healed"))
        options: dict[str, Any] = section.model_dump()
        verb = name.removesuffix("_healed")
        named = {option.name for option in VERBS[verb].options} if verb in VERBS else set()
        if self.steps.replace and "overwrite" in named:
            options["overwrite"] = True
        if self.anew and "resume" in named:
            options["resume"] = False
        if options.get("report"):
            options["report"] = _out(self.recipe, name)
        return options

    @property
    def _run_options(self) -> dict[str, Any]:
        return {**self.where, "dtype": self.recipe.dtype}

    @property
    def _stats(self) -> str | None:
        return _out(self.recipe, "calibrate")

    def _convert(self, options: dict[str, Any]) -> Any:
        run: dict[str, Any] = {"device": self.recipe.device, "dtype": self.recipe.dtype, "progress": self.progress}
        return convert(self.model, options.pop("method"), options.pop("out"), **options, **run)

    def _calibrate(self, options: dict[str, Any]) -> Any:
        return calibrate(self.model, **options, **self._run_options)

    def _analyze(self, options: dict[str, Any]) -> Any:
        options["stats"] = options["stats"] or self._stats
        return analyze(self.model, options.pop("out"), **options, **self._run_options)

    def _plan(self, options: dict[str, Any]) -> Any:
        options["stats"] = options["stats"] or self._stats
        return plan(self.model, **options, **self._run_options)

    def _apply(self, options: dict[str, Any]) -> Any:
        return apply(self.model, self.results["plan"], **options, progress=self.progress)

    def _verify(self, options: dict[str, Any]) -> Any:
        return verify(self.model, str(_out(self.recipe, "apply")), **options, **self.where)

    def _evaluate(self, options: dict[str, Any]) -> Any:
        return self._measured(_out(self.recipe, "apply") or self.model, options)

    def _evaluate_healed(self, options: dict[str, Any]) -> Any:
        return self._measured(str(_out(self.recipe, "heal")), options)

    def _measured(self, target: str, options: dict[str, Any]) -> Any:
        against = self.model if options.pop("reference") and target != self.model else None
        return evaluate(target, reference=against, **options, **self._run_options)

    def _skip(self, options: dict[str, Any]) -> Any:
        made = self.results.get("plan")
        return skip(self.model, options.pop("data"), options.pop("out"), plan=made, **options, **self._run_options)

    def _heal(self, options: dict[str, Any]) -> Any:
        dtype = "float32" if self.recipe.dtype == "auto" else self.recipe.dtype  # what `heal` itself takes
        student = str(_out(self.recipe, "apply"))
        return heal(student, self.model, options.pop("data"), options.pop("out"), dtype=dtype, **options, **self.where)

    def _compare(self, options: dict[str, Any]) -> Any:
        return compare(self.model, **options, **self._run_options)
