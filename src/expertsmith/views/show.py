"""Show results in a terminal: tables and lines on stdout. Rich is imported only when something is shown."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from expertsmith.views.encoding import is_unicode

if TYPE_CHECKING:
    from expertsmith.methods.base import Method
    from expertsmith.planning.plan import Plan
    from expertsmith.surgery.verify import Verdict

NEEDS = {  # what a method reads → what its user needs
    "statistics": "calibration (data)",
    "weights": "weights only, no data",
    "arrays": "weights only, no data",
    "model": "the running model and data",
    "nothing": "nothing",
}


def as_json(value: Any) -> None:
    """Print one JSON value on stdout; in ASCII, with JSON's own escapes, if the encoding is not Unicode."""
    print(json.dumps(value, indent=1, ensure_ascii=not is_unicode(sys.stdout), default=str))


def line(value: Any) -> None:
    """Print a table or a line of markup. Lines are not wrapped, so that paths can be copied."""
    from rich.console import Console

    Console(highlight=False).print(value, soft_wrap=isinstance(value, str))


def escape(text: str) -> str:
    """Escape square brackets in a text, so that they are not markup."""
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
    """Print the kept and merged experts of every layer, and how close the decision was."""
    layers = made.to_json()["layers"]
    merges = any(entry.get("merge") for entry in layers)
    what = "kept neurons" if made.neurons else "kept experts"
    columns = ["layer", what, *(["merged experts"] if merges else []), reason_title(layers[0])]
    table = table_of(*columns, title=f"{made.method.name}: {what}")
    for entry in layers:
        groups = "  ".join(f"{m['into']} ← {ranges([e for e in m['from'] if e != m['into']])}" for m in entry.get("merge", ()))
        kept = f"{len(entry['keep']):>3} of {entry['num_experts']}: {ranges(entry['keep'])}"
        cells = [str(entry["layer"]), neurons_kept(entry) if made.neurons else kept]
        table.add_row(*cells, *([groups] if merges else []), layer_reason(entry))
    line(table)
    for note in made.notes:
        line(f"[yellow]note[/yellow] {escape(note)}")
    if made.summary:
        p, b = made.summary.parameters, made.summary.bytes
        line(f"{count(p[0])} → {count(p[1])} parameters, {byte_count(b[0])} → {byte_count(b[1])} ({100 * b[1] / b[0]:.0f} %)")


def neurons_kept(entry: dict[str, Any]) -> str:
    """How many neurons the experts of a layer keep."""
    held = entry.get("neurons")
    if held is None:
        return "all"
    low, high = min(held["counts"]), max(held["counts"])
    each = f"{low}" if low == high else f"{low} to {high}"
    return f"{each} of {held['width']} in each of {entry['num_experts']} experts"


def reason_title(entry: dict[str, Any]) -> str:
    """The heading of `layer_reason` for a plan whose first layer is `entry`, as in plan.json."""
    why = entry.get("why") or {}
    if "subset_losses" in why:
        return "loss of the block / next best subset tried"
    if "height" in why:
        return "next removal / last removal / threshold"
    if "kept_saliency" in why:
        return "share of saliency that is kept"
    return "saliency: lowest kept / highest dropped" if entry.get("saliency") else ""


def layer_reason(entry: dict[str, Any]) -> str:
    """How close the decision for a layer was: the numbers on both sides of it."""
    why, values, gone = entry.get("why") or {}, entry.get("saliency") or [], entry["num_experts"] - len(entry["keep"])
    if "subset_losses" in why:
        others = [row["loss"] for row in why["subset_losses"][1:2]]
        return f"{why['loss']:.4g} / {others[0]:.4g}" if others else f"{why['loss']:.4g}"
    if "kept_saliency" in why:
        return f"{why['kept_saliency']:.4f}"
    if "height" in why:
        height = why["height"]
        cells = (height[gone] if gone < len(height) else None, height[gone - 1] if gone else None, why.get("threshold"))
        return " / ".join("–" if value is None else f"{value:.4g}" for value in cells)
    dropped = [values[e] for e in range(entry["num_experts"]) if e not in entry["keep"]] if values else []
    return f"{min(values[e] for e in entry['keep']):.4g} / {max(dropped):.4g}" if dropped else ""


def show_methods(methods: list[Method]) -> None:
    """Print two lines per method (what it keeps and its paper; needs, cost and limits), then its options."""
    for m in methods:
        first = " ".join(m.doc.split("\n\n")[0].split())
        line(f"[bold]{m.name}[/bold]  {escape(m.title)} [dim]({escape(m.paper)})[/dim]: {escape(first)}")
        parts = [
            f"needs {needs(m)}",
            f"cost: {m.cost}",
            f"budget {' or '.join(m.budgets)}",
        ]
        line("    " + escape("; ".join(parts)) + (f". {escape(m.limits)}" if m.limits else ""))
        if m.options:
            line("    [dim]-O " + escape("  ".join(f"{name}={value}" for name, value in m.options.items())) + "[/dim]")


def show_method(m: Method) -> None:
    """Print one method with its whole text."""
    line(f"[bold]{m.name}[/bold]  {escape(m.title)} [dim]({escape(m.paper)})[/dim]")
    line("\n" + escape(inspect.cleandoc(m.doc)) + "\n")
    facts = {"needs": needs(m), "gives": m.gives, "cost": m.cost, "budgets": ", ".join(m.budgets), "limits": m.limits}
    facts["options"] = "  ".join(f"-O {name}={value}" for name, value in m.options.items()) or "none"
    show_facts(facts)


def needs(m: Method) -> str:
    """What the user of a method needs."""
    options = {" with --all-outputs": m.all_outputs, " with --output-moments": m.output_moments, " with --neurons": m.neurons}
    return NEEDS[m.reads] + "".join(text for text, needed in options.items() if needed)


def show_facts(facts: dict[str, str]) -> None:
    """Print one line per fact, without empty facts."""
    width = max(map(len, facts))
    for name, text in facts.items():
        if text:
            line(f"[dim]{name:{width}}[/dim]  {escape(text)}")


def ranges(ids: list[int]) -> str:
    """Numbers as ranges: "0 2 5–7"."""
    parts: list[list[int]] = []
    for i in ids:
        if parts and parts[-1][1] == i - 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return " ".join(str(a) if a == b else f"{a}–{b}" for a, b in parts)


def apart(tokens: int, of: int) -> str:
    """What a verdict says of tokens whose outputs were apart in a free run."""
    return (
        f"the outputs of {tokens:,} of {of:,} tokens were apart when both models ran freely, as happens where two experts' scores are equal up to rounding; each "
        "layer was then compared on the same inputs"
    )


def show_verdict(verdict: Verdict, layers: bool = False) -> None:
    """Print the result of `verify`; with `layers`, layer by layer."""
    if verdict.wrong_tensors or verdict.config_differs:
        what = (
            [f"{len(verdict.wrong_tensors)} tensors differ from the plan (first: {verdict.wrong_tensors[0]})"]
            if verdict.wrong_tensors
            else []
        )
        what += [f"config.json differs in {', '.join(verdict.config_differs)}"] if verdict.config_differs else []
        line("[bold red]verify: FAILED[/bold red] " + escape("; ".join(what)))
        return
    if verdict.not_compared:
        line(
            f"[bold green]verify: passed[/bold green], bytes only  {verdict.tensors} tensors byte for byte as planned; "
            + escape(f"outputs were not compared: {verdict.not_compared}")
        )
        return
    if verdict.mtp_not_compared:
        line(
            "[yellow]note[/yellow] multi-token prediction was compared byte for byte, but not its outputs: "
            + escape(verdict.mtp_not_compared)
        )
    if verdict.apart:
        line(f"[yellow]note[/yellow] {apart(verdict.apart, verdict.tokens)}")
    if layers:
        table = table_of("layer", "largest difference", "largest value")
        for row in verdict.layers:
            table.add_row(str(row["layer"]), f"{row['difference']:.3g}", f"{row['scale']:.3g}")
        table.add_row("logits", f"{verdict.logits_difference:.3g}", f"{verdict.logits_scale:.3g}")
        line(table)
    if layers and verdict.skipping:
        table = table_of("layer", "skipping: largest difference", "largest value", "slots skipped")
        for row in verdict.skipping:
            table.add_row(str(row["layer"]), f"{row['difference']:.3g}", f"{row['scale']:.3g}", f"{100 * row['skipped']:.1f} %")
        line(table)
    word = "[bold green]verify: passed[/bold green]" if verdict.passed else "[bold red]verify: FAILED[/bold red]"
    line(
        f"{word}  {verdict.tensors} tensors byte for byte as planned; largest logit difference to the masked original {verdict.logits_difference:.3g}"
        f" (logits up to {verdict.logits_scale:.3g}), relative {verdict.largest:.2g}, allowed {verdict.tolerance:g}; {verdict.tokens} tokens, {verdict.dtype}"
    )


def show_skipping(result: dict[str, Any]) -> None:
    """Print thresholds and skip rates of every layer, then their quality loss and speed-up."""
    made, rates = result["plan"], result.get("skip_rate") or {}
    title = f"{result['rule']} rule, threshold = {made.skip.statistic} of the calibration tokens"
    table = table_of(
        "layer", "threshold", "median", "mean", "skipped, calibration", "skipped, measured", "experts per token", title=title
    )
    for entry in made.layers:
        why = entry.why["skip"]
        cells = [f"{entry.skip_threshold:.4f}", f"{why['median']:.4f}", f"{why['mean']:.4f}", f"{100 * why['skip_rate']:.1f} %"]
        rate = rates.get(str(entry.layer))
        table.add_row(str(entry.layer), *cells, "" if rate is None else f"{100 * rate:.1f} %", f"{why['active']:.2f}")
    line(table)
    if result["quality"]:
        show_quality(
            result["quality"],
            "held-out text, compared with the same experts without skipping"
            if result["quality"]["held_out"]
            else "the calibration text itself, compared with the same experts without skipping",
        )
    if result["speed"]:
        for what in ("prefill", "decode"):
            key = f"{what}_tokens_per_second"
            values = {name: result["speed"][name][key] for name in ("all", "skipping", "ratio")}
            line(
                f"{what:8} {values['all']:.1f} → {values['skipping']:.1f} tokens/s, [bold]{values['ratio']:.2f} ×[/bold] (batch 1, alternating)"
            )
    line(f"[bold]{escape(result['out'])}[/bold]")


def show_conversion(result: dict[str, Any]) -> None:
    """Print the result of a conversion: every layer, sizes and measurements."""
    table = table_of(
        "layer",
        "neurons: expert, always on",
        "captured energy: oracle / router / centroid / random",
        "expert share of tokens",
        "overlap",
        title=f"{result['method']['name']} → {result['target']}",
    )
    for row in result["layers"]:
        captured, widths = row["captured"], row["widths"]
        energy = " / ".join(f"{captured[name]:.3f}" for name in ("oracle", "router", "centroid", "random"))
        share = f"{100 * min(row['share']):.1f} to {100 * max(row['share']):.1f} %"
        table.add_row(str(row["layer"]), f"{_from_to(widths)}, {row['shared_width']}", energy, share, f"{row['overlap']:.2f}")
    line(table)
    for note in result["notes"]:
        line(f"[yellow]note[/yellow] {escape(note)}")
    sizes = result["sizes"]
    active, dense = sizes["active"], sizes["dense"]
    line(
        f"each token uses {count(active['total'])} of {count(dense['total'])} parameters: {100 * sizes['mlp_ratio_useful']:.1f} % of the MLPs' neurons, "
        f"{100 * sizes['mlp_ratio']:.1f} % of the MLPs with router and padding, {100 * sizes['block_ratio']:.1f} % of attention and MLPs"
    )
    line(
        f"of which {count(active['experts'])} in {sizes['top_k']} of {sizes['experts']} routed experts, {count(active['shared'])} always on, {count(active['router'])} "
        f"in routers, {count(active['padding'])} padding; in all {count(sizes['total'])} parameters, {sizes['total_ratio']:.2f} × dense"
    )
    if "note" in sizes["attention"]:
        line(escape("attention: " + sizes["attention"]["note"]))
    same = result["export"]
    line(
        f"written checkpoint against the dense model with the same neurons masked: logits differ by {same['logits_difference']:.2g} (logits up to "
        f"{same['logits_scale']:.3g}), same token at {100 * same['same_token']:.2f} % of {same['tokens']} positions; "
        f"its router selects the same experts as the split for {100 * same['same_choice']:.3f} % of tokens and layers"
    )
    if result.get("quality"):
        show_quality(
            result["quality"],
            "held-out text"
            if result["quality"]["held_out"]
            else "the calibration text itself (too optimistic; pass --eval-data)",
        )
    if result.get("speed"):
        speed = result["speed"]
        line(
            f"forward of {speed['tokens']} tokens: {speed['dense_seconds']:.3f} s dense, {speed['converted_seconds']:.3f} s converted, [bold]{speed['ratio']:.2f} ×[/bold] the time"
        )
    line("seconds  " + ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items()))
    line(f"[bold]{escape(result['out'])}[/bold]")


def show_healing(report: dict[str, Any]) -> None:
    """Print the effect of healing: layer by layer, and the loss before and after."""
    if report["layers"]:
        table = table_of(
            "layer", "held-out error of the layer", "after", "left", "seconds", title=f"healed by {report['method']}"
        )
        for row in report["layers"]:
            before, after = row["error_before"], row["error_after"]
            left = f"{100 * after / before:.0f} %" if before else "–"
            table.add_row(str(row["layer"]), f"{before:.4g}", f"{after:.4g}", left, f"{row['seconds']:.1f}")
        line(table)
    found = {"held-out part of the calibration": report["held_out"]}
    if report.get("quality"):
        found["held-out text"] = report["quality"]
    for what, quality in found.items():
        table = table_of("domain", "loss, original", "before", "after", "KL before", "after", "tokens", title=f"On the {what}")
        for name, was in quality["before"]["domains"].items():
            now = quality["after"]["domains"][name]
            cells = [f"{was['reference_loss']:.4f}", f"{was['loss']:.4f}", f"[bold]{now['loss']:.4f}[/bold]"]
            table.add_row(name, *cells, f"{was['kl']:.4f}", f"[bold]{now['kl']:.4f}[/bold]", f"{was['tokens']:,}")
        line(table)
    _healing_notes(report)
    tokens = sum(report["data"]["tokens"].values())
    line(f"{tokens:,} tokens, {report['seconds']:.1f} s  [bold]{escape(report['out'])}[/bold]")
    if "pushed" in report:
        line(f"uploaded to {report['pushed']}")


def _healing_notes(report: dict[str, Any]) -> None:
    for sentence in report.get("rule", ()):
        line(escape(sentence))
    if not report["accepted"]:
        line("[yellow]note[/yellow] healing did not improve the held-out part, so no weight was changed")
    if report["mixed"]:
        line(f"[yellow]note[/yellow] {escape(report['mixed'])}")
    again = report.get("requantised")
    if again:
        now, float_ = again["quality"]["mean"], report["held_out"]["after"]["mean"]
        line(
            f"re-quantised: weights differ by {again['weight_error']:.2%} (relative root mean square); on the held-out part loss {float_['loss']:.4f} → "
            f"{now['loss']:.4f}, KL {float_['kl']:.4f} → {now['kl']:.4f}"
        )
        if not again["accepted"]:
            line("[yellow]note[/yellow] this is worse than before healing, so no weight was changed")


def show_evaluation(found: dict[str, Any], title: str) -> None:
    """Print all measurements of `evaluate`."""
    if "domains" in found:
        show_quality(found, title)
    if "tasks" in found:
        show_tasks(found["tasks"])
    if "generation" in found:
        show_generation(found["generation"])


def show_tasks(found: dict[str, Any]) -> None:
    """Print scores by task and metric, next to the reference's."""
    limited = f", up to {found['limit']} documents each" if found["limit"] else ""
    against = "difference" in found["rows"][0]
    columns = ["original", "here", "difference", ""] if against else ["score"]
    table = table_of("task", "metric", "n", *columns, title=f"lm-eval tasks{limited}, ± standard error")
    _numbers_whole(table, len(columns))
    for row in found["rows"]:
        cells = (escape(task_name(row)), escape(metric_name(row)), f"{row['documents']:,}")
        table.add_row(*cells, *_estimate(row, row["higher_is_better"]))
    line(table)
    for name, cut in {row["task"]: row["cut"] for row in found["rows"] if row["cut"]}.items():
        line(
            f"[yellow]note[/yellow] {cut:,} requests of {escape(name)} are longer than the window and were truncated on the left"
        )
    if against:
        line(
            "[dim]errors of differences are paired: over documents, or over bootstrap samples shared by both models if a score "
            "is not a mean over documents[/dim]"
        )


def task_name(row: dict[str, Any]) -> str:
    """A task and its number of shots."""
    return str(row["task"]) + (f" ({row['shots']} shots)" if row["shots"] else "")


def metric_name(row: dict[str, Any]) -> str:
    """A metric of a task, its filter, and which way is better."""
    arrow = {True: " ↑", False: " ↓"}.get(row["higher_is_better"], "")
    return str(row["metric"]) + ("" if row["filter"] == "none" else f" ({row['filter']})") + arrow


def show_generation(found: dict[str, Any]) -> None:
    """Print the measures of generated text by domain, next to the reference's."""
    against = "difference" in next(iter(found["domains"].values()))["length"]
    columns = ["original", "here", "difference", ""] if against else ["here"]
    table = table_of("domain", "measure", *columns, title=f"Greedy decoding of {found['new_tokens']} tokens, ± standard error")
    _numbers_whole(table, len(columns))
    for domain, row in found["domains"].items():
        for key, (what, better) in WRITTEN.items():
            if key not in row:
                continue
            notes = {
                "loops": _periods(row["periods"]),
                "format": f" ({row[key]['responses']:.0%} of the data's answers)" if key == "format" else "",
            }
            first = (
                escape(f"{domain}, {row['prompts']} prompt{'s' if row['prompts'] > 1 else ''}") if key == "repetition" else ""
            )
            table.add_row(first, what + notes.get(key, ""), *_estimate(row[key], better, digits=1 if key == "length" else 3))
    line(table)


def _numbers_whole(table: Any, count: int) -> None:
    """Fold names, not the numbers in the last columns, on a narrow terminal."""
    for column in table.columns[-count:]:
        column.no_wrap = True


def _periods(periods: dict[str, float | None]) -> str:
    held = [periods[side] for side in ("reference", "value") if side in periods]
    return f" (median period {' → '.join('–' if value is None else f'{value:g}' for value in held)})" if any(held) else ""


def estimate(row: dict[str, Any], higher_is_better: bool | None = None, digits: int = 3) -> list[str]:
    """An estimate as plain texts: the value; or reference, value, difference, and the meaning of a difference beyond two standard errors."""

    def cell(value: float | None, error: float | None, sign: str = "") -> str:
        if value is None:
            return "–"
        return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    mine = cell(row["value"], row["se"])
    if "difference" not in row:
        return [mine]
    word = ""
    if row["clear"]:
        word = "differs"
        if higher_is_better is not None:
            word = "better" if (row["difference"] > 0) == higher_is_better else "worse"
    return [cell(row["reference"], row["reference_se"]), mine, cell(row["difference"], row["difference_se"], "+"), word]


def _estimate(row: dict[str, Any], higher_is_better: bool | None, digits: int = 3) -> list[str]:
    """`estimate` with colours."""
    texts = estimate(row, higher_is_better, digits)
    if len(texts) == 1:
        return [f"[bold]{texts[0]}[/bold]"]
    theirs, mine, difference, word = texts
    colour = {"differs": "yellow", "better": "green", "worse": "red"}
    return (
        [theirs, mine, f"[bold]{difference}[/bold]", f"[{colour[word]}]{word}[/]"] if word else [theirs, mine, difference, ""]
    )


def show_quality(quality: dict[str, Any], title: str) -> None:
    """Print quality by domain."""
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


def show_speed(found: dict[str, Any]) -> None:
    """Print speed, memory and energy of a model in an engine, next to its reference."""
    setting = found["setting"]
    names, rows = speed_cells(found)
    title = (
        f"{setting['engine']}, batch {setting['batch']}, {setting['prompt_len']} + {setting['new_tokens']} tokens, {setting['dtype']}; "
        f"medians of {setting['rounds']} alternating rounds"
    )
    table = table_of("", *map(escape, names), title=title)
    for what, *cells in rows:
        ratio = f"[bold]{escape(cells.pop())}[/bold]" if "ratios" in found else None
        table.add_row(what, *cells, *([ratio] if ratio else []))
    line(table)
    if "ratio_ranges" in found:
        line("[dim]ratio: the median over the rounds of the ratio within a round, not the ratio of the two medians[/dim]")
    if "energy" in found:
        line(f"[yellow]note[/yellow] energy: {escape(found['energy'])}")


def speed_cells(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The headings and rows of a speed measurement as plain texts: reference if there is one, model, ratio."""
    names = [name for name in ("reference", "model", "ratios") if name in found]
    spread = found.get("ratio_ranges", {})

    def cell(name: str, key: str, unit: Any) -> str:
        if name != "ratios":
            return str(unit(found[name][key]))
        return f"{found[name][key]:.2f} ×" + (" [{:.2f}, {:.2f}]".format(*spread[key]) if key in spread else "")

    rows = [[what, *(cell(name, key, unit) for name in names)] for key, what, unit in SPEEDS if found["model"].get(key)]
    return [name.replace("ratios", "ratio [least, largest]") for name in names], rows


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


SPEEDS = (  # key of a speed measurement, its name, and how a value is written
    ("prefill_tokens_per_second", "prefill, tokens/s", "{:.1f}".format),
    ("decode_tokens_per_second", "decode, tokens/s", "{:.1f}".format),
    ("time_to_first_token", "time to first token, s", "{:.3f}".format),
    ("peak_memory", "peak memory of the process", byte_count),
    ("gpu_memory", "peak GPU memory", byte_count),
    ("weight_bytes", "weights", byte_count),
    ("watt_hours_per_1000_tokens", "Wh per 1000 new tokens", "{:.4f}".format),
)
WRITTEN = {  # measure of generated text → its name, and whether more is better
    "repetition": ("repeated 4-grams", False),
    "loops": ("ends in a loop", False),
    "ended": ("reaches the end of text", None),
    "length": ("tokens", None),
    "format": ("has the answer format", True),
}


def _from_to(numbers: Iterable[int]) -> str:
    """ "8", or "6 to 12"."""
    held = sorted(set(numbers))
    return str(held[0]) if len(held) == 1 else f"{held[0]} to {held[-1]}"


def _mtp(found: dict[str, Any]) -> str:
    size, layers = byte_count(found["bytes"]), found["moe_layers"]
    if not layers:
        return f"{size}, without experts: not changed"
    return f"{size}, with experts (layer{'s' * (len(layers) > 1)} {ranges(layers)}): pruned with the other layers"


def _weights(facts: dict[str, Any]) -> str:
    """The weights as they are stored, and as bfloat16 where that is something else."""
    stored, floats = facts["bytes"], facts["bytes_bfloat16"]
    if floats is None:
        return byte_count(stored)
    return byte_count(stored) + (f" as stored, {byte_count(floats)} in bfloat16" if stored != floats else " (bfloat16)")


def _kv_cache(found: dict[str, Any]) -> str:
    if "unknown" in found:
        return f"cannot be counted: {found['unknown']}"
    rest = f" + {byte_count(found['constant_bytes'])} of windows and states" if found["constant_bytes"] else ""
    return (
        f"{byte_count(found['bytes_per_token'])} per token{rest}: {byte_count(found['bytes'])} for {found['tokens']:,} tokens"
    )


def show_inspection(facts: dict[str, Any]) -> None:
    """Print facts about a checkpoint, and what each keep ratio would leave."""
    groups = facts["router"]["expert_groups"]
    router = facts["router"]["score"] + (", selection bias" if facts["router"]["selection_bias"] else "")
    router += f", {groups['top_groups']} of {groups['groups']} expert_groups" if groups else ""
    quantisation = facts["quantisation"]
    table = table_of("", "", title=facts["model"], header=False)
    moe = facts["moe_layers"]
    for name, value in (
        ("family", f"{facts['family']}  ({facts['model_type']})"),
        ("layers", f"{facts['layers']}, of which {len(moe)} with experts ({moe[0]}–{moe[-1]})"),
        ("routed experts", f"{_from_to(facts['experts_by_layer'].values())} per layer, {facts['top_k']} per token"),
        ("shared experts", str(facts["shared_experts"])),
        *((("multi-token prediction", _mtp(facts["multi_token_prediction"])),) if facts["multi_token_prediction"] else ()),
        ("router", router),
        (
            "parameters",
            f"{count(facts['parameters']['total'])} total, {count(facts['parameters']['active'])} active, {count(facts['parameters']['routed_experts'])} in routed experts",
        ),
        *((("quantisation", quantisation["formats"]),) if quantisation else ()),
        ("bytes", _weights(facts)),
        ("KV cache", _kv_cache(facts["kv_cache"])),
        ("least", f"{facts['least_experts']} experts per layer must be kept"),
        *((("note", facts["notes"]),) if facts["notes"] else ()),
    ):
        table.add_row(name, value)
    line(table)
    if quantisation and quantisation["cannot_be_decoded"]:
        line(
            f"[yellow]warning[/yellow] cannot be decoded: {escape(quantisation['cannot_be_decoded'])} (counts are those of the stored tensors)"
        )
    known = "bytes" in facts["kv_cache"]
    ratios = table_of("keep", "experts", "parameters", "bytes", "of the original", *(["with KV cache"] if known else []))
    for row in facts["keep_ratios"]:
        ratios.add_row(
            f"{row['keep']:g}",
            _from_to((row["fewest_experts"], row["experts"])),
            count(row["parameters"]),
            byte_count(row["bytes"]),
            f"{100 * row['bytes_ratio']:.0f} %",
            *([byte_count(row["bytes_with_kv_cache"])] if known else []),
        )
    line(ratios)
