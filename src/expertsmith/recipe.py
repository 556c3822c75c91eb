"""A recipe: the stages of one job in a YAML file, checked as a whole before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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
    sample_tokens: int = Field(0, ge=0)

    @field_validator("data")
    @classmethod
    def _specs(cls, value: list[str]) -> list[str]:
        return _specs(value)


class PlanStep(_Step):
    """Options of `expertsmith plan`. `stats` defaults to what `calibrate` of the same recipe makes."""

    method: str
    keep: float | int | str
    out: str
    stats: str | None = None
    domains: list[str] = Field(default_factory=list)
    budget: Literal["uniform", "global"] = "uniform"
    options: dict[str, Any] = Field(default_factory=dict)
    router_groups: Literal["keep", "flatten"] = "keep"

    @model_validator(mode="after")
    def _known(self) -> PlanStep:
        from expertsmith.methods import find
        from expertsmith.selection import parse_keep

        try:
            find(self.method).parse_options(self.options)
            parse_keep(self.keep)
        except UserError as error:
            raise ValueError(str(error)) from None
        return self


class Apply(_Step):
    """Options of `expertsmith apply`."""

    out: str
    overwrite: bool = False


class Verify(_Step):
    """Options of `expertsmith verify`."""

    data: list[str] = Field(default_factory=list)
    tokens: int = Field(1024, ge=1)
    tolerance: float = Field(1e-4, gt=0)


class Evaluate(_Step):
    """Options of `expertsmith evaluate`; the recipe's model is the reference unless `reference` is false."""

    data: list[str] = Field(min_length=1)
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
    device: str = "auto"
    dtype: str = "auto"
    memory: Literal["auto", "resident", "stream"] = "auto"
    calibrate: Calibrate | None = None
    plan: PlanStep | None = None
    apply: Apply | None = None
    verify: Verify | None = None
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _chain(self) -> Recipe:
        from expertsmith.methods import methods

        faults = []
        if (
            self.plan
            and self.plan.method in methods()
            and not methods()[self.plan.method].data_free
            and not (self.plan.stats or self.calibrate)
        ):
            faults.append(f"plan: method {self.plan.method} needs statistics: add a calibrate section or plan.stats")
        if self.apply and not self.plan:
            faults.append("apply: there is no plan section")
        if self.verify and not self.apply:
            faults.append("verify: there is no apply section")
        if not (self.calibrate or self.plan or self.evaluate):
            faults.append("nothing to do: add calibrate, plan or evaluate")
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _specs(value: list[str]) -> list[str]:
    from expertsmith.calibration.spec import parse_spec

    for text in value:
        try:
            parse_spec(text)
        except UserError as error:
            raise ValueError(str(error)) from None
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
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: " + explain(error, limit=20)) from None


def run_recipe(recipe: Recipe, progress: Progress | None = None) -> dict[str, Any]:
    """Run the sections in order; returns what each made, by section."""
    from expertsmith import api

    results: dict[str, Any] = {}
    where: dict[str, Any] = {"device": recipe.device, "memory": recipe.memory, "progress": progress}
    if recipe.calibrate:
        results["calibrate"] = api.calibrate(recipe.model, **recipe.calibrate.model_dump(), dtype=recipe.dtype, **where)
    if recipe.plan:
        options = recipe.plan.model_dump()
        options["stats"] = options["stats"] or (recipe.calibrate.out if recipe.calibrate else None)
        results["plan"] = api.plan(recipe.model, **options, progress=progress)
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
