"""Experts a layer by a budget that runs the masked model (`planning.budgets`): the search, its stored scores, and what the plan says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from random import Random

from expertsmith.planning.budgets import SEARCHED, Judge, Removals, Scores, rounds, space_of
from expertsmith.planning.job import Job
from expertsmith.planning.work import prepare_folder
from expertsmith.ranks import current


def searched(
    job: Job, kept: Callable[[Mapping[int, int]], dict[int, list[int]]], removable: Mapping[int, int]
) -> dict[int, int]:
    """Experts that each layer keeps, by a budget that runs the masked model; the uniform budget's if that is no worse.

    Args:
        kept: experts to keep by layer → their ids, by the method.
        removable: experts that the method can remove at most, by layer.
    """
    search = job.search
    assert search is not None
    space = space_of({layer: job.count(layer) for layer in removable}, job.rules, removable)

    def counts(removals: Removals) -> dict[int, int]:
        taken = zip(space.layers, removals, strict=True)
        return {layer: job.rules[layer].num_experts - removed * space.unit for layer, removed in taken}

    if not space.free:
        job.notes.append(f"budget {job.budget}: no other distribution over the layers is possible, so it is the uniform one")
        return counts(space.uniform)
    judge = search.judge(search.values["samples"])
    known, save = _earlier(job, judge)
    with job.progress.task("search", rounds(job.budget, search.values, len(space.layers)), "plans") as advance:
        scores = Scores(
            space,
            lambda removals: kept(counts(removals)),
            judge.score,
            Random(search.seed),
            job.progress.note,
            advance,
            known,
            save,
        )
        found = SEARCHED[job.budget](scores, **search.values)
        best, uniform = scores(found), scores(space.uniform)
    if best <= uniform:
        found = space.uniform
    _tell(job, judge, scores, found)
    return counts(found)


def _earlier(job: Job, judge: Judge) -> tuple[dict[str, float], Callable[[str, float], None]]:
    """Scores that an interrupted run has left in the work folder, and what adds one."""
    assert job.search is not None
    folder, dtype = job.search.folder, job.search.dtype
    if folder is None:
        return {}, lambda key, score: None
    path = folder / "scores.jsonl"

    def held() -> dict[str, float]:
        groups = {str(n): rules.groups for n, rules in job.rules.items()}
        prepare_folder(folder, job, {"text": judge.fingerprint, "dtype": dtype, "exact": judge.exact, "groups": groups})
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a killed run may have left half a line
        path.write_text("".join(whole), encoding="utf-8")
        return dict(json.loads(line) for line in whole)

    def save(key: str, score: float) -> None:
        if current().first:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, score]) + "\n")

    return current().leading(held), save


def _tell(job: Job, judge: Judge, scores: Scores, found: Removals) -> None:
    """What the plan says about a search: its settings and result in the options, and notes for its reader."""
    assert job.search is not None
    space = scores.space
    best, uniform = scores(found), scores(space.uniform)
    job.found["search"] = {
        **job.search.values,
        "seed": job.search.seed,
        "data": judge.fingerprint,
        "tokens": judge.tokens,
        "exact": judge.exact,
        "scored": len(scores.seen),
        "esap": best,
        "uniform_esap": uniform,
    }
    told = f"on {judge.tokens:,} predicted tokens; {len(scores.seen)} distributions of experts over layers were scored"
    if found == space.uniform:
        job.notes.append(f"budget {job.budget} found nothing better than uniform (ESAP {uniform:.4f} {told}), so it is uniform")
    else:
        job.notes.append(f"budget {job.budget}: ESAP {best:.4f}, uniform {uniform:.4f} ({told})")
    if not judge.exact:
        job.notes.append(
            "ESAP is an upper bound: of the original's distributions the 256 most probable tokens were stored, and the others as one"
        )
    if job.statistics is not None and job.statistics.header["data"]["fingerprint"] == judge.source:
        job.notes.append(
            "the experts per layer were searched on the calibration text, so ESAP flatters this plan; evaluate it on held-out text"
        )
