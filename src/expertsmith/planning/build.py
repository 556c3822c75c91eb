"""Build a plan from method and budget: inputs of each kind of method, number of kept experts a layer, details and notes of the plan."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from expertsmith.calibration import stats as storage
from expertsmith.calibration.stats import LayerStatistics, Statistics, load_statistics
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory
from expertsmith.experts.rules import Rules, keep_count, most_salient, over_layers, refuse_groups
from expertsmith.methods.base import Array, Budget, Choice, Facts, Method, Order
from expertsmith.methods.information import Counting
from expertsmith.planning import progressive
from expertsmith.planning.budgets import SEARCHED, Judge, Removals, Scores, Search, rounds, space_of
from expertsmith.planning.plan import CalibrationData, LayerPlan, Merge, Novices, Plan, Source, Summary, digest
from expertsmith.planning.plan import Method as MethodEntry
from expertsmith.ranks import current
from expertsmith.views.progress import Progress, Silent
from expertsmith.views.show import ranges

if TYPE_CHECKING:
    from expertsmith.calibration.data import TokenData
    from expertsmith.engine import LoadedModel

FEW_TOKENS = 30  # below this many tokens a mean over an expert's tokens is noise (frontier card, section 1)
MEASURED = "expertsmith.measured"


@dataclass
class Job:
    """The inputs of a plan. `work`: folder for results that are costly to recompute, reused with `resume`. `open` loads model and tokens if
    the method runs the model. `mtp`: whether multi-token prediction is kept; its layers are planned after `layers`, which are by default
    the decoder layers with experts. `device`: where weights are measured. `search`: for a budget that is searched."""

    inventory: Inventory
    method: Method
    values: dict[str, Any]
    keep: float | int | None
    budget: Budget
    rules: dict[int, Rules]
    progress: Progress
    statistics: Statistics | None = None
    work: Path | None = None
    resume: bool = True
    open: Callable[[], tuple[LoadedModel, TokenData]] | None = None
    batch_tokens: int | None = None
    notes: list[str] = field(default_factory=list)
    tokens: CalibrationData | None = None
    mtp: Literal["keep", "drop"] = "keep"
    layers: list[int] = field(default_factory=list)
    device: str = "cpu"
    search: Search | None = None
    found: dict[str, Any] = field(default_factory=dict)  # what the plan says about the search

    def __post_init__(self) -> None:
        self.layers = self.layers or self.inventory.layers

    def facts(self, layer: int) -> Facts:
        """The facts about a layer that the method gets."""
        rules, lengths = self.rules[layer], self.statistics.sequence_lengths if self.statistics else {}
        return Facts(layer, rules.num_experts, lengths, self.inventory.architecture.model_type, rules)

    def count(self, layer: int) -> int:
        """The number of experts that the layer keeps with a uniform budget."""
        assert self.keep is not None
        return keep_count(self.keep, self.rules[layer], f"decoder layer {layer} of {self.inventory.checkpoint.source}")


def rules_of(inventory: Inventory, router_groups: str, mtp: bool = False) -> dict[int, Rules]:
    """The router rules of every layer, with `mtp` also those of multi-token prediction; "flatten" removes the expert_groups."""
    rules = {layer: inventory.rules_of(layer) for layer in inventory.layers + (inventory.mtp_layers if mtp else [])}
    if router_groups == "flatten":
        rules = {layer: Rules(entry.num_experts, entry.top_k) for layer, entry in rules.items()}
    return rules


def choose_budget(method: Method, budget: str | None, keep: float | int | None) -> Budget:
    """The requested budget, or the method's first one that fits `keep` (None: the method's own threshold).

    Raises:
        UserError: a budget that the method does not have, or a keep that is missing or has no effect.
    """
    if budget is None:
        fitting = [entry for entry in method.budgets if (entry == "threshold") == (keep is None)]
        if not fitting:
            raise UserError(f"--keep is required for method {method.name}", "e.g. --keep 0.5")
        return fitting[0]
    found = next((entry for entry in method.budgets if entry == budget), None)
    if found is None:
        raise UserError(f"method {method.name} has no budget {budget!r}", f"choose {' or '.join(method.budgets)}")
    if (found == "threshold") != (keep is None):
        raise UserError(
            "--keep has no effect with budget threshold, which uses the method's own threshold"
            if keep is not None
            else f"--keep is required with budget {budget}",
            "leave --keep out" if keep is not None else "e.g. --keep 0.5",
        )
    return found


def make_plan(job: Job, router_groups: Any, uniform: bool, options: Mapping[str, Any]) -> Plan:
    """Make the plan of a job. `uniform` replaces counts that differ between layers by the nearest equal ones, and notes what that costs.

    Raises:
        UserError: progressive statistics of another choice.
    """
    if job.statistics is not None:
        progressive.refuse_other(job.statistics.header, job.method, job.values, job.keep, job.budget, job.rules, router_groups)
    entries = _entries(job)
    counts = {layer: len(entry.keep) for layer, entry in entries.items()}
    if uniform and len(set(counts.values())) > 1:
        entries = _even_out(job, entries, counts)
    inventory = job.inventory
    constants: dict[int, Array] = {}
    if job.method.constants:
        entries, constants = _with_novices(job, entries)
    ahead = inventory.mtp_layers if job.mtp == "keep" else []
    if ahead:
        entries = {**entries, **_ahead(job, ahead, max(len(entry.keep) for entry in entries.values()), router_groups)}
    _warn(entries, job)
    used = {"budget": job.budget, **({"keep": job.keep} if job.keep is not None else {}), **job.values, **options, **job.found}
    calibration = job.tokens
    if job.statistics:
        used |= {"progressive": True} if progressive.follows(job.statistics.header) else {}
        calibration = CalibrationData(fingerprint=job.statistics.header["data"]["fingerprint"], tokens=job.statistics.tokens)
    made = Plan(
        method=MethodEntry(name=job.method.name, options=used),
        model=Source(model_type=inventory.architecture.model_type, fingerprint=inventory.checkpoint.fingerprint),
        calibration=calibration,
        router_groups=router_groups,
        mtp=job.mtp if inventory.has_mtp else None,
        layers=[entries[layer] for layer in inventory.layers + ahead],
        summary=summary_of(entries.values(), inventory, job.mtp),
        notes=job.notes,
    )
    return made.with_constants(constants, "the plan") if constants else made


def plan_of_layer(job: Job, statistics: Statistics) -> Plan:
    """The plan of the one layer of these statistics, as a job with budget "uniform" makes it with all layers."""
    own = replace(job, statistics=statistics, layers=list(statistics.layers), work=None, progress=Silent(), notes=[])
    entries = _entries(own)
    constants: dict[int, Array] = {}
    if job.method.constants:
        entries, constants = _with_novices(own, entries)
    source = Source(model_type=job.inventory.architecture.model_type, fingerprint=job.inventory.checkpoint.fingerprint)
    made = Plan(method=MethodEntry(name=job.method.name), model=source, layers=list(entries.values()))
    return made.with_constants(constants, "the plan") if constants else made


def summary_of(entries: Iterable[LayerPlan], inventory: Inventory, mtp: str) -> Summary:
    """The total experts, parameters and bytes of a plan's layers, before and after."""
    entries = list(entries)
    had = sum(inventory.experts_in(layer) for layer in inventory.layers + inventory.mtp_layers)
    kept = sum(len(entry.keep) for entry in entries)
    before, after = inventory.size(), sized(entries, inventory, mtp == "keep")
    return Summary(experts=(had, kept), parameters=(before[0], after[0]), bytes=(before[1], after[1]))


def sized(entries: Iterable[LayerPlan], inventory: Inventory, mtp: bool) -> tuple[int, int]:
    """(parameters, bytes) of a plan's output. With novices, routers keep all rows, and the constants are added."""
    entries = list(entries)
    novices = [entry.novices for entry in entries if entry.novices is not None]
    size = inventory.size({entry.layer: len(entry.keep) for entry in entries}, mtp=mtp, routers=not novices)
    numbers = sum(len(held.experts) * held.width for held in novices)
    return size[0] + numbers, size[1] + 4 * numbers


def _with_novices(job: Job, entries: Mapping[int, LayerPlan]) -> tuple[dict[int, LayerPlan], dict[int, Array]]:
    """The entries with what is not kept as novices, and the constants of every layer."""
    method, made, constants = job.method, dict(entries), {}
    assert method.constants is not None
    for layer, entry in entries.items():
        gone = sorted(set(range(entry.num_experts)) - set(entry.keep))
        if gone:
            every: Array = method.constants(_statistics(job, layer), **method.values_for(method.constants, job.values))
            values = np.ascontiguousarray(every[gone], dtype="<f4")
            if not np.isfinite(values).all():
                raise UserError(
                    f"the constants of decoder layer {layer} are not finite",
                    "if activations overflowed in the calibration, calibrate with --dtype float32",
                )
            constants[layer] = values
            held = Novices(experts=gone, width=values.shape[1], sha256=digest(values))
            made[layer] = entry.model_copy(update={"novices": held})
    return made, constants


def _ahead(job: Job, layers: list[int], count: int, router_groups: str) -> dict[int, LayerPlan]:
    """Plan the multi-token-prediction layers, with the number of experts that config.json will have: by the job's method, or by the weights
    if the method cannot be used for them."""
    if job.method.constants:
        every = {layer: job.inventory.experts_in(layer) for layer in layers}
        return _marked({n: LayerPlan(layer=n, num_experts=count, keep=list(range(count))) for n, count in every.items()})
    if job.method.reads == "model":
        why = f"method {job.method.name} searches the decoder layers only"
    elif job.statistics is not None and not set(layers) <= set(job.statistics.layers):
        from expertsmith.engine.mtp import why_not_played

        why = why_not_played(job.inventory) or "the statistics are from an older version, which did not include it"
    elif "uniform" not in job.method.budgets:
        why = f"method {job.method.name} does not support budget uniform"
    else:
        rules = rules_of(job.inventory, router_groups, mtp=True)
        # not from the work folder, which holds the decoder layers
        inner = replace(job, layers=layers, keep=count, budget="uniform", rules=rules, work=None)
        return _marked(_entries(inner))
    return by_weights(job.inventory, layers, count, router_groups, why, job.notes, job.progress)


def by_weights(
    inventory: Inventory,
    layers: Sequence[int],
    count: int,
    router_groups: str,
    why: str,
    notes: list[str],
    progress: Progress,
) -> dict[int, LayerPlan]:
    """Keep `count` experts of each of these multi-token-prediction layers, chosen by `aimer`; the reason `why` is added to `notes`."""
    from expertsmith.methods import find

    rules = rules_of(inventory, router_groups, mtp=True)
    method = find("aimer")
    notes.append(
        f"experts of multi-token prediction (layer{'s' * (len(layers) > 1)} {ranges(list(layers))}) were chosen by their weights alone (aimer): {why}"
    )
    return _marked(
        _entries(Job(inventory, method, method.parse_options({}), count, "uniform", rules, progress, layers=list(layers)))
    )


def _marked(entries: Mapping[int, LayerPlan]) -> dict[int, LayerPlan]:
    return {layer: entry.model_copy(update={"mtp": True}) for layer, entry in entries.items()}


def _entries(job: Job) -> dict[int, LayerPlan]:
    if job.method.gives == "saliency":
        return _by_saliency(job)
    if job.method.gives == "order":
        return _by_order(job)
    return _by_search(job) if job.method.reads == "model" else _by_choice(job)


def _even_out(job: Job, uneven: Mapping[int, LayerPlan], counts: Mapping[int, int]) -> dict[int, LayerPlan]:
    """Plan again with the same method and total, but one count for all layers; notes what that costs in the method's own measure."""
    total, groups = sum(counts.values()), max(rules.groups for rules in job.rules.values())
    least = max(rules.least for rules in job.rules.values())
    count = max(least, round(total / len(counts) / groups) * groups)
    found = f"{job.budget} kept {min(counts.values())} to {max(counts.values())} experts per layer, {total} in all"
    job.keep, job.budget, job.resume = count, "uniform", True  # the measurements made before are reused
    job.notes.clear()  # those of the discarded plan
    job.found.clear()
    entries = _entries(job)
    note = f"{found}; uniform keeps {count} in each of {len(counts)}, {count * len(counts)} in all"
    before, after = (_kept_share(plan, job) for plan in (uneven, entries))
    if before is not None and after is not None:
        word = {"saliency": "saliency", "choice": "routed slots of the kept experts"}.get(job.method.gives, "")
        note += f"; share of {word} that is kept, mean over layers: {before:.4f} → {after:.4f}"
    if job.method.gives == "order":
        early = sum(max(0, counts[layer] - count) for layer in counts)
        late = sum(max(0, count - counts[layer]) for layer in counts)
        note += f"; {early} experts are removed that the threshold would keep, {late} are kept that it would remove"
    job.notes.append(note)
    return entries


def _kept_share(entries: Mapping[int, LayerPlan], job: Job) -> float | None:
    shares = []
    for layer, entry in entries.items():
        values: Sequence[float] | Array | None = entry.saliency
        if values is None and job.statistics is not None:
            values = job.statistics.layers[layer].total("selections")
        if values is None:
            return None
        total = float(sum(values))
        shares.append(sum(float(values[e]) for e in entry.keep) / total if total else 1.0)
    return sum(shares) / len(shares)


# --- one function for each kind of method ---


def _by_saliency(job: Job) -> dict[int, LayerPlan]:
    saliency = {layer: _finite(job, layer, scores) for layer, scores in _scores(job)}
    assert job.keep is not None

    def best(counts: Mapping[int, int]) -> dict[int, list[int]]:
        return {n: most_salient(saliency[n], count, job.rules[n], job.method.ties) for n, count in counts.items()}

    if job.budget == "uniform":
        kept = best({layer: job.count(layer) for layer in saliency})
    elif job.budget in SEARCHED:
        kept = best(_searched(job, best, {layer: len(values) for layer, values in saliency.items()}))
    else:
        kept = over_layers(saliency, job.keep, job.rules, job.method.ties)
    return {
        layer: LayerPlan(
            layer=layer,
            num_experts=job.rules[layer].num_experts,
            keep=kept[layer],
            saliency=saliency[layer],
            why=_usage(job, layer),
        )
        for layer in saliency
    }


def _scores(job: Job) -> Iterator[tuple[int, Array]]:
    from expertsmith.experts.weights import expert_weights

    def score(layer: int) -> Array:
        facts = job.facts(layer)
        if job.method.reads == "weights":
            scores: Array = job.method.function(expert_weights(job.inventory, layer), facts, **job.values)
        elif job.method.reads == "nothing":
            scores = job.method.function(facts, **job.values)
        else:
            values = job.method.values_for(job.method.function, job.values)
            scores = job.method.function(_statistics(job, layer), facts, **values)
        return scores

    with job.progress.task("score", len(job.layers), "layers") as advance:
        for layer, scores in current().over(job.layers, score):
            yield layer, scores
            advance(1)


def _finite(job: Job, layer: int, scores: Array) -> list[float]:
    values = [float(score) for score in scores]
    bad = next((e for e, score in enumerate(values) if not math.isfinite(score)), None)
    if bad is not None:
        raise UserError(
            f"method {job.method.name} gives decoder layer {layer}'s expert {bad} the saliency {values[bad]}",
            "if activations overflowed in the calibration, calibrate with --dtype float32",
        )
    return values


def _statistics(job: Job, layer: int) -> LayerStatistics:
    assert job.statistics is not None
    return job.statistics.layers[layer]


def _usage(job: Job, layer: int) -> dict[str, Any] | None:
    return {"selections": _statistics(job, layer).total("selections").tolist()} if job.statistics else None


def _by_order(job: Job) -> dict[int, LayerPlan]:
    options = {name: value for name, value in job.values.items() if name not in job.method.measure_options}
    orders: dict[int, Order] = {
        layer: job.method.function(arrays, job.facts(layer), **options) for layer, arrays in _measured(job)
    }
    if job.budget == "threshold":
        removed = {layer: order.stop for layer, order in orders.items()}
    elif job.budget == "uniform":
        removed = {layer: job.rules[layer].num_experts - job.count(layer) for layer in orders}
    elif job.budget in SEARCHED:

        def left(counts: Mapping[int, int]) -> dict[int, list[int]]:
            gone = {n: orders[n].experts[: job.rules[n].num_experts - count] for n, count in counts.items()}
            return {n: [e for e in range(job.rules[n].num_experts) if e not in gone[n]] for n in counts}

        counts = _searched(job, left, {layer: len(order.experts) for layer, order in orders.items()})
        removed = {layer: job.rules[layer].num_experts - count for layer, count in counts.items()}
    else:
        refuse_groups(job.rules)
        total = sum(job.rules[layer].num_experts - job.count(layer) for layer in orders)
        removed = _by_height(orders, total, {layer: job.rules[layer] for layer in orders})
    entries = {}
    said: list[tuple[str, int]] = []
    for layer, order in orders.items():
        n = job.rules[layer].num_experts
        gone = set(order.experts[: removed[layer]])
        if len(order.experts) < removed[layer]:
            raise UserError(f"decoder layer {layer}: the method can remove at most {len(order.experts)} of {n} experts")
        why = {**order.why, "order": order.experts, "height": order.height}
        said += [(text, layer) for text in why.get("warnings", ())]
        if job.budget == "threshold" and why.get("guard"):
            least = job.rules[layer].least
            said.append((f"the threshold would keep fewer experts than the router needs, so {least} are kept", layer))
        entries[layer] = LayerPlan(layer=layer, num_experts=n, keep=[e for e in range(n) if e not in gone], why=why)
    _say(job, said)
    return entries


def _say(job: Job, said: Sequence[tuple[str, int]]) -> None:
    """Note every text once, with the layers that it is about."""
    for text in dict.fromkeys(text for text, _ in said):
        where = [layer for other, layer in said if other == text]
        job.notes.append(f"{_place(where, job)}: {text}")


def _searched(
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
        _prepare(folder, job, {"text": judge.fingerprint, "dtype": dtype, "exact": judge.exact, "groups": groups})
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


def _place(layers: list[int], job: Job) -> str:
    """ "all layers", "layer 3" or "layers 0–2 5"."""
    if layers == job.inventory.layers:
        return "all layers"
    return f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"


def _by_height(orders: Mapping[int, Order], total: int, rules: Mapping[int, Rules]) -> dict[int, int]:
    """Removals a layer, `total` in all: from the layer whose next removal is highest (on a tie the lower layer), never below the floor."""
    removed = dict.fromkeys(orders, 0)
    for _ in range(total):
        open_layers = [
            layer
            for layer, order in orders.items()
            if removed[layer] < min(len(order.experts), rules[layer].num_experts - rules[layer].least)
        ]
        if not open_layers:
            break
        best = max(open_layers, key=lambda layer: (orders[layer].height[removed[layer]], -layer))
        removed[best] += 1
    return removed


def _measured(job: Job) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yield (layer, result of the method's `measure` on its weights); layers in the work folder are read from there."""
    from expertsmith.experts.weights import Projections

    assert job.method.measure is not None
    measure = job.method.measure
    options = {name: job.values[name] for name in job.method.measure_options}
    folder, counting = job.work, _counting(job.device)

    def known() -> dict[int, dict[str, Array]]:
        if folder is None:
            return {}
        _prepare(folder, job, {"method": job.method.name, "options": options})
        there = [layer for layer in job.layers if storage.layer_path(folder, layer).exists()]
        return {layer: dict(storage.load_layer(folder, layer).domains["weights"]) for layer in there}

    found = current().leading(known)
    with job.progress.task("measure", len(job.layers), "layers") as advance:
        told: set[int] = set(found)  # layers that this rank has measured, or knew
        advance(len(found))

        def make(layer: int) -> dict[str, Array]:
            told.add(layer)
            facts = replace(job.facts(layer), advance=advance, counting=counting)
            return measure(Projections(job.inventory, layer), facts, **options)

        todo = current().over([layer for layer in job.layers if layer not in found], make)
        for layer in job.layers:
            if layer not in found:
                _, found[layer] = next(todo)
                if folder is not None and current().first:
                    storage.save_layer(folder, layer, {"weights": found[layer]})
                if layer not in told:
                    advance(1)
            yield layer, found.pop(layer)


def _counting(device: str) -> Counting:
    """How pairs of weights are counted: on a device other than the CPU, if there is one."""
    from expertsmith.engine.devices import choose_device

    where = choose_device(device)
    if where.type == "cpu":
        return Counting()
    from expertsmith.planning.pairs import counting_on

    return counting_on(where)


def _prepare(folder: Path, job: Job, made_with: Mapping[str, Any]) -> None:
    """Prepare the work folder for this model and these options; results of another model or of other options are removed."""
    header = {"format": MEASURED, "version": 1, "model": job.inventory.checkpoint.fingerprint, **made_with}
    header = json.loads(json.dumps(header))
    mark = folder / "measured.json"
    if folder.exists() and any(folder.iterdir()):
        try:
            old = json.loads(mark.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            raise UserError(f"{folder} contains files that are not measured weights", "choose another output name") from None
        if old == header and job.resume:
            job.progress.note(f"using earlier measurements in {folder}")
            return
        if old != header:
            job.progress.note(f"{folder} is from another model or other options, so it is measured again")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def _by_choice(job: Job) -> dict[int, LayerPlan]:
    layers = job.layers
    assert job.keep is not None
    if job.budget == "global":
        refuse_groups(job.rules)
        assert job.method.allot is not None
        average = sum(job.count(layer) for layer in layers) / len(layers)
        counts = job.method.allot({layer: _statistics(job, layer) for layer in layers}, average)
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
    measured = dict(_measured(job)) if job.method.measure else {}
    said: list[tuple[str, int]] = []

    def cluster(layer: int) -> Choice:
        weights = (measured[layer],) if job.method.measure else ()
        choice: Choice = job.method.function(_statistics(job, layer), *weights, job.facts(layer), counts[layer], **job.values)
        return choice

    with job.progress.task("cluster", len(layers), "layers") as advance:
        for layer, choice in current().over(layers, cluster):
            entries[layer] = _entry(job, layer, choice, _usage(job, layer))
            said += [(text, layer) for text in choice.why.get("warnings", ())]
            advance(1)
    _say(job, said)
    return entries


def _by_search(job: Job) -> dict[int, LayerPlan]:
    """Plan with a method that tries kept sets on the running model; layers with a choice in the work folder are not searched again."""
    from expertsmith.calibration.probe import search_layers

    assert job.open is not None
    model, data = job.open()
    job.tokens = CalibrationData(fingerprint=data.fingerprint, tokens=data.tokens)
    folder = job.work

    def known() -> dict[int, Choice]:
        if folder is None:
            return {}
        made_with = {"method": job.method.name, "options": job.values, "keep": job.keep, "data": data.fingerprint}
        _prepare(folder, job, {**made_with, "groups": {str(n): rules.groups for n, rules in job.rules.items()}})
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


def _warn(entries: Mapping[int, LayerPlan], job: Job) -> None:
    """Add notes if the calibration was too small for the experts that the plan keeps."""
    used = {layer: entry.why["selections"] for layer, entry in entries.items() if entry.why and "selections" in entry.why}
    unreached = [(layer, e) for layer, counts in used.items() for e in entries[layer].keep if counts[e] == 0]
    if unreached:
        layers = sorted({layer for layer, _ in unreached})
        job.notes.append(
            f"{len(unreached)} kept experts (layers {', '.join(map(str, layers))}) got no calibration token: use more calibration text for this ratio"
        )
    few = [e for layer, counts in used.items() for e in entries[layer].keep if 0 < counts[e] < FEW_TOKENS]
    if few and job.method.averages:
        job.notes.append(
            f"{len(few)} kept experts got fewer than {FEW_TOKENS} tokens, so their mean is noise: use more calibration text"
        )


def statistics_for(inventory: Inventory, method: Method, given: Statistics | str | Path, domains: Sequence[str]) -> Statistics:
    """The statistics of these domains for a method.

    Raises:
        UserError: they are of another model or other layers, or lack something that the method needs.
    """
    statistics = matching_statistics(inventory, given, domains, for_plan=True)
    entry = next(iter(statistics.layers.values()))
    if method.all_outputs and not all("all_output_sum" in held for held in entry.domains.values()):
        raise UserError(
            f"method {method.name} needs every expert's output on all tokens, which these statistics do not have",
            "calibrate again with --all-outputs",
        )
    if method.output_moments and not all("output_sq_sum" in held for held in entry.domains.values()):
        raise UserError(
            f"method {method.name} needs the variance of every expert's output, which these statistics do not have",
            "calibrate again with --output-moments",
        )
    return statistics


def matching_statistics(
    inventory: Inventory, given: Statistics | str | Path, domains: Sequence[str] = (), *, for_plan: bool = False
) -> Statistics:
    """Statistics of this checkpoint, of these domains (none: all); `for_plan`: also those of multi-token-prediction layers, if there are any.

    Raises:
        UserError: they are of another model or other layers, or progressive and not for a plan (`make_plan` checks for which).
    """
    statistics = (given if isinstance(given, Statistics) else load_statistics(given)).select(domains)
    if statistics.header["model"]["fingerprint"] != inventory.checkpoint.fingerprint:
        raise UserError(f"the statistics are from another model than {inventory.checkpoint.source}", "calibrate this model")
    if [layer for layer in statistics.layers if layer not in inventory.mtp_layers] != inventory.layers:
        raise UserError("the statistics do not cover the same layers as the checkpoint", "calibrate again")
    if for_plan:
        return statistics
    progressive.refuse(statistics.header)
    return Statistics(statistics.header, {layer: statistics.layers[layer] for layer in inventory.layers})
