"""The demo, recipes, and other tools' formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertsmith import show
from expertsmith.cli.options import MORE, AsJson, Out, Quiet, app, progress_of
from expertsmith.errors import UserError

if TYPE_CHECKING:
    from expertsmith.recipe import Recipe


@app.command(rich_help_panel=MORE)
def export(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json")],
    format: Annotated[str, typer.Option("--format", "-f", help="ordered (JSONL), mask or retained (JSON).")],
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Write a plan's choice of experts in a format that other tools read; `plan --from FILE` reads them."""
    from expertsmith import api

    api.export(plan_file, format, out)
    if as_json:
        show.as_json({"out": str(out), "format": format})
    else:
        show.line(f"[bold]{show.escape(str(out))}[/bold]")


@app.command(rich_help_panel=MORE)
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report and the checkpoints.")] = Path("demo-output"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The whole flow on a small model that comes with the package: offline, under a minute on two cores."""
    from expertsmith.demo import run_demo

    result = run_demo(out, progress_of(quiet))
    if as_json:
        show.as_json(result)
        return
    table = show.table_of(
        "kept experts",
        *(f"{name}\nperplexity" for name in result["domains"]),
        "verify",
        title=f"Half of the experts, chosen for {result['target']}",
    )
    for row in result["rows"]:
        cells = [
            f"[bold]{row['perplexity'][name]:.1f}[/bold]" if name == result["target"] else f"{row['perplexity'][name]:.1f}"
            for name in result["domains"]
        ]
        table.add_row(row["label"], *cells, row["verify"])
    show.line(table)
    show.line(show.escape(result["summary"]))
    show.line(f"[bold]{show.escape(result['report'])}[/bold]")
    show.line(f"[bold]{show.escape(result['analysis'])}[/bold]  (what the experts do)")


@app.command(rich_help_panel=MORE)
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Copy this one.", show_default=False)] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="File or folder to copy it to. Default: NAME.yaml here.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The recipes that come along; with NAME, a copy to edit and to run."""
    from expertsmith.recipes import copy, shipped

    if name is None and to is not None:
        raise UserError("--to was given, but no recipe to copy", "expertsmith recipes NAME --to FILE")
    if name is not None:
        target = copy(name, to or Path(f"{name}.yaml"))
        if as_json:
            show.as_json({"name": name, "out": str(target)})
        else:
            show.line(f"[bold]expertsmith run {show.escape(str(target))}[/bold]")
        return
    if as_json:
        show.as_json([{"name": r.name, "about": r.about, "needs": r.needs, "size": r.size} for r in shipped().values()])
        return
    for entry in shipped().values():
        show.line(f"[bold]{entry.name}[/bold]  {show.escape(entry.about)}")
        show.line(f"    [dim]needs {show.escape(entry.needs)}; {show.escape(entry.size)}[/dim]")


@app.command(rich_help_panel=MORE)
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe.yaml")], as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Run a recipe: the stages of a job in one YAML file, checked as a whole first."""
    from expertsmith.recipe import load_recipe, run_recipe

    asked = load_recipe(recipe)
    results = run_recipe(asked, progress_of(quiet))
    verdict = results.get("verify")
    if as_json:
        show.as_json({name: _plain(result) for name, result in results.items()})
    else:
        for name, result in results.items():
            _show_result(name, result, asked)
    if verdict and not verdict.passed:
        raise typer.Exit(1)


def _plain(result: Any) -> Any:
    """What a section made, as JSON."""
    if isinstance(result, dict):
        return {name: _plain(value) for name, value in result.items()}
    if hasattr(result, "to_json"):
        return result.to_json()
    return getattr(result, "header", result)  # statistics are shown by what they were made from


def _show_result(name: str, result: Any, asked: Recipe) -> None:
    if name == "convert":
        show.show_conversion(result)
    elif name == "analyze":
        from expertsmith.analysis.terminal import show_measures

        assert asked.analyze is not None
        show_measures(result, Path(asked.analyze.out))
    elif name == "plan":
        show.show_plan(result)
    elif name == "verify":
        show.show_verdict(result)
    elif name in ("evaluate", "evaluate_healed"):
        show.show_evaluation(result.to_json(), "held-out text" + (", healed" if name == "evaluate_healed" else ""))
    elif name == "skip":
        show.show_skipping(result)
    elif name == "heal":
        show.show_healing(result)
    elif name == "compare":
        from expertsmith.comparison.terminal import show_comparison

        assert asked.compare is not None
        show_comparison(result, Path(asked.compare.out))
