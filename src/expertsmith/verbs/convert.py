"""`convert`: a dense model as a Mixture of Experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from expertsmith.calibration.opening import beside
from expertsmith.checkpoint.work import work_of
from expertsmith.verbs.definition import FLOW, Opt, out_and, verb
from expertsmith.verbs.options import Columns, Data, EvalData, Out, Overwrite, Pack, Track
from expertsmith.views import show
from expertsmith.views.progress import Progress
from expertsmith.views.tracking import tracked


def _show(result: Any, given: Mapping[str, Any]) -> None:
    show.show_conversion(result)
    work, dense = work_of(Path(result["out"])), beside(result["out"], "dense")
    if work.exists():
        show.line(
            f"{show.escape(str(work))} has the training; --overwrite with another --export uses it. Delete it when you are done."
        )
    if dense.exists():
        show.line(
            f"{show.escape(str(dense))} is the dequantised dense model: the reference of `evaluate`, the teacher of `heal`"
        )


@verb(FLOW, show=_show, keeps=out_and("work", "dense"), ranks=True)
def convert(
    dense: Annotated[
        str | Path,
        Opt(
            "Dense model: directory, owner/name on the hub, or with --gguf-file the folder of that file.",
            argument=True,
            metavar="DENSE",
            kind=str,
        ),
    ],
    method: Annotated[
        str, Opt("tomoe (trained), or cmoe, moefication, expertweaver, random (training-free).", "--method", "-m")
    ],
    out: Out,
    *,
    experts: Annotated[int | None, Opt("Routed experts of every layer. Default: 8; tomoe 4.", shown=False)] = None,
    top_k: Annotated[int | None, Opt("Experts per token. Default: from --active; tomoe: 1.", shown=False)] = None,
    shared: Annotated[int, Opt("Always-on experts, with the routed experts' width; they also take the remaining neurons.")] = 0,
    active: Annotated[
        float | None,
        Opt("Share of the parameters that a token uses. Default: 0.5.", "--active", "-a", shown=False),
    ] = None,
    active_of: Annotated[
        Literal["mlp", "block"], Opt("… of the mlp, or of the block: attention and MLP.", "--active-of")
    ] = "mlp",
    router: Annotated[
        str | None, Opt("ridge, centroid, gate_mean or random. Default: the method's usual.", shown=False)
    ] = None,
    target: Annotated[
        str | None,
        Opt("Architecture of the result, if there is a choice: mixtral or granitemoeshared.", shown=False),
    ] = None,
    export: Annotated[
        Literal["plain", "core"],
        Opt("tomoe: plain writes whole experts; core writes neurons that all experts share once, as an always-on part."),
    ] = "plain",
    max_growth: Annotated[float, Opt("Limit of the result's parameters, as a multiple of the dense model's.")] = 2.0,
    markers: Annotated[
        int | None,
        Opt("cmoe: neurons marked as active per token. Default: 10, or 1 % of the neurons if more.", shown=False),
    ] = None,
    steps: Annotated[int, Opt("tomoe: training steps; 0 writes the untrained start.")] = 300,
    batch: Annotated[int, Opt("tomoe: sequences per step, over all processes.")] = 1,
    lr: Annotated[float, Opt("tomoe: learning rate of the masks.")] = 2e-3,
    router_lr: Annotated[float, Opt("tomoe: learning rate of the routers.")] = 1e-3,
    start: Annotated[
        Literal["grouped", "dense"],
        Opt("tomoe: grouped starts from co-clustered tokens and neurons; dense starts from all neurons, as published."),
    ] = "grouped",
    widths: Annotated[
        Literal["equal", "per_layer"],
        Opt("tomoe: equal, or per_layer: layers share the budget; narrower layers are padded in a stock checkpoint."),
    ] = "equal",
    attention: Annotated[
        Literal["none", "static", "dynamic"],
        Opt(
            "tomoe: static prunes query-key dimensions, dynamic also masks value dimensions per token (saves no arithmetic). The result runs in transformers only."
        ),
    ] = "none",
    data: Data = (),
    eval_data: EvalData = (),
    measure: Annotated[bool, Opt("Measure quality and speed at the end.", "--measure/--no-measure")] = True,
    samples: Annotated[
        int | None, Opt("Sequences per domain. Default: 32; tomoe: as many as the steps need.", shown=False)
    ] = None,
    seq_len: Annotated[
        int | None, Opt("Tokens per sequence. Default: 512, or the model's window if less.", shown=False, least=2)
    ] = None,
    pack: Pack = None,
    columns: Columns = None,
    seed: Annotated[int, Opt("Seed of the sampling.")] = 42,
    gguf_file: Annotated[
        str | None, Opt("Name of a GGUF file in DENSE; it is dequantised once, into OUT.dense.", "--gguf-file")
    ] = None,
    device: Annotated[str, Opt("auto, cpu, cuda or cuda:0.")] = "auto",
    dtype: Annotated[str, Opt("auto (as stored), float32 or bfloat16.")] = "auto",
    resume: Annotated[bool, Opt("tomoe: resume from OUT.work, or start over.", "--resume/--fresh")] = True,
    revision: Annotated[
        str | None,
        Opt("Branch, tag or commit of DENSE on the hub; owner/name@REV works too.", "--revision", metavar="REV", shown=False),
    ] = None,
    overwrite: Overwrite = False,
    track: Track = None,
    progress: Annotated[Progress | None, Opt("")] = None,
) -> dict[str, Any]:
    """Turn a dense model into a Mixture of Experts that stock engines load, without weight updates; measured and proved.

    Llama, Mistral, Qwen2/2.5 and Qwen3 become Mixtral, GraniteMoeShared, Qwen2-MoE and Qwen3-MoE. Neurons of the MLPs become experts; attention stays.

    ToMoE's training is in OUT.work and resumes where it was interrupted; it stays there for another --export. Data-parallel: torchrun --nproc-per-node N -m expertsmith convert …

    [dim]expertsmith convert HuggingFaceTB/SmolLM2-135M -m cmoe --experts 6 --shared 2 -a 0.5 -d text.jsonl -e heldout.jsonl -o smol-moe[/dim]

    [dim]expertsmith convert HuggingFaceTB/SmolLM2-135M -m tomoe -a 0.5 -d text.jsonl --steps 300 -o smol-tomoe[/dim]

    Args:
        dense: directory or hub id of a Llama, Mistral, Qwen2/2.5 or Qwen3 model; with `gguf_file` the folder of that file.
        method: "random", "moefication", "cmoe", "expertweaver" (training-free) or "tomoe" (learned masks).

    Raises:
        UserError: a model that cannot be converted, numbers that do not go together, no data, an interrupted training of other settings.
    """
    asked = {
        name: value
        for name, value in locals().items()
        if name not in ("dense", "method", "out", "revision", "progress", "track")
    }
    from expertsmith.conversion.convert import run as run_conversion
    from expertsmith.conversion.settings import Request

    assert progress is not None
    with tracked(progress, track, {"verb": "convert", "dense": str(dense), "method": method, **asked}) as told:
        return run_conversion(Request(dense=str(dense), method=method, out=Path(out), **asked), told)
