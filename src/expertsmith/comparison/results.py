"""Combine finished cells: sort rows, mark those worse than chance, and show the random draws as one row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsmith.comparison.cells import BASELINE, CELLS, WORK, Cell, load, short_names
from expertsmith.evaluation.paired import CLEAR, ratio

if TYPE_CHECKING:
    from expertsmith.comparison.run import Comparison

Row = dict[str, Any]


def together(job: Comparison, held: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of comparison.json: `groups` of rows with the same keep ratio and budget, each sorted by the mean rise."""
    from expertsmith import __version__

    groups: dict[tuple[Any, str], list[Row]] = {}
    names = short_names(cell.contender.label for cell in job.cells)
    budgets = short_names(cell.budget for cell in job.cells)
    for cell in job.cells:
        if cell.name in held:
            row = _row(cell, names[cell.contender.label], budgets[cell.budget], held[cell.name])
            groups.setdefault((cell.keep, row["budget"]), []).append(row)
    told = [f"{name} is {label}" for label, name in names.items() if label != name and not label.startswith(f"{BASELINE}:")]
    told += [f"budget {name} is {label}" for label, name in budgets.items() if label != name]
    inventory, checkpoint = job.inventory, job.inventory.checkpoint
    parameters, nbytes = inventory.size()
    any_row = next(row for rows in groups.values() for row in rows)
    domains = {
        name: {"loss": row["reference_loss"], "perplexity": row["reference_perplexity"]}
        for name, row in any_row["quality"]["domains"].items()
    }
    text = job.calibration
    took = load(statistics_folder(job).with_suffix(".json"), {"model": checkpoint.fingerprint, "data": job.text})
    scores = load(original_file(job), job.original_with) if job.tasks else None
    return {
        "format": "expertsmith.comparison",
        "version": 1,
        "made_by": f"expertsmith {__version__}",
        "model": {
            "source": checkpoint.path.name if Path(checkpoint.source).exists() else checkpoint.source,
            "model_type": inventory.architecture.model_type,
            "fingerprint": checkpoint.fingerprint,
        },
        "calibration": {}
        if text is None
        else {"fingerprint": job.text, "tokens": text.tokens, **(took["calibration"] if took else {})},
        "heldout": {
            "fingerprint": job.heldout.fingerprint,
            "tokens": {name: row["tokens"] for name, row in any_row["quality"]["domains"].items()},
        },
        "dtype": job.where["dtype"],
        "original": {
            "experts": sum(inventory.counts.values()),
            "parameters": parameters,
            "bytes": nbytes,
            "domains": domains,
            **({"tasks": scores["tasks"]} if scores else {}),
        },
        "groups": [_group(share, budget, rows) for (share, budget), rows in groups.items()],
        "notes": [*told, *job.notes],
    }


def _row(cell: Cell, name: str, budget: str, held: Mapping[str, Any]) -> Row:
    return {
        "name": name + (" progressive" if cell.progressive else ""),
        "method": cell.contender.label,
        "title": cell.contender.method.title,
        "heal": cell.heal,
        **({"progressive": True} if cell.progressive else {}),
        "keep": cell.keep,
        "budget": budget,
        **{key: value for key, value in held.items() if key not in ("format", "version", "made_with")},
    }


def _group(share: float | int | None, budget: str, rows: Iterable[Row]) -> dict[str, Any]:
    """A group with rows sorted by the mean rise. `to_best`: [mean rise minus that of the best method, its paired standard error over the
    sequences]; `tied`: that difference is within CLEAR standard errors. `to_one_shot`, of a progressive row: the same against the
    row of its method without. `random`: for each healing method, the draws' mean, least and
    largest rise. A row is `worse_than_random` if its rise is above the mean of the draws with the same healing (None without draws, as for
    methods' own thresholds)."""
    rows = sorted(map(dict, rows), key=lambda row: row["rise"]["mean"][0])
    drawn: dict[Any, list[float]] = {}
    for row in rows:
        if _random(row):
            drawn.setdefault(row["heal"], []).append(row["rise"]["mean"][0])
    chance = [
        {"heal": heal, "mean": math.fsum(v) / len(v), "least": min(v), "largest": max(v), "draws": len(v)}
        for heal, v in drawn.items()
    ]
    means = {entry["heal"]: entry["mean"] for entry in chance}
    best = next((row for row in rows if not _random(row)), None)
    for row, sums in [(row, row["rise"].get("sequences")) for row in rows]:
        row["to_best"] = None if best is None or sums is None else _paired(sums, best["rise"]["sequences"])
        row["tied"] = row is not best and row["to_best"] is not None and abs(row["to_best"][0]) <= CLEAR * row["to_best"][1]
    one_shot = {(row["method"], row["heal"]): row for row in rows if not row.get("progressive")}
    for row in rows:
        other = one_shot.get((row["method"], row["heal"])) if row.get("progressive") else None
        if other is not None:
            row["to_one_shot"] = _paired(row["rise"]["sequences"], other["rise"]["sequences"])
    for row in rows:
        row["rise"] = {key: value for key, value in row["rise"].items() if key != "sequences"}
        mean = means.get(row["heal"])
        row["worse_than_random"] = None if mean is None or _random(row) else row["rise"]["mean"][0] > mean
    return {"keep": share, "budget": budget, "random": chance, "rows": rows}


def _paired(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[float]:
    """[mean over domains of the difference of two rises on the same sequences, its standard error]."""
    each = [ratio([(n, a - b) for (n, a), (_, b) in zip(mine[name], theirs[name], strict=True)]) for name in mine]
    return [math.fsum(mean for mean, _ in each) / len(each), math.hypot(*(error for _, error in each)) / len(each)]


def _random(row: Row) -> bool:
    return bool(row["method"].partition(":")[0] == BASELINE)


def displayed(found: Mapping[str, Any]) -> dict[str, Any]:
    """The content of comparison.json for views: the `rows` of each group come from `shown`."""
    return {**found, "groups": [{**group, "rows": shown(group)} for group in found["groups"]]}


def shown(group: Mapping[str, Any]) -> list[Row]:
    """The rows of a table. The draws of `random` are one row with the mean of each number (perplexity: exp of the mean loss); its `draws`
    are the single rows."""
    rows = [{**row, "draws": []} for row in group["rows"] if not _random(row)]
    for chance in group["random"]:
        drawn = [row for row in group["rows"] if _random(row) and row["heal"] == chance["heal"]]
        rows.append(_mean_row(drawn, chance))
    return sorted(rows, key=lambda row: row["rise"]["mean"][0])


def _mean_row(drawn: Sequence[Row], chance: Mapping[str, Any]) -> Row:
    def mean(values: Iterable[float]) -> float:
        held = list(values)
        return math.fsum(held) / len(held)

    first = drawn[0]
    domains = {}
    for name in first["quality"]["domains"]:
        held = [row["quality"]["domains"][name] for row in drawn]
        domains[name] = {key: mean(entry[key] for entry in held) for key in ("loss", "kl", "top1_agreement")}
        domains[name]["perplexity"] = math.exp(min(domains[name]["loss"], 700.0))
    overall = {key: mean(row["quality"]["mean"][key] for row in drawn) for key in ("loss", "kl", "top1_agreement")}
    made = {
        **first,
        "draws": list(drawn),
        "name": f"{BASELINE}, mean of {chance['draws']}",
        "method": BASELINE,
        "title": "seeded draws",
        "plan": None,
        "quality": {"domains": domains, "mean": overall},
        "rise": {"mean": [chance["mean"], None], "range": [chance["least"], chance["largest"]]},
        "planning": {key: mean(row["planning"][key] for row in drawn) for key in first["planning"]},
        "worse_than_random": None,
        "to_best": None,
        "tied": False,
    }
    for key in ("experts", "parameters", "bytes"):
        made[key] = [first[key][0], round(mean(row[key][1] for row in drawn))]
    if "tasks" in first:
        made["tasks"] = {name: mean(row["tasks"][name] for row in drawn) for name in first["tasks"]}
    return made


def original_file(job: Comparison) -> Path:
    """The file of the original's own task results."""
    return job.folder / CELLS / "original.json"


def statistics_folder(job: Comparison) -> Path:
    """The folder of the statistics. A .json file with the same name beside it has the time and memory of calibration."""
    everything = any(cell.contender.method.all_outputs for cell in job.cells)
    return job.folder / WORK / ("statistics-all-outputs" if everything else "statistics")
