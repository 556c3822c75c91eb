"""Dense models into Mixtures of Experts, and models nursed back."""

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
    Data,
    Device,
    Dtype,
    EvalData,
    Memory,
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
    app,
    options_of,
    progress_of,
    word,
)

if TYPE_CHECKING:
    pass


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
    revision: Revision = None,
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
            revision=revision,
            experts=experts,
            top_k=top_k,
            shared=shared,
            active=active,
            active_of=word(active_of, "active-of", "mlp", "block"),
            router=router,
            target=target,
            export=word(export, "export", "plain", "core"),
            max_growth=max_growth,
            markers=markers,
            steps=steps,
            batch=batch,
            lr=lr,
            router_lr=router_lr,
            start=word(start, "start", "grouped", "dense"),
            widths=word(widths, "widths", "equal", "per_layer"),
            attention=word(attention, "attention", "none", "static", "dynamic"),
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
            progress=progress_of(quiet or rank > 0),
        )
    if rank > 0:
        return
    if as_json:
        show.as_json(result)
    else:
        show.show_conversion(result)


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
    requantise: Requantise = False,
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
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_type: As = None,
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
        revision=revision,
        method=method,
        options=options_of(option),
        requantise=requantise,
        eval_data=eval_data or (),
        device=device,
        dtype=dtype,
        memory=memory,
        resume=resume,
        overwrite=overwrite,
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
        show.as_json(report)
    else:
        show.show_healing(report)
