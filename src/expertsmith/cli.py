"""The command line: one command per function of `api`. Knows no mathematics; tables go to stdout, progress to stderr."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from expertsmith import show
from expertsmith.errors import UserError

if TYPE_CHECKING:
    from expertsmith.plan import Plan
    from expertsmith.progress import Progress

app = typer.Typer(
    name="expertsmith",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Remove the experts that you do not need from a Mixture-of-Experts language model, and prove the result right.

    model + data ─calibrate→ statistics ─plan→ plan.json ─apply→ checkpoint ─verify, evaluate→ report

    Each arrow leaves a file, and every stage reruns alone from the file before it. `compress` does all of it in one go; `demo` shows
    it offline in under a minute.""",
)

FLOW, LOOK, MORE = "The flow", "Look", "More"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory, or owner/name on the Hugging Face hub.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        metavar="[DOMAIN=]SOURCE[:N]",
        help="Text: .jsonl/.json/.txt/.md/.parquet file, folder, or hub data set name\\[subset](split). Records hold text, messages, prompt + response, or input_ids. Repeatable.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Where the result goes.")]
Method = Annotated[str, typer.Option("--method", "-m", help="How experts are scored; see `expertsmith methods`.")]
Keep = Annotated[
    str | None,
    typer.Option(
        "--keep",
        "-k",
        help="Routed experts that stay in each layer: a ratio (0.5, 50%) or a count (4). Methods with a threshold of their own do without.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="uniform: every layer keeps the same number; global: the layers share one total; threshold: what the method's own threshold says. Default: the method's usual.",
        show_default=False,
    ),
]
Uniform = Annotated[
    bool,
    typer.Option(
        "--uniform",
        help="Of a budget that leaves layers different numbers, the nearest plan that stock engines load, and what it costs.",
    ),
]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-O", metavar="KEY=VALUE", help="Option of the method; repeatable.")
]
Domains = Annotated[list[str] | None, typer.Option("--domain", help="Use only this domain of the statistics; repeatable.")]
Groups = Annotated[
    str,
    typer.Option(
        "--router-groups", help="Group-limited routers: keep drops the same number from each group; flatten sets n_group = 1."
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Sequences a domain, drawn with --seed.")]
SeqLen = Annotated[
    int | None,
    typer.Option(help="Tokens a sequence at most. Default: 2048, or the model's window if less.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]
Pack = Annotated[
    bool | None,
    typer.Option(
        "--pack/--no-pack",
        help="Join texts into full sequences, or one record a sequence. Default: texts are packed, demonstrations are not.",
        show_default=False,
    ),
]
Overlong = Annotated[str, typer.Option(help="A record longer than the window without packing: refuse, truncate or drop.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens that run at once.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32 or bfloat16.")]
Memory = Annotated[
    str, typer.Option(help="resident: whole model; stream: one decoder layer at a time; auto decides by free memory.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One machine-readable object on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read a pickle-only checkpoint (with weights_only).")]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="Complete what an interrupted run left, or start again.")]
EvalData = Annotated[
    list[str] | None,
    typer.Option(
        "--eval-data",
        "-e",
        metavar="[DOMAIN=]SOURCE[:N]",
        help="Held-out text to measure the loss of quality on; repeatable. Without it the calibration text is used.",
    ),
]
Stats = Annotated[Path | None, typer.Option("--stats", "-s", help="Statistics folder made by `expertsmith calibrate`.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from expertsmith import __version__

        print(f"expertsmith {__version__}")
        raise typer.Exit


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
    eval_data: EvalData = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure quality at the end.")] = True,
    heal: Annotated[
        str | None,
        typer.Option(
            help="Then heal on the same text: least_squares or layer_local (see `expertsmith heal`).", show_default=False
        ),
    ] = None,
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
    overwrite: Overwrite = False,
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
        data=data or (),
        stats=stats,
        domains=domain or (),
        budget=budget,
        uniform=uniform,
        options=_options(option),
        router_groups=_word(router_groups, "router-groups", "keep", "flatten"),
        eval_data=eval_data or (),
        measure=measure,
        heal=heal,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        device=device,
        dtype=dtype,
        memory=memory,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        pack=pack,
        overlong=_word(overlong, "overlong", "refuse", "truncate", "drop"),
        batch_tokens=batch_tokens,
        resume=resume,
        progress=_progress(quiet),
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
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            pack=pack,
            overlong=_word(overlong, "overlong", "refuse", "truncate", "drop"),
            batch_tokens=batch_tokens,
            output_sum=output_sum,
            all_outputs=all_outputs,
            sample_tokens=sample_tokens,
            device=where,
            dtype=dtype,
            memory=memory,
            resume=resume,
            allow_pickle=allow_pickle,
            progress=_progress(quiet or rank > 0),
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
    groups = _word(router_groups, "router-groups", "keep", "flatten")
    if from_file is not None:
        made = api.plan_from(model, from_file, keep, router_groups=groups, out=out, allow_pickle=allow_pickle)
        _show_made(made, out, as_json)
        return
    assert method is not None
    made = api.plan(
        model,
        method,
        keep,
        stats=stats,
        data=data or (),
        domains=domain or (),
        budget=budget,
        uniform=uniform,
        options=_options(option),
        router_groups=groups,
        out=out,
        allow_pickle=allow_pickle,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        pack=pack,
        overlong=_word(overlong, "overlong", "refuse", "truncate", "drop"),
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        memory=memory,
        resume=resume,
        progress=_progress(quiet),
    )
    _show_made(made, out, as_json)


def _show_made(made: Plan, out: Path, as_json: bool) -> None:
    if as_json:
        show.as_json(made.to_json())
    else:
        show.show_plan(made)
        show.line(f"[bold]{show.escape(str(out))}[/bold]")


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
    overwrite: Overwrite = False,
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
        pad=pad,
        overwrite=overwrite,
        check_values=check_values,
        allow_pickle=allow_pickle,
        progress=_progress(quiet),
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
def convert(
    dense: Annotated[
        str,
        typer.Argument(
            metavar="DENSE", help="Dense model: directory, owner/name on the hub, or with --gguf-file the folder of that file."
        ),
    ],
    method: Annotated[
        str, typer.Option("--method", "-m", help="tomoe (trained), or cmoe, moefication, expertweaver, random (training-free).")
    ],
    out: Out,
    experts: Annotated[
        int | None, typer.Option(help="Routed experts of every layer. Default: 8; tomoe 4.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts a token runs. Default: what --active asks for; tomoe: 1.", show_default=False)
    ] = None,
    shared: Annotated[
        int, typer.Option(help="Always-on experts, of the routed experts' width; they also take neurons that do not divide.")
    ] = 0,
    active: Annotated[
        float | None,
        typer.Option("--active", "-a", help="Share of the parameters that a token uses. Default: 0.5.", show_default=False),
    ] = None,
    active_of: Annotated[str, typer.Option("--active-of", help="… of the mlp, or of the block: attention and MLP.")] = "mlp",
    router: Annotated[
        str | None, typer.Option(help="ridge, centroid, gate_mean or random. Default: the method's usual.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Architecture of the result, where there is a choice: mixtral or granitemoeshared.", show_default=False
        ),
    ] = None,
    export: Annotated[
        str,
        typer.Option(help="tomoe: plain writes experts whole; core writes what all of them have once, as an always-on part."),
    ] = "plain",
    max_growth: Annotated[
        float, typer.Option(help="Refuse a result with more parameters than this times the dense model's.")
    ] = 2.0,
    markers: Annotated[
        int | None,
        typer.Option(
            help="cmoe: neurons marked as active per token. Default: 10, or 1 % of the neurons if more.", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="tomoe: training steps; 0 writes the start.")] = 300,
    batch: Annotated[int, typer.Option(help="tomoe: sequences a step, over all processes.")] = 1,
    lr: Annotated[float, typer.Option(help="tomoe: learning rate of the masks.")] = 2e-3,
    router_lr: Annotated[float, typer.Option(help="tomoe: learning rate of the routers.")] = 1e-3,
    start: Annotated[
        str,
        typer.Option(
            help="tomoe: grouped starts from tokens and neurons grouped together; dense from all neurons, as published."
        ),
    ] = "grouped",
    widths: Annotated[
        str,
        typer.Option(
            help="tomoe: equal, or per_layer: layers share the budget, and narrower ones are padded in a stock checkpoint."
        ),
    ] = "equal",
    attention: Annotated[
        str,
        typer.Option(
            help="tomoe: static prunes query-key dimensions, dynamic also masks value dimensions for every token (saves no arithmetic). Such a result runs in transformers only."
        ),
    ] = "none",
    data: Data = None,
    eval_data: EvalData = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure quality and speed at the end.")] = True,
    samples: Annotated[
        int | None, typer.Option(help="Sequences a domain. Default: 32; tomoe: as many as the steps need.", show_default=False)
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    seed: Seed = 42,
    gguf_file: Annotated[
        str | None, typer.Option("--gguf-file", help="Name of a GGUF file in DENSE; it is dequantised into OUT.dense once.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="tomoe: go on from OUT.training, or start again.")] = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """A dense model as a Mixture of Experts that stock engines load, without weight updates.

    Llama, Mistral, Qwen2/2.5 and Qwen3 become Mixtral, GraniteMoeShared, Qwen2-MoE and Qwen3-MoE. Neurons of the MLPs become experts; attention stays.

    ToMoE's training goes on where it was interrupted. Data-parallel: torchrun --nproc-per-node N -m expertsmith convert …

    [dim]expertsmith convert HuggingFaceTB/SmolLM2-135M -m cmoe --experts 6 --shared 2 -a 0.5 -d text.jsonl -e heldout.jsonl -o smol-moe[/dim]

    [dim]expertsmith convert HuggingFaceTB/SmolLM2-135M -m tomoe -a 0.5 -d text.jsonl --steps 300 -o smol-tomoe[/dim]
    """
    from expertsmith import api
    from expertsmith.calibration.distributed import ranks

    with ranks(device) as (rank, where):
        result = api.convert(
            dense,
            method,
            out,
            experts=experts,
            top_k=top_k,
            shared=shared,
            active=active,
            active_of=_word(active_of, "active-of", "mlp", "block"),
            router=router,
            target=target,
            export=_word(export, "export", "plain", "core"),
            max_growth=max_growth,
            markers=markers,
            steps=steps,
            batch=batch,
            lr=lr,
            router_lr=router_lr,
            start=_word(start, "start", "grouped", "dense"),
            widths=_word(widths, "widths", "equal", "per_layer"),
            attention=_word(attention, "attention", "none", "static", "dynamic"),
            data=data or (),
            eval_data=eval_data or (),
            measure=measure,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            gguf_file=gguf_file,
            device=where,
            dtype=dtype,
            resume=resume,
            overwrite=overwrite,
            progress=_progress(quiet or rank > 0),
        )
    if rank > 0:
        return
    if as_json:
        show.as_json(result)
    else:
        show.show_conversion(result)


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
    overwrite: Overwrite = False,
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
        plan=plan_file,
        statistic=_word(statistic, "statistic", "median", "mean", "quantile"),
        quantile=0.5 if quantile is None else quantile,
        active=active,
        eval_data=eval_data or (),
        measure=measure,
        overwrite=overwrite,
        device=device,
        dtype=dtype,
        memory=memory,
        allow_pickle=allow_pickle,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        pack=pack,
        overlong=_word(overlong, "overlong", "refuse", "truncate", "drop"),
        batch_tokens=batch_tokens,
        progress=_progress(quiet),
    )
    if as_json:
        made = result["plan"]
        show.as_json({**result, "plan": made.to_json()})
        return
    show.show_skipping(result)


@app.command(rich_help_panel=FLOW)
def heal(
    model: Annotated[str, typer.Argument(metavar="OUT", help="The compressed checkpoint.")],
    teacher: Annotated[str, typer.Option("--teacher", "-t", help="The original model.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT2", help="Where the healed checkpoint goes.")],
    data: Data = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="least_squares, layer_local, router or lora.")
    ] = "least_squares",
    option: Options = None,
    eval_data: EvalData = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 42,
    pack: Pack = None,
    overlong: Overlong = "refuse",
    batch_tokens: BatchTokens = 8192,
    device: Device = "auto",
    dtype: Dtype = "float32",
    memory: Memory = "auto",
    resume: Resume = True,
    overwrite: Overwrite = False,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Recover a compressed model towards its original; nothing that is worse on held-out tokens is accepted.

    least_squares: down projections in closed form, layer by layer, resident or streamed. layer_local: the same, then router, gate, up and down
    projections by gradients within each layer. router: router rows by distillation. lora: merged adapters (needs peft).

    [dim]expertsmith heal mixtral-half --teacher mistralai/Mixtral-8x7B-v0.1 -m layer_local -d c4.jsonl -o mixtral-half-healed[/dim]
    """
    from expertsmith import api

    report = api.heal(
        model,
        teacher,
        data or (),
        out,
        method=method,
        options=_options(option),
        eval_data=eval_data or (),
        device=device,
        dtype=dtype,
        memory=memory,
        resume=resume,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        pack=pack,
        overlong=_word(overlong, "overlong", "refuse", "truncate", "drop"),
        batch_tokens=batch_tokens,
        progress=_progress(quiet),
    )
    if as_json:
        show.as_json(report)
    else:
        show.show_healing(report)


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
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove that OUT is MODEL without the dropped experts: bytes, every layer, logits. Exit code 1 if not."""
    from expertsmith import api

    verdict = api.verify(
        model,
        out,
        plan=plan_file,
        data=data or (),
        tokens=tokens,
        seq_len=seq_len,
        tolerance=tolerance,
        device=device,
        dtype=dtype,
        memory=memory,
        allow_pickle=allow_pickle,
        progress=_progress(quiet),
    )
    if as_json:
        show.as_json(verdict.to_json())
    else:
        show.show_verdict(verdict, layers=True)
    if not verdict.passed:
        raise typer.Exit(1)


@app.command(rich_help_panel=FLOW)
def evaluate(
    model: Model,
    data: Data = None,
    reference: Annotated[
        str | None, typer.Option("--reference", "-r", help="The original model: adds KL divergence, top-1 agreement and ESAP.")
    ] = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 42,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory: Memory = "auto",
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity by domain on held-out text, and how far the model is from a reference."""
    from expertsmith import api

    quality = api.evaluate(
        model,
        data or (),
        reference=reference,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        memory=memory,
        allow_pickle=allow_pickle,
        progress=_progress(quiet),
    ).to_json()
    if as_json:
        show.as_json({"model": model, "reference": reference, **quality})
    else:
        show.show_quality(quality, model)


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
        overlong=_word(overlong, "overlong", "refuse", "truncate", "drop"),
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        memory=memory,
        resume=resume,
        allow_pickle=allow_pickle,
        progress=_progress(quiet),
    )
    if as_json:
        show.as_json(measures)
        return
    from expertsmith.analysis.terminal import show_measures

    show_measures(measures, out)


@app.command(rich_help_panel=LOOK)
def inspect(model: Model, allow_pickle: Pickle = False, as_json: AsJson = False) -> None:
    """What a checkpoint is, from config and headers only, and what each keep ratio would leave."""
    from expertsmith import api

    facts = api.inspect(model, allow_pickle=allow_pickle)
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
    as_json: AsJson = False,
) -> None:
    """Will this engine serve this expert count, router and group layout? Exit code 1 if not."""
    from expertsmith import api

    findings = api.lint(model, engine=engine, tensor_parallel=tensor_parallel, expert_parallel=expert_parallel)
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


@app.command(rich_help_panel=MORE)
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report and the checkpoints.")] = Path("demo-output"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The whole flow on a small model that comes with the package: offline, under a minute on two cores."""
    from expertsmith.demo import run_demo

    result = run_demo(out, _progress(quiet))
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

    results = api.run(recipe, progress=_progress(quiet))
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
            show.show_quality(quality.to_json(), "held-out text")
    if verdict and not verdict.passed:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line. A user's mistake ends in one line and exit code 2; `--debug` shows where it came from."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments, prog_name="expertsmith")
    except UserError as error:
        if debug:
            raise
        _fail(str(error))
    except (MemoryError, OSError, RuntimeError) as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(f"the disk is full{f' ({error.filename})' if error.filename else ''}")
        if not _out_of_memory(error):
            raise
        _fail("memory ran out; run with --memory stream and a smaller --batch-tokens, or on a larger machine")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _out_of_memory(error: Exception) -> bool:
    """Whether the system or torch had no more memory to give (torch says so in a RuntimeError's text)."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _options(pairs: list[str] | None) -> dict[str, str]:
    values = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"-O {pair!r} is not KEY=VALUE")
        values[key] = value
    return values


def _word(value: str, option: str, *allowed: str) -> Any:
    if value not in allowed:
        raise UserError(f"--{option} is {value!r}", f"choose {' or '.join(allowed)}")
    return value


def _progress(quiet: bool) -> Progress:
    from expertsmith.progress import Bar, Silent

    return Silent() if quiet else Bar()
