"""Open the models, heal with the chosen method, measure, and write the healed checkpoint and its report.

Under `torchrun` all ranks call `heal`; the first alone writes. All read the finished layers of an interrupted healing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from expertsmith.arch import record_of
from expertsmith.calibration.data import TokenData
from expertsmith.checkpoint import Checkpoint, open_checkpoint
from expertsmith.checkpoint.floats import Floats, floats, quantisation_of, refuse_unencodable
from expertsmith.checkpoint.origin import card_metadata, front_matter, name_of, source_of, without_results
from expertsmith.checkpoint.work import work_beside, work_of
from expertsmith.checkpoint.writer import prepare_target
from expertsmith.engine import Batch, LoadedModel, load_model
from expertsmith.engine.devices import Memory, choose_device, choose_memory, one_device
from expertsmith.engine.spread import local_devices
from expertsmith.errors import UserError
from expertsmith.evaluation.quality import Quality, measure
from expertsmith.experts.inventory import Inventory, ragged_layers, take_inventory
from expertsmith.healing.amount import told
from expertsmith.healing.distil import Distillation, router_weights
from expertsmith.healing.experts import LayerExperts
from expertsmith.healing.held import held_batches, held_out
from expertsmith.healing.layerwise import Layerwise
from expertsmith.healing.lora import Adapted, changed_tensors, noisy_embeddings, peft, rounded
from expertsmith.healing.options import LAYERWISE, Lora, as_options
from expertsmith.healing.pair import check_pair
from expertsmith.healing.work import Work
from expertsmith.healing.written import ROUTER, check_floats, into_memory, to_checkpoint, write_healed
from expertsmith.planning.earlier import plans_in
from expertsmith.ranks import current, refuse_several
from expertsmith.surgery.mask import in_force
from expertsmith.surgery.skip import skip_of
from expertsmith.views.progress import Progress, Silent

REPORT = "expertsmith/heal.json"
TRAINED_BATCH = 512  # tokens: small batches are what a step of training is put together from
LOCAL_BATCH = 2048  # the same, of layer_local, where the rule chooses the tokens of a step


@dataclass
class Healing:
    """The options of one healing."""

    inventory: Inventory  # of the compressed checkpoint
    teacher: Checkpoint
    data: TokenData
    method: str
    options: Any
    target: Path
    batch_tokens: int = 8192
    device: str = "auto"
    dtype: str = "float32"
    memory: str = "auto"
    requantise: bool = False  # write the weights that changed in the source's own quantised format
    resume: bool = True
    overwrite: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


def check_start(student: Checkpoint, teacher: Checkpoint, target: Path, overwrite: bool) -> None:
    """Check everything that can be checked before text is read or a model is loaded.

    Raises:
        UserError: an output that exists, overlaps with a model or cannot be written, or a teacher that is not the original.
    """
    prepare_target(target, student.path, overwrite)
    prepare_target(target, teacher.path, overwrite)
    check_pair(student, teacher)


def heal(job: Healing, progress: Progress) -> dict[str, Any]:
    """Write the healed checkpoint; returns its report (`expertsmith/heal.json`).

    Raises:
        UserError: a format that cannot be requantised, too little data, or a work folder of a different healing; several ranks for a method
            that runs in one process, or more of them than batches; see also `check_start`.
    """
    begin = time.perf_counter()
    ranks = current()
    progress = progress if ranks.first else Silent()
    ranks.agree("model or text", lambda: _made_with(job))
    _as_floats(job)
    check_floats(job.inventory)
    _refuse_what_cannot_train(job)
    others = nullcontext(work_of(job.target) / "healing")
    with work_beside(job.target, "healing", progress.note) if ranks.first else others as place:
        report, changed, work = _healed(job, place, progress)
        report["seconds"] = round(time.perf_counter() - begin, 3)
        ranks.leading(lambda: _write(job, job.target, changed, work, report, progress))
    return report


def _healed(job: Healing, place: Path, progress: Progress) -> tuple[dict[str, Any], Collection[str], Work]:
    """Heal; returns the report, the names of the tensors that changed and improved the model, and a reader of their values."""
    source = job.inventory.checkpoint
    ranks = current()
    layerwise, trains = job.method in LAYERWISE, job.method != "least_squares"
    where, mode = _place(job, layerwise)
    student = load_model(source, job.inventory.architecture, memory=mode, device=where, dtype=job.dtype)
    teacher = _teacher(job.teacher, mode, where, job.dtype)
    trained = max(TRAINED_BATCH, job.options.step_tokens or LOCAL_BATCH) if job.method == "layer_local" else TRAINED_BATCH
    size = min(job.batch_tokens, trained) if trains else job.batch_tokens
    pad = getattr(student.config.get_text_config(), "pad_token_id", None)
    batches = job.data.batches(size, pad_id=pad if isinstance(pad, int) and pad >= 0 else 0)
    held = held_out(job.data, batches)
    _refuse_idle_ranks(batches, size)
    work = ranks.leading(lambda: Work(place, _made_with(job), job.resume, job.overwrite))
    work.writes = ranks.first
    if work.rows:
        progress.note(f"resuming: {len(work.rows)} layers are healed already")
    rule, thresholds = skip_of(source.config) or ("ratio", {})
    skips = {layer: (value, rule) for layer, value in thresholds.items()}
    with in_force(student):
        judged = held_batches(batches, held, size)
        before = measure(student, judged, teacher, progress, ranks)
        training: dict[str, Any] = {}
        if layerwise:
            healing = Layerwise(student, teacher, job.inventory, batches, held, job.options, work, skips, progress)
            after = healing.run()
        else:
            training = _distil(job, student, teacher, batches, held, work, progress)
            after = measure(student, judged, teacher, progress)
    changed: Collection[str] = ranks.leading(lambda: work.names)
    after = after if changed else before  # which other batches round differently
    report = _report(job, before, after, held, training, [] if training else list(work.rows.values()))
    if not report["accepted"]:
        progress.note(
            "the healed model is further from the teacher on the held-out tokens than before: the weights stay as they were"
        )
        changed = []
    elif report["mixed"]:
        progress.note(report["mixed"])
    if changed and job.requantise:
        again = ranks.leading(lambda: _requantised(job, changed, work, teacher, (mode, where), judged, progress))
        measure_of = "loss" if report["measure"] == "loss" else "kl"
        kept = _over_all(again["quality"], measure_of) <= _over_all(report["held_out"]["before"], measure_of)
        report["requantised"] = {**again, "accepted": kept}
        if not kept:
            progress.note(
                "quantised again, the healed weights are worse on the held-out tokens than before: the weights stay as they were"
            )
            changed = []
    return report, changed, work


def _refuse_idle_ranks(batches: Sequence[Batch], size: int) -> None:
    world = current().world
    if world > len(batches):
        raise UserError(
            f"the text makes {len(batches)} batches of up to {size} tokens, but there are {world} ranks",
            "run fewer ranks, or pass a smaller --batch-tokens or more text",
        )


def _refuse_what_cannot_train(job: Healing) -> None:
    if job.method not in LAYERWISE:
        refuse_several(f"heal --method {job.method}")
    if job.method != "least_squares" and job.dtype != "float32":
        raise UserError(f"{job.method} trains weights, but --dtype is {job.dtype}", "use --dtype float32")
    if isinstance(job.options, Lora):
        peft()
        if ragged := sorted(ragged_layers(job.inventory.config)):
            raise UserError(
                f"{job.inventory.checkpoint.source} has experts of different widths within decoder layer {ragged[0]}, which adapters cannot have",
                "use --method layer_local or least_squares",
            )
    if job.method not in LAYERWISE and job.memory == "stream":
        raise UserError(
            f"{job.method} sends gradients through the whole model, which --memory stream does not hold",
            "use --memory resident, or --method layer_local",
        )


def _as_floats(job: Healing) -> None:
    """Open a quantised student as floats, in bfloat16 if they will be written so.

    Raises:
        UserError: --requantise without a quantised student, or with a format that needs calibration to be quantised.
    """
    checkpoint = job.inventory.checkpoint
    found = quantisation_of(checkpoint)
    if found is None:
        if job.requantise:
            raise UserError(f"--requantise has nothing to do: {checkpoint.source} is not quantised", "leave it out")
        return
    if job.requantise:
        refuse_unencodable(found, {claim.info.name for claim in job.inventory.floats.claims if claim.routed})
    job.inventory = take_inventory(floats(checkpoint, "F32" if job.requantise else "BF16"))


def _requantised(
    job: Healing,
    changed: Collection[str],
    work: Work,
    teacher: LoadedModel,
    where: tuple[Memory, torch.device],
    batches: Sequence[Batch],
    progress: Progress,
) -> dict[str, Any]:
    """Measure the cost of requantising the healed weights: the written checkpoint against the teacher on the held-out tokens, and the
    relative root mean square error of the weights."""
    view = job.inventory.checkpoint
    assert isinstance(view, Floats)
    error = norm = 0.0
    for name in changed:
        if name in view.stored:
            wanted = work.read(name).float()
            error += float((view.rounded(name, wanted) - wanted).double().square().sum())
            norm += float(wanted.double().square().sum())
    trial = work_of(job.target) / "trial"
    shutil.rmtree(trial, ignore_errors=True)  # of a run that was killed
    try:
        _write(job, trial, changed, work, None, progress)
        student = load_model(
            open_checkpoint(trial), job.inventory.architecture, memory=where[0], device=where[1], dtype=job.dtype
        )
        with in_force(student):
            quality = measure(student, batches, teacher, progress)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return {"quality": quality.to_json(), "weight_error": (error / norm) ** 0.5 if norm else 0.0}


def _distil(
    job: Healing,
    student: LoadedModel,
    teacher: LoadedModel,
    batches: Sequence[Batch],
    held: Sequence[torch.Tensor],
    work: Work,
    progress: Progress,
) -> dict[str, Any]:
    """Train router weights or adapters, and put the changed tensors into `work`, rounded; the student in memory has them merged."""
    if isinstance(job.options, Lora):
        adapted = Adapted(student, job.options)
        distillation = Distillation(student, teacher, batches, held, adapted.weights, job.options, work, progress)
        with noisy_embeddings(student.module, job.options.neftune, job.options.seed):
            distillation.run()
        student.module = adapted.merge()
        rounded(student.module, job.inventory)
        work.save(0, changed_tensors(student.module, job.inventory, work.opened() / "merged"), {"layer": 0})
        return distillation.report
    weights = router_weights(student, job.inventory)
    distillation = Distillation(student, teacher, batches, held, weights, job.options, work, progress)
    distillation.run()
    for layer in student.moe_layers:
        experts = LayerExperts(student.layers[layer], job.inventory.architecture)
        tensors = to_checkpoint(experts, job.inventory, layer, (ROUTER,))
        into_memory(experts, job.inventory, layer, tensors, (ROUTER,))
        work.save(layer, tensors, {"layer": layer})
    return distillation.report


def _place(job: Healing, layerwise: bool) -> tuple[torch.device, Memory]:
    """Where both models are: on one device, whole or streamed. What trains through the whole model needs it whole."""
    both, where = [job.inventory.checkpoint, job.teacher], local_devices(choose_device(job.device))[0]
    mode = choose_memory(job.memory, both, where, job.dtype, current()) if layerwise else "resident"
    if mode == "stream":
        return where, mode
    remedy = "use --memory stream" if layerwise else "use --device cpu, or a method that streams: layer_local or least_squares"
    return one_device(where, both, job.dtype, f"heal --method {job.method}", remedy), mode


def _teacher(checkpoint: Checkpoint, memory: Memory, device: torch.device, dtype: str) -> LoadedModel:
    return load_model(checkpoint, record_of(checkpoint.config), memory=memory, device=device, dtype=dtype)


def _made_with(job: Healing) -> dict[str, Any]:
    return {
        "format": "expertsmith.healing",
        "method": job.method,
        "options": as_options(job.options),
        "student": job.inventory.checkpoint.fingerprint,
        "teacher": job.teacher.fingerprint,
        "data": job.data.fingerprint,
        "batch_tokens": job.batch_tokens,
        "dtype": job.dtype,
        "requantise": job.requantise,
    }


def _report(
    job: Healing,
    before: Quality,
    after: Quality,
    held: Sequence[torch.Tensor],
    training: Mapping[str, Any],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    was, now = before.to_json(), after.to_json()
    measure_of = "loss" if getattr(job.options, "kl", 1.0) == 0 else "kl"  # what was made small
    accepted = _over_all(now, measure_of) <= _over_all(was, measure_of)
    return {
        "format": "expertsmith.heal",
        "version": 1,
        "measure": measure_of,
        "method": job.method,
        "options": as_options(job.options),
        "student": {"source": source_of(job.inventory.checkpoint), "fingerprint": job.inventory.checkpoint.fingerprint},
        "teacher": {"source": source_of(job.teacher), "fingerprint": job.teacher.fingerprint},
        "data": {
            "fingerprint": job.data.fingerprint,
            "tokens": job.data.tokens,
            "held_out_tokens": sum(int(mask.sum()) for mask in held),
        },
        "held_out": {"before": was, "after": now if accepted else was, **({} if accepted else {"rejected": now})},
        "accepted": accepted,
        "mixed": _mixed(was, now, measure_of) if accepted else "",
        **({"rule": told(rows)} if job.method == "layer_local" else {}),
        **({"training": training} if training else {}),
        "layers": sorted(rows, key=lambda row: row["layer"]),
    }


def _mixed(was: Mapping[str, Any], now: Mapping[str, Any], decides: str) -> str:
    """A sentence on the measure that got worse while the deciding one improved; "" if none did."""
    other, names = ("kl" if decides == "loss" else "loss"), {"loss": "loss", "kl": "KL divergence"}
    values = [_over_all(quality, key) for key in (decides, other) for quality in (was, now)]
    if values[3] <= values[2]:
        return ""
    return (
        f"{names[decides]} decides, and fell from {values[0]:.4f} to {values[1]:.4f} on the held-out tokens; but their {names[other]} rose from "
        f"{values[2]:.4f} to {values[3]:.4f} nats per token. Evaluate the result before you use it"
    )


def _over_all(quality: Mapping[str, Any], key: str) -> float:
    """The mean over all held-out tokens, in nats a token."""
    rows = quality["domains"].values()
    return float(sum(row[key] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows))


def _write(
    job: Healing, target: Path, changed: Collection[str], work: Work, report: Mapping[str, Any] | None, progress: Progress
) -> None:
    source = job.inventory.checkpoint
    texts: dict[str, str] = {}
    if report is not None:
        texts |= plans_in(source.path)
        if "expertsmith" in (card_metadata(source.path).get("tags") or ()):
            text = (source.path / "README.md").read_text(encoding="utf-8")
        else:  # a card of others does not describe the result
            head = front_matter(source, ["expertsmith", "mixture-of-experts", "healed"])
            text = "\n".join(
                [*head, "", f"# {name_of(source)}, healed", "", f"Made by expertsmith from `{source_of(source)}`.", ""]
            )
        texts |= {REPORT: json.dumps(report, indent=1) + "\n", "README.md": healed_card(text, report)}
    write_healed(
        target,
        job.inventory,
        set(changed),
        work.read,
        texts,
        requantise=job.requantise,
        overwrite=job.overwrite,
        progress=progress,
    )


def healed_card(card: str, report: Mapping[str, Any], measured_after: bool = False) -> str:
    """The model card with a section on healing; its measured quality is from before healing, unless `measured_after`."""
    was, now = report["held_out"]["before"]["mean"], report["held_out"]["after"]["mean"]
    tokens = report["data"]["tokens"]
    options = ", ".join(f"{key}={value}" for key, value in report["options"].items())
    names = ", ".join(f"{name} {number:,}" for name, number in tokens.items())
    gradients = any("learning_rate" in row.get("refined", ()) for row in report["layers"])
    what = {
        "least_squares": "the down projections of the routed experts",
        "layer_local": f"{'router rows, gate, up and ' if gradients else 'the '}down projections of the routed experts",
        "router": "the router rows",
        "lora": "weights by merged low-rank adapters",
    }[report["method"]]
    card = card.replace(
        "are byte for byte those of the base model.", "were byte for byte those of the base model before it was healed (below)."
    )
    card = card.replace("are byte for byte its own.", "were byte for byte its own before it was healed (below).")
    if not measured_after:
        card = without_results(card).replace("- **Measured quality**: ", "- **Measured quality** (before healing): ")
    again = report.get("requantised")
    cost = ""
    if again is not None:
        cost = (
            f"- **Quantised again, in the source's own format**: the changed weights differ from their float values by {again['weight_error']:.2%}; loss on the "
            f"held-out part {again['quality']['mean']['loss']:.4f} (float: {now['loss']:.4f})"
            + ("" if again["accepted"] else "; worse than before, so no weight was changed")
            + "\n"
        )
    done = "" if report["accepted"] else " Nothing was better on the held-out tokens, so no weight was changed."
    done += f" Mixed: {report['mixed']}." if report["mixed"] else ""
    return (
        card.rstrip("\n")
        + "\n\n## Healed\n\n"
        + f"`expertsmith heal --method {report['method']}` ({options}) towards `{report['teacher']['source']}` changed {what}; all other tensors are "
        f"byte for byte as before.{done}\n\n"
        f"- **Calibration**: {sum(tokens.values()):,} tokens ({names}), of which {report['data']['held_out_tokens']:,} were held out\n"
        f"- **Loss on the held-out part**: {was['loss']:.4f} before, {now['loss']:.4f} after, {was['reference_loss']:.4f} the original (nats a token, "
        "mean over domains)\n"
        f"- **KL divergence from the original there**: {was['kl']:.4f} before, {now['kl']:.4f} after\n"
        + "".join(f"- **Trained**: {sentence}\n" for sentence in report.get("rule", ()))
        + f"{cost}"
        "- **Layer by layer**: `expertsmith/heal.json`\n"
    )
