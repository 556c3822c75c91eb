"""How results look in a terminal: tables and lines on stdout. Rich is imported when something is shown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertsmith.plan import Plan
    from expertsmith.surgery.verify import Verdict


def as_json(value: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def line(value: Any) -> None:
    """Print a table, or a line of markup; lines are not cut, so that paths can be copied from them."""
    from rich.console import Console

    Console(highlight=False).print(value, soft_wrap=isinstance(value, str))


def escape(text: str) -> str:
    """Text with square brackets that are not markup."""
    from rich.markup import escape

    return escape(text)


def table_of(*columns: str, title: str = "", header: bool = True) -> Any:
    """An empty table."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=escape(title) if title else None,
        box=box.SIMPLE_HEAD if header else None,
        show_header=header,
        title_justify="left",
        title_style="bold",
    )
    for column in columns:
        table.add_column(column)
    return table


def show_plan(made: Plan) -> None:
    """Which experts stay in every layer, and how close the decision was."""
    table = table_of(
        "layer", "kept experts", "saliency: lowest kept / highest dropped", title=f"{made.method.name}: what stays"
    )
    for entry in made.layers:
        values = entry.saliency or []
        dropped = [values[e] for e in range(entry.num_experts) if e not in entry.keep] if values else []
        margin = f"{min(values[e] for e in entry.keep):.4g} / {max(dropped):.4g}" if dropped else ""
        ids = ranges(entry.keep)
        table.add_row(str(entry.layer), f"{len(entry.keep):>3} of {entry.num_experts}: {ids}", margin)
    line(table)
    if made.summary:
        p, b = made.summary.parameters, made.summary.bytes
        line(f"{count(p[0])} → {count(p[1])} parameters, {byte_count(b[0])} → {byte_count(b[1])} ({100 * b[1] / b[0]:.0f} %)")


def ranges(ids: list[int]) -> str:
    """0 2 5–7"""
    parts: list[list[int]] = []
    for i in ids:
        if parts and parts[-1][1] == i - 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return " ".join(str(a) if a == b else f"{a}–{b}" for a, b in parts)


def show_verdict(verdict: Verdict, layers: bool = False) -> None:
    """What `verify` found, with `layers` layer by layer."""
    if verdict.wrong_tensors or verdict.config_differs:
        what = (
            [f"{len(verdict.wrong_tensors)} tensors are not what the plan says (first: {verdict.wrong_tensors[0]})"]
            if verdict.wrong_tensors
            else []
        )
        what += [f"config.json differs in {', '.join(verdict.config_differs)}"] if verdict.config_differs else []
        line("[bold red]verify: FAILED[/bold red] " + escape("; ".join(what)))
        return
    if layers:
        table = table_of("layer", "largest difference", "largest value")
        for row in verdict.layers:
            table.add_row(str(row["layer"]), f"{row['difference']:.3g}", f"{row['scale']:.3g}")
        table.add_row("logits", f"{verdict.logits_difference:.3g}", f"{verdict.logits_scale:.3g}")
        line(table)
    word = "[bold green]verify: passed[/bold green]" if verdict.passed else "[bold red]verify: FAILED[/bold red]"
    line(
        f"{word}  {verdict.tensors} tensors byte for byte as planned; largest logit difference to the masked original {verdict.logits_difference:.3g}"
        f" (logits up to {verdict.logits_scale:.3g}), relative {verdict.largest:.2g}, allowed {verdict.tolerance:g}; {verdict.tokens} tokens, {verdict.dtype}"
    )


def show_quality(quality: dict[str, Any], title: str) -> None:
    """Quality by domain."""
    rows = quality["domains"]
    if "kl" in next(iter(rows.values())):
        table = table_of(
            "domain", "perplexity", "original", "change", "KL", "top-1", "ESAP", "tokens", title=f"Quality on {title}"
        )
        for name, row in rows.items():
            table.add_row(
                name,
                f"[bold]{row['perplexity']:.2f}[/bold]",
                f"{row['reference_perplexity']:.2f}",
                f"{100 * (row['perplexity'] / row['reference_perplexity'] - 1):+.1f} %",
                f"{row['kl']:.4f}",
                f"{100 * row['top1_agreement']:.1f} %",
                f"{row['esap']:.3f}",
                f"{row['tokens']:,}",
            )
    else:
        table = table_of("domain", "perplexity", "loss ± standard error", "tokens", title=f"Quality on {title}")
        for name, row in rows.items():
            table.add_row(
                name, f"[bold]{row['perplexity']:.2f}[/bold]", f"{row['loss']:.4f} ± {row['loss_se']:.4f}", f"{row['tokens']:,}"
            )
    line(table)


def byte_count(number: float) -> str:
    """ "6.81 MB"."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} B"


def count(number: float) -> str:
    """ "3.41 M"."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f}"


def show_inspection(facts: dict[str, Any]) -> None:
    """What a checkpoint is, and what each keep ratio would leave."""
    groups = facts["router"]["expert_groups"]
    router = facts["router"]["score"] + (", selection bias" if facts["router"]["selection_bias"] else "")
    router += f", {groups['top_groups']} of {groups['groups']} expert_groups" if groups else ""
    table = table_of("", "", title=facts["model"], header=False)
    moe = facts["moe_layers"]
    for name, value in (
        ("family", f"{facts['family']}  ({facts['model_type']})"),
        ("layers", f"{facts['layers']}, of which {len(moe)} with experts ({moe[0]}–{moe[-1]})"),
        ("routed experts", f"{facts['num_experts']} a layer, a token uses {facts['top_k']}"),
        ("shared experts", str(facts["shared_experts"])),
        ("router", router),
        (
            "parameters",
            f"{count(facts['parameters']['total'])} total, {count(facts['parameters']['active'])} active, {count(facts['parameters']['routed_experts'])} in routed experts",
        ),
        ("bytes", byte_count(facts["bytes"])),
        ("least", f"{facts['least_experts']} experts a layer have to stay"),
        *((("note", facts["notes"]),) if facts["notes"] else ()),
    ):
        table.add_row(name, value)
    line(table)
    ratios = table_of("keep", "experts", "parameters", "bytes", "of the original")
    for row in facts["keep_ratios"]:
        ratios.add_row(
            f"{row['keep']:g}",
            str(row["experts"]),
            count(row["parameters"]),
            byte_count(row["bytes"]),
            f"{100 * row['bytes_ratio']:.0f} %",
        )
    line(ratios)
