"""The stages of the main job, and all of them in one go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertsmith import show
from expertsmith.cli.options import (
    FLOW,
    As,
    AsJson,
    BatchTokens,
    Budget,
    Data,
    Device,
    Domains,
    Dtype,
    EvalData,
    Groups,
    Keep,
    Memory,
    Method,
    Model,
    Mtp,
    Options,
    Out,
    Overlong,
    Overwrite,
    Pack,
    Pickle,
    Quiet,
    Requantise,
    Resume,
    Revision,
    Samples,
    Seed,
    SeqLen,
    Stats,
    Uniform,
    app,
    options_of,
    progress_of,
    word,
)
from expertsmith.errors import UserError

if TYPE_CHECKING:
    from expertsmith.plan import Plan


@app.command(rich_help_panel=FLOW)
def compress(
    model: Model,
    method: Method,
    out: Out,
    keep: Keep = None,
    data: Data = None,
    stats: Stats = None,
    domain: Domains = None,
    budget: Budget = None,
    uniform: Uniform = False,
    option: Options = None,
    router_groups: Groups = "keep",
    mtp: Mtp = "keep",
    eval_data: EvalData = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure quality at the end.")] = True,
    heal: Annotated[
        str | None,
        typer.Option(
            help="Then heal on the same text: least_squares or layer_local (see `expertsmith heal`).", show_default=False
        ),
    ] = None,
    requantise: Requantise = False,
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
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_type: As = None,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Calibrate, plan, apply, verify and measure in one go.

    [dim]expertsmith compress mistralai/Mixtral-8x7B-v0.1 -m easy_ep -k 0.5 -d math=math.jsonl -e math=heldout.jsonl -o mixtral-math[/dim]
    """
    from expertsmith import api

    result = api.compress(
        model,
        method,
        keep,
        out,
        revision=revision,
        data=data or (),
        stats=stats,
        domains=domain or (),
        budget=budget,
        uniform=uniform,
        options=options_of(option),
        router_groups=word(router_groups, "router-groups", "keep", "flatten"),
        mtp=word(mtp, "mtp", "keep", "drop"),
        eval_data=eval_data or (),
        measure=measure,
        heal=heal,
        requantise=requantise,
        overwrite=overwrite,
        as_type=as_type,
        allow_pickle=allow_pickle,
        device=device,
        dtype=dtype,
        memory=memory,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        pack=pack,
        overlong=word(overlong, "overlong", "refuse", "truncate", "drop"),
        batch_tokens=batch_tokens,
        resume=resume,
        progress=progress_of(quiet),
    )
    verdict = result["verify"]
    if as_json:
        show.as_json(
            {
                **result,
                "plan": result["plan"].to_json(),
                "verify": verdict.to_json(),
            }
        )
    else:
        show.show_plan(result["plan"])
        for note in result["notes"][len(result["plan"].notes) :]:
            show.line(f"[yellow]note[/yellow] {show.escape(note)}")
        show.show_verdict(verdict)
        if heal:
            show.show_healing({"out": result["out"], **result["heal"]})
        if result["quality"]:
            show.show_quality(
                result["quality"],
                "held-out text"
                if result["quality"]["held_out"]
                else "the calibration text itself (flattering; pass --eval-data)",
            )
        show.line("seconds  " + ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items()))
        show.line(f"[bold]{show.escape(result['out'])}[/bold]  (plan inside: expertsmith/plan.json)")
    if not verdict.passed:
        raise typer.Exit(1)


@app.command(rich_help_panel=FLOW)
def calibrate(
    model: Model,
    out: Out,
    data: Data = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 42,
    pack: Pack = None,
    overlong: Overlong = "refuse",
    batch_tokens: BatchTokens = 8192,
    output_sum: Annotated[
        bool, typer.Option("--output-sum", help="Also sum the raw outputs of every expert over the tokens routed to it.")
    ] = False,
    all_outputs: Annotated[
        bool,
        typer.Option("--all-outputs", help="Also run every expert on every token and sum the outputs (for hc_smoe)."),
    ] = False,
    sample_tokens: Annotated[int, typer.Option(help="Also keep block inputs and outputs of this many tokens a domain.")] = 0,
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
    """One pass over text → the statistics of every criterion, by layer and domain.

    A run that was killed resumes after the last finished layer. Data-parallel: torchrun --nproc-per-node N -m expertsmith calibrate …
    """
    from expertsmith import api
    from expertsmith.calibration.distributed import ranks

    with ranks(device) as (rank, where):
        statistics = api.calibrate(
            model,
            data or (),
            out,
            revision=revision,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            pack=pack,
            overlong=word(overlong, "overlong", "refuse", "truncate", "drop"),
            batch_tokens=batch_tokens,
            output_sum=output_sum,
            all_outputs=all_outputs,
            sample_tokens=sample_tokens,
            device=where,
            dtype=dtype,
            memory=memory,
            resume=resume,
            as_type=as_type,
            allow_pickle=allow_pickle,
            progress=progress_of(quiet or rank > 0),
        )
    if rank > 0:
        return
    if as_json:
        show.as_json({"out": str(out), **statistics.header})
        return
    table = show.table_of(
        "domain",
        "tokens",
        "sequences",
        "least used expert",
        "most used expert",
        title=f"{len(statistics.layers)} MoE layers → {out}",
    )
    for name, count in statistics.tokens.items():
        shares = [
            entry.domains[name]["selections"] / max(1, entry.domains[name]["selections"].mean())
            for entry in statistics.layers.values()
        ]
        low, high = min(float(s.min()) for s in shares), max(float(s.max()) for s in shares)
        table.add_row(
            name,
            f"{count:,}",
            str(statistics.header["data"]["sequences"][name]),
            f"{low:.2f} × even share",
            f"{high:.2f} × even share",
        )
    show.line(table)


@app.command(rich_help_panel=FLOW)
def plan(
    model: Model,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="How experts are scored; see `expertsmith methods`.")
    ] = None,
    from_file: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Instead of a method: ordered lists (JSONL, with --keep), a mask or retained experts (JSON)."
        ),
    ] = None,
    keep: Keep = None,
    out: Out = Path("plan.json"),
    stats: Stats = None,
    data: Data = None,
    domain: Domains = None,
    budget: Budget = None,
    uniform: Uniform = False,
    option: Options = None,
    router_groups: Groups = "keep",
    mtp: Mtp = "keep",
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
    """Choose which experts stay → plan.json, small enough to read and to review.

    Seconds from statistics; with --data instead of --stats the calibration runs first. What is costly (measured weights, searches) is kept
    in OUT.measured, and an interrupted run goes on from there.
    """
    from expertsmith import api

    if (method is None) == (from_file is None):
        raise typer.BadParameter("a plan is made by a method or from a file: pass --method NAME or --from FILE")
    groups, ahead = word(router_groups, "router-groups", "keep", "flatten"), word(mtp, "mtp", "keep", "drop")
    if from_file is not None:
        made = api.plan_from(
            model,
            from_file,
            keep,
            router_groups=groups,
            mtp=ahead,
            out=out,
            revision=revision,
            as_type=as_type,
            allow_pickle=allow_pickle,
        )
        _show_made(made, out, as_json)
        return
    assert method is not None
    made = api.plan(
        model,
        method,
        keep,
        revision=revision,
        stats=stats,
        data=data or (),
        domains=domain or (),
        budget=budget,
        uniform=uniform,
        options=options_of(option),
        router_groups=groups,
        mtp=ahead,
        out=out,
        as_type=as_type,
        allow_pickle=allow_pickle,
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
        progress=progress_of(quiet),
    )
    _show_made(made, out, as_json)


def _show_made(made: Plan, out: Path, as_json: bool) -> None:
    if as_json:
        show.as_json(made.to_json())
    else:
        show.show_plan(made)
        show.line(f"[bold]{show.escape(str(out))}[/bold]")


@app.command(rich_help_panel=FLOW)
def apply(
    model: Model,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json")],
    out: Out,
    check_values: Annotated[
        bool, typer.Option("--check-values/--no-check-values", help="Look for NaN and inf in what is copied.")
    ] = True,
    pad: Annotated[
        bool,
        typer.Option(
            "--pad",
            help="Layers with different numbers of experts: fill all up with dead experts, so that stock engines load it (selection biases only; saves no memory).",
        ),
    ] = False,
    revision: Revision = None,
    requantise: Requantise = False,
    overwrite: Overwrite = False,
    as_type: As = None,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the smaller checkpoint, tensor by tensor; the model is never loaded.

    Layers that keep different numbers of experts are written with `per_layer_config`: `expertsmith.load` and transformers with
    trust_remote_code=True run them.
    """
    from expertsmith import api
    from expertsmith.plan import load_plan

    loaded = load_plan(plan_file)
    notes = api.apply(
        model,
        loaded,
        out,
        revision=revision,
        pad=pad,
        requantise=requantise,
        overwrite=overwrite,
        check_values=check_values,
        as_type=as_type,
        allow_pickle=allow_pickle,
        progress=progress_of(quiet),
    )
    summary = loaded.summary.model_dump() if loaded.summary else {}
    if as_json:
        show.as_json({"out": str(out), "notes": notes, "summary": summary})
        return
    for note in notes:
        show.line(f"[yellow]note[/yellow] {show.escape(note)}")
    show.line(
        f"[bold]{show.escape(str(out))}[/bold]  "
        + (f"{show.byte_count(summary['bytes'][0])} → {show.byte_count(summary['bytes'][1])}" if summary else "")
    )


@app.command(rich_help_panel=FLOW)
def dequantise(
    model: Model,
    out: Out,
    revision: Revision = None,
    overwrite: Overwrite = False,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a quantised checkpoint as plain bfloat16, one tensor at a time, and read it back.

    Every other command works on the quantised checkpoint itself; this is for tools that do not. `expertsmith inspect` names the format.
    """
    from expertsmith import api

    found = api.dequantise(
        model, out, revision=revision, overwrite=overwrite, allow_pickle=allow_pickle, progress=progress_of(quiet)
    )
    if as_json:
        show.as_json({"out": str(out), **found})
        return
    show.line(
        f"{found['weights']:,} weights decoded ({show.escape(found['format'])}), {found['tensors']:,} tensors read back as written  "
        f"[bold]{show.escape(str(out))}[/bold]  {show.byte_count(found['bytes'][0])} → {show.byte_count(found['bytes'][1])}"
    )
    for note in found["notes"]:
        show.line(f"[dim]{show.escape(note)}[/dim]")


@app.command(rich_help_panel=FLOW)
def skip(
    model: Model,
    out: Out,
    data: Data = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Prune or merge by this plan first; thresholds are calibrated on the result.")
    ] = None,
    statistic: Annotated[
        str, typer.Option(help="The threshold is the median (the paper), mean or quantile of the calibration tokens' values.")
    ] = "median",
    quantile: Annotated[
        float | None,
        typer.Option(help="With --statistic quantile: which one, 0 to 1. Higher skips more.", show_default=False),
    ] = None,
    active: Annotated[
        float | None,
        typer.Option(help="Instead: the wanted mean number of experts a token runs (top_k > 2).", show_default=False),
    ] = None,
    eval_data: EvalData = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure quality and speed at the end.")] = True,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 42,
    pack: Pack = None,
    overlong: Overlong = "refuse",
    batch_tokens: BatchTokens = 8192,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory: Memory = "auto",
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_type: As = None,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Dynamic skipping: tokens leave out experts of small routing weight; thresholds go with the checkpoint.

    `expertsmith.load(OUT)` and `evaluate` run it with skipping; other engines load OUT and skip nothing.

    [dim]expertsmith skip mistralai/Mixtral-8x7B-v0.1 -d c4.jsonl --plan plan.json -o mixtral-skip[/dim]
    """
    from expertsmith import api

    if (quantile is not None) != (statistic == "quantile"):
        raise UserError(
            f"--statistic is {statistic}" + (f", but --quantile {quantile:g} was given" if quantile is not None else ""),
            "pass both --statistic quantile and --quantile 0.7, or neither",
        )
    result = api.skip(
        model,
        data or (),
        out,
        revision=revision,
        plan=plan_file,
        statistic=word(statistic, "statistic", "median", "mean", "quantile"),
        quantile=0.5 if quantile is None else quantile,
        active=active,
        eval_data=eval_data or (),
        measure=measure,
        overwrite=overwrite,
        device=device,
        dtype=dtype,
        memory=memory,
        as_type=as_type,
        allow_pickle=allow_pickle,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        pack=pack,
        overlong=word(overlong, "overlong", "refuse", "truncate", "drop"),
        batch_tokens=batch_tokens,
        progress=progress_of(quiet),
    )
    if as_json:
        made = result["plan"]
        show.as_json({**result, "plan": made.to_json()})
        return
    show.show_skipping(result)


@app.command(rich_help_panel=FLOW)
def verify(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint to prove.")],
    plan_file: Annotated[Path | None, typer.Option("--plan", help="plan.json; default: the one inside OUT.")] = None,
    data: Data = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to compare on, about.")] = 1024,
    seq_len: SeqLen = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference allowed, relative to the largest value of the same layer.")
    ] = 1e-4,
    device: Device = "auto",
    dtype: Dtype = "float32",
    memory: Memory = "auto",
    as_type: As = None,
    revision: Revision = None,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove that OUT is MODEL without the dropped experts: bytes, every layer, logits. Exit code 1 if not."""
    from expertsmith import api

    verdict = api.verify(
        model,
        out,
        revision=revision,
        plan=plan_file,
        data=data or (),
        tokens=tokens,
        seq_len=seq_len,
        tolerance=tolerance,
        device=device,
        dtype=dtype,
        memory=memory,
        as_type=as_type,
        allow_pickle=allow_pickle,
        progress=progress_of(quiet),
    )
    if as_json:
        show.as_json(verdict.to_json())
    else:
        show.show_verdict(verdict, layers=True)
    if not verdict.passed:
        raise typer.Exit(1)
