"""What a model is and does; what is known of methods, families and engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertsmith import show
from expertsmith.cli.options import (
    LOOK,
    As,
    AsJson,
    BatchTokens,
    Data,
    Device,
    Dtype,
    Memory,
    Model,
    Out,
    Overlong,
    Pack,
    Pickle,
    Quiet,
    Resume,
    Revision,
    Samples,
    Seed,
    SeqLen,
    Stats,
    app,
    progress_of,
    word,
)

if TYPE_CHECKING:
    pass


@app.command(rich_help_panel=LOOK)
def analyze(
    model: Model,
    out: Out,
    data: Data = None,
    stats: Stats = None,
    all_experts: Annotated[
        int,
        typer.Option(
            "--all-experts",
            min=0,
            metavar="TOKENS",
            help="Also run every expert on so many sampled tokens a domain: compares outputs and tests whether the router prefers large ones.",
        ),
    ] = 0,
    dense: Annotated[
        str | None,
        typer.Option(help="A dense model of the same hidden size to compare the experts with.", show_default=False),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", "-r", help="MODEL was made of this one: also what went and how routing moved."),
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="With --reference: the plan that was applied; default: the one inside MODEL.")
    ] = None,
    reference_stats: Annotated[
        Path | None, typer.Option(help="With --reference: its statistics on the same text, instead of calibrating it.")
    ] = None,
    neurons: Annotated[int, typer.Option(min=2, help="Neurons an expert that neuron matching samples.")] = 128,
    pairs: Annotated[int, typer.Option(min=1, help="Expert pairs a layer that neuron matching samples.")] = 32,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 42,
    pack: Pack = None,
    overlong: Overlong = "refuse",
    batch_tokens: BatchTokens = 8192,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory: Memory = "auto",
    resume: Resume = True,
    as_type: As = None,
    revision: Revision = None,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """What the experts do, as numbers (OUT/measures.json) and as one page to look at (OUT/report.html).

    From the weights alone; with --data also who is used for what and what a cut would lose.

    [dim]expertsmith analyze Qwen/Qwen1.5-MoE-A2.7B -d code=code.jsonl -d math=math.jsonl --all-experts 512 -o look[/dim]
    """
    from expertsmith import api

    measures = api.analyze(
        model,
        out,
        revision=revision,
        data=data or (),
        stats=stats,
        all_experts=all_experts,
        dense=dense,
        reference=reference,
        plan=plan_file,
        reference_stats=reference_stats,
        neurons=neurons,
        pairs=pairs,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        pack=pack,
        overlong=word(overlong, "overlong", "refuse", "truncate", "drop"),
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        memory=memory,
        resume=resume,
        as_type=as_type,
        allow_pickle=allow_pickle,
        progress=progress_of(quiet),
    )
    if as_json:
        show.as_json(measures)
        return
    from expertsmith.analysis.terminal import show_measures

    show_measures(measures, out)


@app.command(rich_help_panel=LOOK)
def inspect(
    model: Model, revision: Revision = None, as_type: As = None, allow_pickle: Pickle = False, as_json: AsJson = False
) -> None:
    """What a checkpoint is, from config and headers only, and what each keep ratio would leave."""
    from expertsmith import api

    facts = api.inspect(model, revision=revision, as_type=as_type, allow_pickle=allow_pickle)
    if as_json:
        show.as_json(facts)
        return
    show.show_inspection(facts)


@app.command(rich_help_panel=LOOK)
def lint(
    model: Model,
    engine: Annotated[str | None, typer.Option(help="transformers, vllm, sglang or llama.cpp; default: all.")] = None,
    tensor_parallel: Annotated[int, typer.Option("--tp", help="Tensor-parallel size you will serve with.")] = 1,
    expert_parallel: Annotated[int, typer.Option("--ep", help="Expert-parallel size you will serve with.")] = 1,
    as_type: As = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Will this engine serve this expert count, router and group layout? Exit code 1 if not."""
    from expertsmith import api

    findings = api.lint(
        model,
        revision=revision,
        as_type=as_type,
        engine=engine,
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
    )
    if as_json:
        show.as_json({"model": model, "findings": [finding.to_json() for finding in findings]})
    elif not findings:
        show.line(
            "[green]nothing found[/green] that would keep "
            + (engine or "transformers, vllm, sglang or llama.cpp")
            + " from serving this checkpoint"
        )
    else:
        colours = {"error": "red", "warning": "yellow", "info": "dim"}
        for finding in findings:
            show.line(
                f"[{colours[finding.level]}]{finding.level:7}[/] {finding.rule.engine}: "
                + show.escape(f"{finding.message}; {finding.remedy}" if finding.remedy else finding.message)
            )
            show.line(f"        [dim]{finding.rule.id} — {show.escape(finding.rule.source)}[/dim]")
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK)
def methods(as_json: AsJson = False) -> None:
    """The methods: what they compute, from what, with which options, and the paper."""
    from expertsmith.methods import methods as registered

    if as_json:
        show.as_json(
            [
                {
                    "name": m.name,
                    "title": m.title,
                    "paper": m.paper,
                    "reads": m.reads,
                    "gives": m.gives,
                    "budgets": m.budgets,
                    "options": m.options,
                    "cost": m.cost,
                    "limits": m.limits,
                    "doc": m.doc,
                }
                for m in registered().values()
            ]
        )
        return
    show.show_methods(list(registered().values()))


@app.command(rich_help_panel=LOOK)
def architectures(as_json: AsJson = False) -> None:
    """The model families: supported, partly supported, or refused with the reason."""
    from expertsmith.arch import families

    rows = list(families().values())
    if as_json:
        show.as_json(
            [
                {
                    "model_type": r.model_type,
                    "title": r.title,
                    "status": r.status,
                    "notes": r.notes,
                    "expert_groups": r.group_key is not None,
                }
                for r in rows
            ]
        )
        return
    table = show.table_of("model_type", "family", "status", "notes")
    for r in rows:
        colour = {"full": "green", "partial": "yellow", "refused": "red"}[r.status]
        table.add_row(f"[bold]{r.model_type}[/bold]", r.title, f"[{colour}]{r.status}[/]", show.escape(r.notes))
    show.line(table)
    show.line(f"{sum(r.supported for r in rows)} families supported")
