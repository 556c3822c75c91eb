"""`run`: a recipe's stages, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from expertsmith.verbs.definition import MORE, VERBS, Opt, verb
from expertsmith.views import show
from expertsmith.views.progress import Progress


def _plain(result: Any) -> Any:
    """What a section made, as JSON."""
    if isinstance(result, dict):
        return {name: _plain(value) for name, value in result.items()}
    if hasattr(result, "to_json"):
        return result.to_json()
    return getattr(result, "header", result)  # statistics are shown by what they were made from


def _show(results: Any, given: Mapping[str, Any]) -> None:
    from expertsmith.verbs.recipe import load_recipe

    asked = load_recipe(given["recipe"])
    for name, result in results.items():
        if name == "plan":
            show.show_plan(result)
        elif name == "verify":
            show.show_verdict(result)
        elif name in ("evaluate", "evaluate_healed"):
            show.show_evaluation(result.to_json(), "held-out text" + (", healed" if name == "evaluate_healed" else ""))
        elif name in ("convert", "analyze", "skip", "heal", "compare"):
            VERBS[name].show(result, {"out": getattr(asked, name).out})


def _keeps(given: Mapping[str, Any]) -> list[Path]:
    """What the sections that have begun left."""
    from expertsmith.verbs.recipe import load_recipe

    sections = {name: section for name, section in load_recipe(given["recipe"]) if getattr(section, "out", None) is not None}
    outs = [Path(section.out) for section in sections.values()]
    return [*outs, *(place for name, section in sections.items() for place in VERBS[name].keeps(dict(section)))]


@verb(
    MORE,
    show=_show,
    plain=lambda results, given: _plain(results),
    passed=lambda results: "verify" not in results or results["verify"].passed,
    keeps=_keeps,
)
def run(
    recipe: Annotated[str | Path, Opt("recipe.yaml", argument=True, metavar="RECIPE", kind=Path)],
    overwrite: Annotated[bool, Opt("Start anew, and replace what earlier runs of the recipe made.", "--overwrite")] = False,
    progress: Annotated[Progress | None, Opt("")] = None,
) -> dict[str, Any]:
    """Run a recipe: the stages of a job in one YAML file, checked as a whole first.

    Every fault of the file is reported before anything runs. Finished steps are written down in RECIPE.steps.json, beside the recipe. Run again,
    a recipe keeps those whose inputs and options did not change; an output that would change is refused without --overwrite.
    """
    from expertsmith.verbs.recipe import load_recipe, run_recipe  # pydantic models of every section: for this only

    return run_recipe(load_recipe(recipe), progress, file=Path(recipe), overwrite=overwrite)
