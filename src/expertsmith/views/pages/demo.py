"""The demo's page: what a choice of experts costs in each domain, as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsmith.views.pages import figures, sheet

if TYPE_CHECKING:
    from expertsmith.calibration.stats import Statistics

PALETTE = ("#4269d0", "#ff9f43", "#8a929e", "#3ca951", "#a463f2", "#e15759")
STYLE = """
.bars { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: .6rem 1.2rem }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem } .best { font-weight: 700 }
.drawing .share { fill: var(--accent) } .drawing .stays { stroke: var(--ink); stroke-width: 1.8 }
"""


def write_report(path: Path, result: dict[str, Any], statistics: Statistics, rows: Sequence[dict[str, Any]]) -> None:
    """Write the page: summary, bars of the loss by domain and choice, the table, and the experts that each domain uses and keeps."""
    plans = {
        row["domain"]: row["plan"]
        for row in rows
        if row["plan"] is not None and row["domain"] and row["label"].startswith("easy_ep")
    }
    target = escape(result["target"])
    first = (
        '<figure class="card"><figcaption><b>Increase of the held-out loss</b> over the original, nats per token; lower is better. '
        f"Experts chosen for {target} keep {target} and lose on the other domains.</figcaption>{_bars(result)}</figure>"
    )
    maps = "".join(_map(name, statistics, plans.get(name)) for name in result["domains"])
    sections = [
        ("perplexity", "Perplexity on held-out text", f'<p class="soft">{_why(result)}</p>{_table(result)}'),
        (
            "use",
            "Expert use by domain",
            '<p class="soft">Share of each domain\'s tokens that a layer routes to each expert; stronger colour means more. '
            "<i>easy_ep</i> keeps the framed half for that domain. Point at a cell to see its value.</p>"
            f'<div class="maps">{maps}</div>',
        ),
        (
            "more",
            "All measures of the experts",
            '<p class="soft"><a href="analysis/report.html">The analysis of this model</a> shows what its experts do, from weights and text.</p>',
        ),
        (
            "made",
            "How it was made",
            '<p class="soft">A small Mixture-of-Experts model, trained on text from the Python installation. It is calibrated once; then several '
            "methods remove half of its experts. Every result was verified against the original with the same experts masked.</p>",
        ),
    ]
    name = "Half of the experts, chosen for one domain"
    foot = f"Command: expertsmith demo. All numbers are in results.json beside this page. {result['seconds']:.0f} s."
    sheet.write(path, sheet.sheet("expertsmith demo", name, [result["summary"]], first, sections, foot, STYLE))


def _bars(result: dict[str, Any]) -> str:
    """A panel a domain, all on one scale; on a phone one below the other."""
    base, rows, domains = result["rows"][0]["loss"], result["rows"][1:], result["domains"]
    top = max(0.1, *(row["loss"][name] - base[name] for row in rows for name in domains))
    legend = "".join(
        f'<span><span class="dot" style="background:{PALETTE[i % len(PALETTE)]}"></span>{escape(row["label"])}</span>'
        for i, row in enumerate(rows)
    )
    return f'<div class="legend">{legend}</div><div class="bars">{"".join(_bars_of(name, rows, base[name], top) for name in domains)}</div>'


def _bars_of(name: str, rows: Sequence[dict[str, Any]], base: float, top: float) -> str:
    width, height, left, bottom, above = 300, 260, 32, 30, 18
    scale, bar = (height - bottom - above) / top, (width - left - 12) / len(rows)
    step = next(s for s in (0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0) if top / s <= 6)
    parts = []
    for tick in range(int(top / step) + 1):
        y = height - bottom - tick * step * scale
        parts.append(
            f'<line class="rule" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/><text class="axis" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick * step:g}</text>'
        )
    for i, row in enumerate(rows):
        rise = round(row["loss"][name] - base, 3) + 0.0  # no minus zero
        size, x = max(1.0, rise * scale), left + 6 + i * bar
        told = f"{row['label']} on {name}: {rise:+.3f} nats, perplexity {row['perplexity'][name]:.1f}"
        parts.append(
            f'<rect x="{x + 2:.1f}" y="{height - bottom - size:.1f}" width="{bar - 4:.1f}" height="{size:.1f}" rx="2" fill="{PALETTE[i % len(PALETTE)]}"><title>{escape(told)}</title></rect>'
            f'<text class="axis" x="{x + bar / 2:.1f}" y="{height - bottom - size - 4:.1f}" text-anchor="middle">{round(rise, 2) + 0.0:.2f}</text>'
        )
    parts.append(f'<text x="{(left + width) / 2:.1f}" y="{height - 8}" text-anchor="middle">on {escape(name)}</text>')
    return figures.panel(f"Increase of the held-out loss on {name}, by choice", parts, height, width)


def _why(result: dict[str, Any]) -> str:
    """Why the two methods differ, with the numbers of this run."""
    target = result["target"]
    by_label = {row["label"]: row for row in result["rows"]}
    ours, reap = by_label[f"easy_ep for {target}"], by_label[f"reap for {target}"]
    text = (
        f"<i>easy_ep</i> sums an expert's contribution over all {escape(target)} tokens, so it keeps the experts that "
        f"handle {100 * ours['routed']:.0f} % of them. <i>reap</i> averages over the tokens of each expert, however few"
    )
    if reap["routed"] < ours["routed"]:
        text += f": here it keeps experts for other domains that hardly any {escape(target)} token reaches ({100 * reap['routed']:.0f} %)"
    return text + ". Calibrate <i>reap</i> on every domain that the model must keep."


def _table(result: dict[str, Any]) -> str:
    domains, target = result["domains"], escape(result["target"])
    best = {name: min(row["perplexity"][name] for row in result["rows"][1:]) for name in domains}
    head = "".join(f"<th>{escape(name)}</th>" for name in domains)
    lines = []
    for row in result["rows"]:
        cells = "".join(
            f"<td{' class=best' if row['perplexity'][n] == best[n] else ''}>{row['perplexity'][n]:.1f}</td>" for n in domains
        )
        share = f"<td>{100 * row['routed']:.0f} %</td>"
        lines.append(f"<tr><td>{escape(row['label'])}</td>{cells}{share}<td>{escape(row['verify'])}</td></tr>")
    return f'<div class="card wide"><table class="numbers"><tr><th>kept experts</th>{head}<th>{target} tokens<br>kept</th><th>verify</th></tr>{"".join(lines)}</table></div>'


def _map(name: str, statistics: Statistics, plan: Any) -> str:
    layers = sorted(statistics.layers)
    experts = statistics.layers[layers[0]].num_experts
    cell, left, top = 26, 58, 20
    kept = plan.kept if plan is not None else {}
    shares = {
        layer: statistics.layers[layer].domains[name]["selections"] / statistics.layers[layer].domains[name]["selections"].sum()
        for layer in layers
    }
    peak = max(float(values.max()) for values in shares.values())
    parts = [
        f'<text class="axis" x="{left + e * cell + cell / 2}" y="14" text-anchor="middle" style="font-size:10px">{e}</text>'
        for e in range(experts)
    ]
    for row, layer in enumerate(layers):
        y = top + row * cell
        parts.append(f'<text class="axis" x="{left - 8}" y="{y + cell / 2 + 4}" text-anchor="end">layer {layer}</text>')
        for e in range(experts):
            share = float(shares[layer][e])
            frame = " stays" if e in kept.get(layer, ()) else ""
            title = f"layer {layer}, expert {e}: {100 * share:.1f} % of the routed {name} tokens" + (
                ", kept" if frame else ", removed" if kept else ""
            )
            parts.append(
                f'<rect x="{left + e * cell + 2}" y="{y + 2}" width="{cell - 4}" height="{cell - 4}" rx="3" class="share{frame}" fill-opacity="{0.06 + 0.94 * share / peak:.3f}"><title>{escape(title)}</title></rect>'
            )
    drawn = figures.panel(f"Expert usage on {name}", parts, top + len(layers) * cell + 4, left + experts * cell + 4)
    return f'<figure class="card"><figcaption><b>{escape(name)}</b></figcaption>{drawn}</figure>'
