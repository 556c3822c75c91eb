"""Plans of methods that choose a layer's experts themselves: from statistics, or by trying them on the running model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from expertsmith.experts.rules import refuse_groups
from expertsmith.methods.base import Choice
from expertsmith.planning.job import Job
from expertsmith.planning.plan import CalibrationData, LayerPlan, Merge
from expertsmith.planning.work import measured, prepare_folder
from expertsmith.ranks import current


def by_choice(job: Job) -> dict[int, LayerPlan]:
    """Plan with a method that chooses each layer's experts from its statistics."""
    layers = job.layers
    assert job.keep is not None
    if job.budget == "global":
        refuse_groups(job.rules)
        assert job.method.allot is not None
        average = sum(job.count(layer) for layer in layers) / len(layers)
        counts = job.method.allot({layer: job.statistics_of(layer) for layer in layers}, average)
        for layer, count in counts.items():
            least = job.rules[layer].least
            if count < least:
                job.notes.append(
                    f"decoder layer {layer}: {count} experts would be left, but the router needs {least}, so {least} are kept"
                )
                counts[layer] = least
    else:
        counts = {layer: job.count(layer) for layer in layers}
    entries = {}
    arrays = dict(measured(job)) if job.method.measure else {}
    said: list[tuple[str, int]] = []

    def cluster(layer: int) -> Choice:
        weights = (arrays[layer],) if job.method.measure else ()
        choice: Choice = job.method.function(job.statistics_of(layer), *weights, job.facts(layer), counts[layer], **job.values)
        return choice

    with job.progress.task("cluster", len(layers), "layers") as advance:
        for layer, choice in current().over(layers, cluster):
            entries[layer] = _entry(job, layer, choice, job.usage(layer))
            said += [(text, layer) for text in choice.why.get("warnings", ())]
            advance(1)
    job.say(said)
    return entries


def by_search(job: Job) -> dict[int, LayerPlan]:
    """Plan with a method that tries kept sets on the running model; layers with a choice in the work folder are not searched again."""
    from expertsmith.calibration.searching import search_layers

    assert job.open is not None
    model, data = job.open()
    job.tokens = CalibrationData(fingerprint=data.fingerprint, tokens=data.tokens)
    folder = job.work

    def known() -> dict[int, Choice]:
        if folder is None:
            return {}
        made_with = {"method": job.method.name, "options": job.values, "keep": job.keep, "data": data.fingerprint}
        prepare_folder(folder, job, {**made_with, "groups": {str(n): rules.groups for n, rules in job.rules.items()}})
        paths = {layer: folder / f"layer_{layer:03d}.json" for layer in job.layers}
        return {n: Choice(**json.loads(path.read_text(encoding="utf-8"))) for n, path in paths.items() if path.exists()}

    def choose(probe: Any) -> Choice:
        found: Choice = job.method.function(probe, job.count(probe.layer), **job.values)
        if folder is not None and current().first:
            target = folder / f"layer_{probe.layer:03d}.json"
            partial = target.with_name(target.name + ".partial")
            partial.write_text(json.dumps({"keep": found.keep, "merge": found.merge, "why": found.why}), encoding="utf-8")
            partial.replace(target)
        return found

    named = {name: job.values[name] for name in ("loss", "batch_size", "progressive") if name in job.values}
    found = search_layers(
        model,
        data,
        choose,
        rules=job.rules,
        done=current().leading(known).get,
        batch_tokens=model.batch_tokens(job.batch_tokens),
        max_tokens=job.values.get("tokens", 0),
        progress=job.progress,
        **named,
    )
    return {layer: _entry(job, layer, choice, None) for layer, choice in found}


def _entry(job: Job, layer: int, choice: Choice, usage: Mapping[str, Any] | None) -> LayerPlan:
    why = {**choice.why, **(usage or {})}
    return LayerPlan(
        layer=layer,
        num_experts=job.rules[layer].num_experts,
        keep=choice.keep,
        merge=[Merge.model_validate(entry) for entry in choice.merge],
        why=why or None,
    )
