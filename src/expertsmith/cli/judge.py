"""What a model is worth next to its original: quality, tasks, speed, and many methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertsmith import show
from expertsmith.cli.options import (
    FLOW,
    As,
    AsJson,
    BatchTokens,
    Data,
    Device,
    Dtype,
    Memory,
    Model,
    Overlong,
    Pack,
    Pickle,
    Quiet,
    Resume,
    Revision,
    Samples,
    Seed,
    SeqLen,
    app,
    progress_of,
    word,
)
from expertsmith.errors import UserError

TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks", metavar="NAME,…", help="lm-eval tasks or groups; repeatable. Needs the extra eval.", show_default=False
    ),
]
TaskPath = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder of lm-eval task yamls, with data files next to them; repeatable. Python that a yaml names is run.",
        show_default=False,
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents a task at most.", show_default=False)]


@app.command(rich_help_panel=FLOW)
def evaluate(
    model: Model,
    data: Data = None,
    reference: Annotated[
        str | None, typer.Option("--reference", "-r", help="The original model: adds KL divergence, top-1 agreement and ESAP.")
    ] = None,
    tasks: TaskNames = None,
    task_path: TaskPath = None,
    limit: Limit = None,
    generate: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Also go on greedily for N tokens from prompts of --data: repetition, loops, answer format.",
        ),
    ] = 0,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="[DOMAIN=]REGEX",
            help="With --generate and data of prompt + response: what an answer has to hold. Repeatable.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Keep the answers to every finished task here, and go on from there.", show_default=False
        ),
    ] = None,
    resume: Resume = True,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 42,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory: Memory = "auto",
    as_type: As = None,
    revision: Revision = None,
    allow_pickle: Pickle = False,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed", help="Measure speed and memory in an engine, in turns with the reference; --data is optional then."
        ),
    ] = False,
    engine: Annotated[str, typer.Option(help="With --speed: transformers, vllm or llama.cpp.")] = "transformers",
    engine_python: Annotated[
        Path | None,
        typer.Option(
            help="Python of the engine's environment. Default: $EXPERTSMITH_VLLM or $EXPERTSMITH_LLAMA; of transformers this one.",
            show_default=False,
        ),
    ] = None,
    gguf_converter: Annotated[
        Path | None,
        typer.Option(
            help="llama.cpp's convert_hf_to_gguf.py, unless the models are .gguf files. Default: $EXPERTSMITH_LLAMA_CONVERTER.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="With --speed: prompts at once.")] = 1,
    prompt_len: Annotated[int, typer.Option(min=1, help="With --speed: tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="With --speed: tokens generated after each.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="With --speed: how often, in turns; medians are shown.")] = 5,
    energy: Annotated[bool, typer.Option("--energy", help="With --speed: watt hours, by codecarbon.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity by domain on held-out text, lm-eval tasks, and what the model writes, next to a reference; with --speed how fast both are.

    Differences in tasks and texts come with the standard error of the paired differences, document by document.

    [dim]expertsmith evaluate mixtral-half -r mistralai/Mixtral-8x7B-v0.1 --tasks hellaswag,arc_easy --limit 200[/dim]

    [dim]expertsmith evaluate mixtral-half -r mistralai/Mixtral-8x7B-v0.1 --speed --engine vllm --batch 8[/dim]
    """
    from expertsmith import api

    measured = None
    if speed and as_type is not None:
        raise UserError("--as says nothing to the engines of --speed, which load the checkpoint by themselves", "leave one out")
    if speed:
        measured = api.speed(
            model,
            revision=revision,
            reference=reference,
            engine=engine,
            python=engine_python,
            converter=gguf_converter,
            batch=batch,
            prompt_len=prompt_len,
            new_tokens=new_tokens,
            rounds=rounds,
            energy=energy,
            device=device,
            dtype=dtype,
            progress=progress_of(quiet),
        )
        if not as_json:
            show.show_speed(measured)
        if not data and not tasks:
            if as_json:
                show.as_json({"model": model, "reference": reference, "speed": measured})
            return
    quality = api.evaluate(
        model,
        data or (),
        revision=revision,
        reference=reference,
        tasks=tasks or (),
        task_path=task_path or (),
        limit=limit,
        generate=generate,
        formats=formats or (),
        out=out,
        resume=resume,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        memory=memory,
        as_type=as_type,
        allow_pickle=allow_pickle,
        progress=progress_of(quiet),
    ).to_json()
    if as_json:
        show.as_json({"model": model, "reference": reference, **quality, **({"speed": measured} if measured else {})})
    else:
        show.show_evaluation(quality, model)


@app.command(rich_help_panel=FLOW)
def compare(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Plans, finished cells, table, picture and page.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", metavar="NAME[:KEY=VALUE,…]", help="A method with its options, or all; repeatable."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", "-k", help="Routed experts that stay: ratio (0.5, 50%) or count; repeatable.")
    ] = None,
    data: Data = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", "-e", metavar="[DOMAIN=]SOURCE[:N]", help="Held-out text to judge on; repeatable."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="uniform (default), global or threshold (the methods' own, without --keep); repeatable.", show_default=False
        ),
    ] = None,
    heal: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:KEY=VALUE,…]", help="Also heal every plan on the calibration text; repeatable."),
    ] = None,
    tasks: TaskNames = None,
    task_path: TaskPath = None,
    limit: Limit = None,
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
    """Many methods × ratios from one calibration → one table and a picture of quality over size; random draws are always in it.

    Nothing is written but plans and numbers: each plan is judged on the loaded model. An interrupted run goes on after the last finished cell.

    [dim]expertsmith compare allenai/OLMoE-1B-7B-0924 -m all -k 0.75 -k 0.5 -d c4.jsonl -e heldout.jsonl -o olmoe-methods[/dim]
    """
    from expertsmith import api

    found = api.compare(
        model,
        method or (),
        keep or (),
        data or (),
        eval_data or (),
        out,
        revision=revision,
        budgets=budget or ("uniform",),
        heal=heal or (),
        tasks=tasks or (),
        task_path=task_path or (),
        limit=limit,
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
        show.as_json(found)
        return
    from expertsmith.comparison.terminal import show_comparison

    show_comparison(found, out)
