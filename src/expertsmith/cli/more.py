"""The demo, recipes, and other tools' formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertsmith import show
from expertsmith.cli.options import MORE, AsJson, Out, Quiet, app, progress_of

if TYPE_CHECKING:
    pass


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
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe.yaml")], as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Run a recipe: the stages of a job in one YAML file, checked as a whole first."""
    from expertsmith import api

    results = api.run(recipe, progress=progress_of(quiet))
    verdict, quality, made = results.get("verify"), results.get("evaluate"), results.get("plan")
    if as_json:
        show.as_json(
            {
                **({"calibrate": results["calibrate"].header} if "calibrate" in results else {}),
                **({"plan": made.to_json()} if made else {}),
                **({"apply": results["apply"]} if "apply" in results else {}),
                **({"verify": verdict.to_json()} if verdict else {}),
                **({"evaluate": quality.to_json()} if quality else {}),
            }
        )
    else:
        if made:
            show.show_plan(made)
        if verdict:
            show.show_verdict(verdict)
        if quality:
            show.show_evaluation(quality.to_json(), "held-out text")
    if verdict and not verdict.passed:
        raise typer.Exit(1)
