"""Calibrate once, plan every cell, evaluate every plan, write table, plot and page. Finished cells are not recomputed."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsmith.calibration.opening import open_model, token_data
from expertsmith.calibration.spec import refuse_missing
from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.output import refuse_other_model
from expertsmith.comparison.cells import CELLS, WORK, Cell, cells_of, load, parse_budget, parse_heal, save
from expertsmith.comparison.judging import refuse_stream
from expertsmith.comparison.results import original_file, statistics_folder
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory, take_inventory
from expertsmith.experts.rules import keep_count
from expertsmith.healing.options import LAYERWISE
from expertsmith.planning.plan import Plan, load_plan
from expertsmith.ranks import ALONE, ApartError, Ranks, current, refuse_several
from expertsmith.views.progress import Progress, Silent

if TYPE_CHECKING:
    from expertsmith.calibration.data import TokenData
    from expertsmith.engine import LoadedModel
    from expertsmith.evaluation.quality import Quality

JUDGED_TOKENS = 4096  # tokens that run at once when logits over the vocabulary are in memory
PLANS = "plans"
RESULTS = ("comparison.json", "comparison.html", "comparison.svg", "comparison.md")


@dataclass(frozen=True)
class Tasks:
    """lm-eval tasks for every cell. `identity`: of everything but the model that answers depend on; `scores`: loaded model → scores."""

    identity: str
    scores: Callable[[LoadedModel], Mapping[str, float]]


@dataclass(frozen=True)
class Stages:
    """The verbs that a comparison uses."""

    calibrate: Callable[..., Any]
    plan: Callable[..., Plan]
    apply: Callable[..., Any]
    heal: Callable[..., dict[str, Any]]


@dataclass
class Comparison:
    """The cells, the data and the output folder of a comparison. `shape`: the options of `calibrate` for turning text into sequences."""

    stages: Stages

    inventory: Inventory
    data: Sequence[str]
    eval_data: Sequence[str]
    folder: Path
    cells: list[Cell]
    notes: list[str]
    shape: dict[str, Any]
    where: dict[str, Any]  # device, dtype, memory
    progress: Progress
    resume: bool = True
    tasks: Tasks | None = None
    ranks: Ranks = ALONE  # all calibrate, plan, heal and judge; the first applies and writes

    @cached_property
    def calibration(self) -> TokenData | None:
        """The calibration text for choosing experts; None without data."""
        if not self.data:
            return None
        source = self.inventory.checkpoint
        return token_data(source.path, source.config, self.data, self.progress, **self.shape)

    @cached_property
    def heldout(self) -> TokenData:
        """The held-out text for judging cells, in windows that overlap by one token."""
        source, shape = self.inventory.checkpoint, {key: self.shape[key] for key in ("samples", "seq_len", "seed", "columns")}
        options = {"pack": True, "overlong": "truncate", "overlap": 1, **shape}
        return token_data(source.path, source.config, self.eval_data, self.progress, **options)

    @property
    def text(self) -> str | None:
        """The fingerprint of `calibration`."""
        return self.calibration.fingerprint if self.calibration else None

    @property
    def original_with(self) -> dict[str, Any]:
        """Everything that the original's own task results depend on."""
        return {"model": self.inventory.checkpoint.fingerprint, "asked": self.tasks.identity if self.tasks else None}

    def planned_with(self, cell: Cell) -> dict[str, Any]:
        """Everything that a plan depends on."""
        return {
            "model": self.inventory.checkpoint.fingerprint,
            "data": self.text if cell.reader else None,
            "dtype": self.where["dtype"],
            "method": cell.contender.method.name,
            "options": dict(cell.contender.options),
            "keep": cell.keep,
            "budget": cell.budget,  # with the options of its search
            **({"progressive": True} if cell.progressive else {}),  # left out, so that earlier cells stay valid
        }

    def made_with(self, cell: Cell) -> dict[str, Any]:
        """Everything that a cell depends on."""
        made = {**self.planned_with(cell), "heldout": self.heldout.fingerprint}
        if cell.heal is not None:
            name, options = parse_heal(cell.heal)
            made["heal"] = {"method": name, "options": options, "data": self.text}
        return made


def compare(
    model: str | Path,
    methods: Sequence[str],
    keep: Sequence[float | int | str],
    data: Sequence[str],
    eval_data: Sequence[str],
    out: str | Path,
    *,
    stages: Stages,
    budgets: Sequence[str] = ("uniform",),
    heal: Sequence[str] = (),
    progressive: bool = False,
    tasks: Sequence[str] = (),
    task_path: Sequence[str | Path] = (),
    limit: int | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 42,
    columns: Mapping[str, str] | None = None,
    pack: bool | None = None,
    overlong: str = "refuse",
    batch_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    memory: str = "auto",
    resume: bool = True,
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """See `verbs.compare`."""
    from expertsmith.comparison.results import together

    folder, progress, ranks = Path(out), progress or Silent(), current()
    if tasks:
        refuse_several("compare --tasks")
    cells, notes = cells_of(methods, keep, budgets, heal, progressive)
    needs = next(filter(None, (cell.heal or cell.reader for cell in cells)), None)
    if needs and not data:
        raise UserError(f"{needs} needs calibration text", "pass --data FILE")
    if not eval_data:
        raise UserError("compare judges every plan on held-out text", "pass --eval-data FILE")
    refuse_missing([*data, *eval_data])
    inventory = take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    _check(inventory, cells)
    asked = (
        _tasks(inventory, tasks, task_path, limit, min(batch_tokens or JUDGED_TOKENS, JUDGED_TOKENS), memory, progress)
        if tasks
        else None
    )
    ranks.leading(lambda: _prepare(folder, resume, inventory.checkpoint.fingerprint, overwrite))
    shape = {
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "columns": columns,
        "pack": pack,
        "overlong": overlong,
        "batch_tokens": batch_tokens,
    }
    where = {"device": device, "dtype": dtype, "memory": memory}
    job = Comparison(stages, inventory, data, eval_data, folder, cells, notes, shape, where, progress, resume, asked, ranks)
    ranks.agree("model or text", lambda: (inventory.checkpoint.fingerprint, job.text, job.heldout.fingerprint))
    held = ranks.leading(lambda: {cell.name: load(_result(job, cell), job.made_with(cell)) for cell in cells})
    missing = [cell for cell in cells if not _complete(held[cell.name], asked)]
    if len(missing) < len(cells):
        progress.note(f"{len(cells) - len(missing)} of {len(cells)} cells already exist")
    planned = _plans(job, missing)
    _judge(job, [cell for cell in missing if cell.heal is None], planned, held)
    _heal(job, [cell for cell in missing if cell.heal is not None], planned, held)
    if not any(held.values()):
        raise UserError(f"no method could be compared: {'; '.join(job.notes)}")

    def ended() -> dict[str, Any]:
        found = together(job, {name: entry for name, entry in held.items() if entry is not None})
        write(folder, found)
        return found

    return ranks.leading(ended)


def _complete(held: Mapping[str, Any] | None, tasks: Tasks | None) -> bool:
    return held is not None and (tasks is None or held.get("asked") == tasks.identity)


def _tasks(
    inventory: Inventory,
    names: Sequence[str],
    folders: Sequence[str | Path],
    limit: int | None,
    batch_tokens: int,
    memory: str,
    progress: Progress,
) -> Tasks:
    from expertsmith.calibration.data import load_tokenizer
    from expertsmith.comparison.judging import tasks_for
    from expertsmith.evaluation import tasks

    refuse_stream(memory)
    tokenizer = load_tokenizer(inventory.checkpoint.path)
    found = tasks_for(tokenizer, names, folders, limit, progress)
    return Tasks(tasks.identity_of(found), lambda model: tasks.scores(found, model, tokenizer, batch_tokens, progress))


def _check(inventory: Inventory, cells: Sequence[Cell]) -> None:
    """Refuse impossible cells before anything is computed."""
    from expertsmith.experts.rules import refuse_groups
    from expertsmith.surgery.uneven import check_uneven, refuse_padded

    refuse_padded(inventory)
    rules = {layer: inventory.rules_of(layer) for layer in inventory.layers}
    if any(cell.budget != "uniform" for cell in cells):
        check_uneven(inventory)
    if any(cell.budget in ("global", "threshold") for cell in cells):
        refuse_groups(rules)
    for share in dict.fromkeys(cell.keep for cell in cells if cell.keep is not None):
        for layer, entry in rules.items():
            keep_count(share, entry, f"decoder layer {layer} of {inventory.checkpoint.source}")


def _prepare(folder: Path, resume: bool, fingerprint: str, overwrite: bool) -> None:
    own = {PLANS, CELLS, WORK, *RESULTS, *(f"{name}.partial" for name in RESULTS)}
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "choose a folder with -o")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in own) if folder.exists() else []
    if foreign:
        raise UserError(f"{folder} contains files that are not a comparison ({foreign[0]})", "choose another folder with -o")
    refuse_other_model(folder / RESULTS[0], "comparison", fingerprint, overwrite)
    if not resume:
        for name in (PLANS, CELLS, WORK):
            shutil.rmtree(folder / name, ignore_errors=True)


def _result(job: Comparison, cell: Cell) -> Path:
    return job.folder / CELLS / f"{cell.name}.json"


def _plan_file(job: Comparison, cell: Cell) -> Path:
    return job.folder / PLANS / f"{cell.plan_name}.json"


def _plans(job: Comparison, missing: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Plan name → time and memory of planning, for every plan that a missing cell needs. Refused plans are noted and left out."""
    found: dict[str, dict[str, Any]] = {}
    wanted = {cell.plan_name: cell for cell in missing}
    statistics = None
    for name, cell in wanted.items():
        held = job.ranks.leading(partial(_planned, job, cell))
        try:
            if held is None and cell.progressive:
                own, took = _followed(job, cell)
                held = _plan(job, cell, own, took)
            elif held is None and cell.contender.method.reads == "statistics" and statistics is None:
                statistics = _statistics(job)
            found[name] = held or _plan(job, cell, statistics)
        except ApartError:
            raise
        except UserError as error:
            job.notes.append(f"{name}: {error}")
            job.progress.note(job.notes[-1])
    return found


def _mark(job: Comparison, cell: Cell) -> Path:
    return job.folder / WORK / "planned" / f"{cell.plan_name}.json"


def _planned(job: Comparison, cell: Cell) -> dict[str, Any] | None:
    """Time and memory of planning, if the plan is there."""
    return load(_mark(job, cell), job.planned_with(cell)) if _plan_file(job, cell).exists() else None


def _plan(job: Comparison, cell: Cell, statistics: Any, calibrated: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Make a plan, with all ranks; returns the time and memory that it took on the first, with those of its own calibration. A refused plan leaves
    no file."""
    from expertsmith.comparison.footprint import footprint
    from expertsmith.surgery.apply import check_plan

    method, target = cell.contender.method, _plan_file(job, cell)
    options: dict[str, Any] = {"stats": statistics} if method.reads == "statistics" else {}
    runs = method.reads == "model" or cell.searched
    budget, search = parse_budget(cell.budget)
    if runs:
        options |= {"data": job.data, **job.shape, **job.where}
    place = cell.plan_name if method.reads == "model" else method.name  # weights are measured once for all ratios
    error: UserError | None = None
    with footprint() as took:
        try:
            made = job.stages.plan(
                job.inventory,
                method.name,
                cell.keep,
                budget=budget,
                options={**cell.contender.options, **search},
                out=target,
                overwrite=True,
                work=job.folder / WORK / place,
                progress=job.progress,
                **options,
            )
            check_plan(made, job.inventory)
        except UserError as found:
            error = found
    if runs:
        gc.collect()  # free the model that it opened, so that it does not count as the next one's memory
    try:
        job.ranks.refuse_together(error)
    except ApartError:
        raise
    except UserError:
        job.ranks.leading(partial(target.unlink, missing_ok=True))
        raise
    if calibrated is not None:
        took = {key: max(value, calibrated[key]) for key, value in took.items()} | {
            "seconds": round(took["seconds"] + calibrated["seconds"], 3)
        }
    return job.ranks.leading(lambda: save(_mark(job, cell), job.planned_with(cell), {"planning": took}))


def _statistics(job: Comparison) -> Any:
    """The statistics of the original, for all cells but the progressive ones."""
    methods = [cell.contender.method for cell in job.cells]
    wanted = {name: any(getattr(method, name) for method in methods) for name in ("all_outputs", "output_moments", "neurons")}
    target = statistics_folder(job)
    made, took = _calibrated(job, target, **wanted)
    mark, made_with = target.with_suffix(".json"), {"model": job.inventory.checkpoint.fingerprint, "data": job.text}
    if job.ranks.first and load(mark, made_with) is None:  # else a finished pass was only read, so keep its footprint
        save(mark, made_with, {"calibration": took})
    return made


def _followed(job: Comparison, cell: Cell) -> tuple[Any, dict[str, float]]:
    """The statistics that follow a cell's choice, and the time and memory of taking them."""
    method, options = cell.contender.method, dict(cell.contender.options)
    target = job.folder / WORK / "progressive" / cell.plan_name
    return _calibrated(job, target, progressive=True, method=method.name, keep=cell.keep, options=options)


def _calibrated(job: Comparison, target: Path, **how: Any) -> tuple[Any, dict[str, float]]:
    from expertsmith.comparison.footprint import footprint

    options = {**how, "resume": job.resume, "progress": job.progress, **job.shape, **job.where}
    made, error = None, None
    with footprint() as took:
        try:
            made = job.stages.calibrate(job.inventory.checkpoint.source, job.data, target, **options)
        except UserError as found:
            error = found
    job.ranks.refuse_together(error)
    return made, took


def _judge(job: Comparison, missing: Sequence[Cell], planned: Mapping[str, Any], held: dict[str, Any]) -> None:
    """Judge cells without healing: apply the plan to the loaded model, which is also `verify`'s reference for a written checkpoint."""
    from expertsmith.surgery.enforced import enforced
    from expertsmith.surgery.mask import in_force

    missing = [cell for cell in missing if cell.plan_name in planned]
    if not missing:
        return
    model, reference = _open(job, job.inventory), _open(job, job.inventory)
    if job.tasks is not None and load(original_file(job), job.original_with) is None:
        with in_force(reference):
            save(original_file(job), job.original_with, {"tasks": dict(job.tasks.scores(reference))})
    for cell in missing:
        made = job.ranks.leading(partial(load_plan, _plan_file(job, cell)))
        with enforced(model, made, job.inventory):
            found = _judged(job, model, reference)
        _finish(job, cell, made, planned, held, found)


def _heal(job: Comparison, missing: Sequence[Cell], planned: Mapping[str, Any], held: dict[str, Any]) -> None:
    """Judge cells with healing: write, heal, judge and remove one checkpoint at a time."""
    for cell in missing:
        if cell.plan_name not in planned:
            continue
        made = job.ranks.leading(partial(load_plan, _plan_file(job, cell)))
        written, healed = job.folder / WORK / "unhealed", job.folder / WORK / cell.name
        healing = _healed(job, cell, made, written, healed)
        student = _open(job, take_inventory(open_checkpoint(healed), novices=True))
        found = _judged(job, student, _open(job, job.inventory))
        _finish(job, cell, made, planned, held, {**found, "healing": healing})
        for folder in (written, healed):
            job.ranks.leading(partial(shutil.rmtree, folder))


def _healed(job: Comparison, cell: Cell, plan: Plan, written: Path, healed: Path) -> dict[str, Any]:
    """Write a cell's checkpoint and heal it, with all ranks if its method can; returns the time and memory of healing, and whether the result was
    accepted."""
    from expertsmith.comparison.footprint import footprint

    assert cell.heal is not None
    name, options = parse_heal(cell.heal)
    more = {"options": options, "overwrite": True, "resume": job.resume, "progress": job.progress}
    run = {key: job.where[key] for key in ("device", "memory")}

    def heal() -> dict[str, Any]:
        with footprint() as took:
            source = job.inventory.checkpoint.source
            report = job.stages.heal(written, source, job.data, healed, method=name, **more, **job.shape, **run)
        return {**took, "accepted": report["accepted"]}

    def apply() -> None:
        job.stages.apply(job.inventory, plan, written, overwrite=True, progress=job.progress)

    job.ranks.leading(apply)
    if name not in LAYERWISE:
        return job.ranks.leading(heal)
    found = heal()
    return job.ranks.leading(lambda: found)


def _open(job: Comparison, inventory: Inventory) -> LoadedModel:
    """Open one of two models that are in memory together."""
    from expertsmith.engine.devices import choose_device, choose_memory

    where, both = job.where, [inventory.checkpoint, job.inventory.checkpoint]
    mode = choose_memory(where["memory"], both, choose_device(where["device"]), where["dtype"], job.ranks)
    if job.tasks is not None:
        refuse_stream(mode)
    return open_model(inventory, Silent(), device=where["device"], dtype=where["dtype"], memory=mode)


def _judged(job: Comparison, model: LoadedModel, reference: LoadedModel) -> dict[str, Any]:
    """Quality against the original, with skip thresholds of the original's own config.json applied to the original."""
    from expertsmith.evaluation.quality import measure
    from expertsmith.surgery.mask import in_force

    with ExitStack() as stack:
        stack.enter_context(in_force(reference))
        batches = job.heldout.batches(min(job.shape["batch_tokens"] or JUDGED_TOKENS, JUDGED_TOKENS))
        quality = measure(model, batches, reference, job.progress, job.ranks)
        scores = {} if job.tasks is None else {"tasks": dict(job.tasks.scores(model)), "asked": job.tasks.identity}
    return {"quality": quality.to_json(), "rise": _rise(quality), **scores}


def _rise(quality: Quality) -> dict[str, Any]:
    """The rise above the original in nats per token, [mean, paired standard error over sequences], by domain and for the mean of the
    domains. `sequences`: [tokens, summed rise] of each sequence, for comparing two results."""
    domains = {name: [entry.rise, entry.rise_se] for name, entry in quality.domains.items()}
    count = len(domains)
    mean = [sum(rise for rise, _ in domains.values()) / count, math.hypot(*(error for _, error in domains.values())) / count]
    sequences = {name: [list(entry.rises[s]) for s in sorted(entry.rises)] for name, entry in quality.domains.items()}
    return {"domains": domains, "mean": mean, "sequences": sequences}


def _finish(
    job: Comparison, cell: Cell, made: Plan, planned: Mapping[str, Any], held: dict[str, Any], found: Mapping[str, Any]
) -> None:
    assert made.summary is not None
    summary = {key: list(value) for key, value in made.summary.model_dump().items()}
    more = {"plan": f"{PLANS}/{cell.plan_name}.json", **summary, "planning": planned[cell.plan_name]["planning"], **found}
    held[cell.name] = job.ranks.leading(lambda: save(_result(job, cell), job.made_with(cell), more))
    mean, error = found["rise"]["mean"]
    job.progress.note(f"{cell.name}: {mean:+.4f} ± {error:.4f} nats per token")


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """Write all four result files, each completely or not at all."""
    from expertsmith.comparison.results import displayed
    from expertsmith.views.pages.comparison import page
    from expertsmith.views.pictures import svg
    from expertsmith.views.wording import markdown

    seen = displayed(found)
    texts = {
        "comparison.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        "comparison.md": markdown(seen),
        "comparison.svg": svg(seen),
        "comparison.html": page(seen),
    }
    for name, text in texts.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)
