"""`expertsmith demo`: the whole flow on the small packaged model and text from the Python installation."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from expertsmith import api
from expertsmith.errors import UserError
from expertsmith.verbs.definition import MORE, Opt, verb
from expertsmith.verbs.options import Overwrite
from expertsmith.views import show
from expertsmith.views.progress import Progress, Silent

if TYPE_CHECKING:
    from expertsmith.calibration.stats import Statistics
    from expertsmith.planning.plan import Plan

MODEL = Path(__file__).parent / "model"
TARGET = "code"  # the domain that the user of the demo cares for
KEEP = 0.5
RANDOM_SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {"seq_len": 256, "device": "cpu", "dtype": "float32", "memory": "resident"}
CALIBRATION_SEQUENCES = 24
EVALUATION_SEQUENCES = 24
PROBED = 256  # tokens a domain on which all experts run
MARK = "expertsmith-demo.json"


def _show(result: Any, given: Mapping[str, Any]) -> None:
    names, target = result["domains"], result["target"]
    heads = (f"{name}\nperplexity" for name in names)
    table = show.table_of("kept experts", *heads, "verify", title=f"Half of the experts, chosen for {target}")
    for row in result["rows"]:
        values = {name: f"{row['perplexity'][name]:.1f}" for name in names}
        cells = (f"[bold]{value}[/bold]" if name == target else value for name, value in values.items())
        table.add_row(row["label"], *cells, row["verify"])
    show.line(table)
    show.line(show.escape(result["summary"]))
    show.line(f"[bold]{show.escape(result['report'])}[/bold]")
    show.line(f"[bold]{show.escape(result['analysis'])}[/bold]  (what the experts do)")


@verb(MORE, show=_show)
def demo(
    out: Annotated[
        str | Path, Opt("Folder for the report and the checkpoints.", "--out", "-o", kind=Path, writes="folder")
    ] = Path("demo-output"),
    overwrite: Overwrite = False,
    progress: Annotated[Progress | None, Opt("")] = None,
) -> dict[str, Any]:
    """Run the whole flow on a small model that comes with the package: offline, under a minute on two cores."""
    return run_demo(Path(out), progress, overwrite)


def run_demo(out: Path, progress: Progress | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Calibrate on three domains, keep half of the experts for one of them by several methods, verify and measure each.

    Ends with an analysis of the experts. Writes text, statistics, plans, checkpoints, `results.json`, `report.html` and `analysis/` in `out`;
    `overwrite` replaces a folder that an earlier demo left.

    Raises:
        UserError: `out` exists, and is not of a demo or not to be replaced.
    """
    from expertsmith.calibration import corpus
    from expertsmith.calibration.stats import load_statistics
    from expertsmith.checkpoint.writer import prepare_target
    from expertsmith.views.pages.demo import write_report

    progress = progress or Silent()
    begin = time.perf_counter()
    if out.exists():
        if not (out / MARK).exists():
            raise UserError(f"{out} exists already and is not the demo's output", "choose another folder with -o")
        prepare_target(out, None, overwrite)
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).write_text("{}\n")
    progress.note(f"text from this Python installation: {', '.join(corpus.DOMAINS)}")
    corpus.write(out / "text" / "calib", "calib")
    corpus.write(out / "text" / "heldout", "heldout")
    calib = [f"{name}={out / 'text' / 'calib' / f'{name}.jsonl'}:{CALIBRATION_SEQUENCES}" for name in corpus.DOMAINS]
    heldout = [f"{name}={out / 'text' / 'heldout' / f'{name}.jsonl'}:{EVALUATION_SEQUENCES}" for name in corpus.DOMAINS]
    api.calibrate(MODEL, calib, out / "stats", progress=progress, batch_tokens=2048, **SETTINGS)
    statistics = load_statistics(out / "stats")
    runs: list[tuple[str, str | None, str, dict[str, Any]]] = [("easy_ep", TARGET, "easy_ep", {}), ("reap", TARGET, "reap", {})]
    runs += [(f"random {seed}", None, "random", {"seed": seed}) for seed in RANDOM_SEEDS]
    runs += [(f"easy_ep for {name}", name, "easy_ep", {}) for name in corpus.DOMAINS if name != TARGET]
    rows = [_row("all (the original)", None, MODEL, None, heldout, "–", progress)]
    for label, domain, method, options in runs:
        folder = out / label.replace(" ", "-")
        made = api.plan(
            MODEL, method, KEEP, stats=statistics, domains=[domain] if domain and method != "random" else (), options=options
        )
        api.apply(MODEL, made, folder, progress=progress)
        verdict = api.verify(MODEL, folder, tokens=256, device="cpu", memory="resident")
        mark = f"{'passed' if verdict.passed else 'FAILED'}, Δ {verdict.logits_difference:.1g}"
        rows.append(_row(label, domain, folder, made, heldout, mark, progress))
        rows[-1]["routed"] = _routed(made, statistics)
    analysis = out / "analysis"
    api.analyze(
        MODEL, analysis, data=calib, stats=statistics, all_experts=PROBED, progress=progress, batch_tokens=2048, **SETTINGS
    )
    result: dict[str, Any] = {
        "target": TARGET,
        "keep": KEEP,
        "domains": list(corpus.DOMAINS),
        "rows": _merge_random(rows),
        "bytes": list(made.summary.bytes) if made.summary else [],
        "seconds": 0.0,
        "report": str(out / "report.html"),
        "analysis": str(analysis / "report.html"),
    }
    result["seconds"] = round(time.perf_counter() - begin, 1)
    result["summary"] = _summary(result)
    write_report(out / "report.html", result, statistics, rows)
    result["rows"] = [{key: value for key, value in row.items() if key != "plan"} for row in result["rows"]]
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _row(
    label: str, domain: str | None, model: Path, made: Any, heldout: list[str], mark: str, progress: Progress
) -> dict[str, Any]:
    quality = api.evaluate(model, heldout, samples=EVALUATION_SEQUENCES, batch_tokens=2048, **SETTINGS).to_json()["domains"]
    perplexity = {name: row["perplexity"] for name, row in quality.items()}
    progress.note(f"{label}: " + ", ".join(f"{name} {value:.1f}" for name, value in perplexity.items()))
    loss = {name: row["loss"] for name, row in quality.items()}
    return {
        "label": label,
        "domain": domain,
        "perplexity": perplexity,
        "loss": loss,
        "verify": mark,
        "plan": made,
        "routed": 1.0,
    }


def _routed(made: Plan, statistics: Statistics) -> float:
    """Share of the target domain's routed tokens (over all layers) whose expert stays."""
    counts = {layer: entry.domains[TARGET]["selections"] for layer, entry in statistics.layers.items()}
    return float(
        sum(counts[layer][ids].sum() for layer, ids in made.kept.items()) / sum(values.sum() for values in counts.values())
    )


def _merge_random(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The random rows as one, with the geometric mean of their perplexities (the mean of their losses)."""
    import math

    drawn = [row for row in rows if row["label"].startswith("random")]
    loss = {name: sum(row["loss"][name] for row in drawn) / len(drawn) for name in drawn[0]["loss"]}
    verdicts = {row["verify"].split(",")[0] for row in drawn}
    mark = "FAILED" if "FAILED" in verdicts else "passed"
    routed = sum(row["routed"] for row in drawn) / len(drawn)
    one = {
        "routed": routed,
        "label": f"random (mean of {len(drawn)})",
        "domain": None,
        "loss": loss,
        "perplexity": {k: math.exp(v) for k, v in loss.items()},
        "verify": mark,
    }
    others = [row for row in rows if row not in drawn]
    others.insert(3, one)
    for row in others:
        if row["domain"] and row["label"] in ("easy_ep", "reap"):
            row["label"] = f"{row['label']} for {row['domain']}"
    return others


def _summary(result: dict[str, Any]) -> str:
    target = result["target"]
    by_label = {row["label"]: row["loss"][target] for row in result["rows"]}
    base = by_label["all (the original)"]
    chosen = by_label[f"easy_ep for {target}"] - base
    random = next(value for label, value in by_label.items() if label.startswith("random")) - base
    before, after = result["bytes"]
    return (
        f"On {target}, half of the experts chosen by easy_ep cost {chosen:+.2f} nats per token, chosen at random {random:+.2f}; "
        f"the checkpoint shrinks from {before / 1e6:.1f} to {after / 1e6:.1f} MB. {result['seconds']:.0f} s."
    )
