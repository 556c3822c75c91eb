"""`calibrate`: text → the statistics of every criterion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from expertsmith.calibration.opening import inventory_of, open_model, token_data
from expertsmith.ranks import current
from expertsmith.verbs.definition import FLOW, Opt, out_and, verb
from expertsmith.verbs.options import Calibrating, Data, Into, Model, Running, Text, part
from expertsmith.views import show

if TYPE_CHECKING:
    from expertsmith.calibration.stats import Statistics


def _show(statistics: Any, given: Mapping[str, Any]) -> None:
    title = f"{len(statistics.layers)} MoE layers → {given['out']}"
    table = show.table_of("domain", "tokens", "sequences", "least used expert", "most used expert", title=title)
    for name, count in statistics.tokens.items():
        shares = [
            entry.domains[name]["selections"] / max(1, entry.domains[name]["selections"].mean())
            for entry in statistics.layers.values()
        ]
        low, high = min(float(s.min()) for s in shares), max(float(s.max()) for s in shares)
        sequences = str(statistics.header["data"]["sequences"][name])
        table.add_row(name, f"{count:,}", sequences, f"{low:.2f} × even share", f"{high:.2f} × even share")
    show.line(table)


@verb(FLOW, show=_show, plain=lambda found, given: {"out": str(given["out"]), **found.header}, keeps=out_and(""), ranks=True)
def calibrate(
    model: Model,
    data: Data,
    out: Into,
    *,
    output_sum: Annotated[
        bool, Opt("Also sum the raw outputs of every expert over its routed tokens.", "--output-sum")
    ] = False,
    output_moments: Annotated[
        bool,
        Opt(
            "Also sum their squares and their values weighted by the squared routing weight, by dimension (for mone).",
            "--output-moments",
        ),
    ] = False,
    neurons: Annotated[
        bool,
        Opt(
            "Also run the model backwards and sum the squares of neurons' activations and gradients (for heapr); triples the time.",
            "--neurons",
        ),
    ] = False,
    all_outputs: Annotated[
        bool, Opt("Also run every expert on every token and sum the outputs (for hc_smoe and ream).", "--all-outputs")
    ] = False,
    sample_tokens: Annotated[int, Opt("Also keep block inputs and outputs of this many tokens per domain.", least=0)] = 0,
    overwrite: Annotated[bool, Opt("Replace the statistics of another calibration.", "--overwrite")] = False,
    **given: Unpack[Calibrating],
) -> Statistics:
    """Run the model over text once and collect the statistics of every criterion, by layer and domain.

    A killed run resumes after the last finished layer. Data-parallel: torchrun --nproc-per-node N -m expertsmith calibrate …

    Args:
        data: `[DOMAIN=]SOURCE[:N]` each.
        samples: sequences a domain, drawn with `seed`.
        seq_len: tokens a sequence at most; None: 2048 or the model's window, whichever is less.
        pack: join texts into full sequences; None: texts yes, demonstrations (messages, prompt + response) no.
        output_sum: also sum the raw outputs of every expert over the tokens routed to it.
        output_moments: also sum f, f² and g²f in every dimension, g the routing weight (needed by mone; includes output_sum).
        neurons: also sum h², (dL/dh)² and (h dL/dh)² of every neuron, h its activation, L the loss (needed by heapr).
        all_outputs: also sum them over all tokens: every expert runs on every token (needed by hc_smoe and ream).
        sample_tokens: also keep the block's inputs and outputs of this many tokens a domain.
        memory: "resident", "stream" (one decoder layer at a time) or "auto".
        resume: complete a folder that an interrupted run left; otherwise start again.
        overwrite: replace the statistics of another model, text or other options, which are refused otherwise.
    """
    from expertsmith.calibration.observers import Extras
    from expertsmith.calibration.runner import collect

    progress = given["progress"]
    inventory = inventory_of(model, given["allow_pickle"])
    tokens = token_data(inventory.checkpoint.path, inventory.checkpoint.config, data, progress, **part(Text, given))
    ranks = current()
    loaded = open_model(inventory, progress, mtp=True, ranks=ranks, **part(Running, given))
    extras = Extras(output_sum, all_outputs, sample_tokens, given["seed"], output_moments, neurons)
    size = loaded.batch_tokens(given["batch_tokens"])
    return collect(
        loaded,
        tokens,
        Path(out),
        batch_tokens=size,
        extras=extras,
        resume=given["resume"],
        overwrite=overwrite,
        progress=progress,
        ranks=ranks,
    )
