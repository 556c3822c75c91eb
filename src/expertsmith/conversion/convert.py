"""`expertsmith convert`: one request from the dense model to the written, measured checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from expertsmith.arch import families
from expertsmith.arch.dense import TARGETS
from expertsmith.calibration.data import TokenData
from expertsmith.calibration.opening import beside, token_data, window_of
from expertsmith.checkpoint import Checkpoint, open_checkpoint
from expertsmith.checkpoint.work import work_beside
from expertsmith.checkpoint.writer import prepare_target
from expertsmith.conversion import export, flow
from expertsmith.conversion.settings import WAYS, Asked, Request, ask, block_parameters
from expertsmith.conversion.split import Split
from expertsmith.conversion.training import Recipe
from expertsmith.engine import Batch, LoadedModel
from expertsmith.engine.devices import choose_device, one_device
from expertsmith.engine.loading import load_model
from expertsmith.errors import UserError
from expertsmith.evaluation.quality import measure as measure_quality
from expertsmith.views.progress import Progress, timed

FREE_SAMPLES = 32  # sequences per domain for training-free methods
SEQUENCE = 512  # tokens, unless the model's window is shorter
WATCHED = 4  # sequences on which ToMoE's training is measured
WITHOUT_DATA = 2048  # random tokens, for the spread of random routers' logits


def run(request: Request, progress: Progress) -> dict[str, Any]:
    """Convert a dense model; returns the content of `expertsmith/conversion.json`, with `out`, `quality`, `speed`, `export` and `seconds`.

    Raises:
        UserError: see `settings.ask`, `export.check_source`, `flow.check_growth`, `training.train`; no data for a method that needs it.
    """
    seconds: dict[str, float] = {}
    prepare_target(request.out, None, request.overwrite)
    place: str | Path = request.dense
    if request.gguf_file is not None:
        with timed(seconds, "gguf"):
            place = flow.from_gguf(request.dense, request.gguf_file, beside(request.out, "dense"), progress)
    source = open_checkpoint(place)
    asked = ask(
        source.config,
        str(request.dense),
        request.method,
        experts=request.experts,
        top_k=request.top_k,
        shared=request.shared,
        active=request.active,
        active_of=request.active_of,
        router=request.router,
        target=request.target,
        attention=request.attention,
        core=request.export == "core",
    )
    prepare_target(request.out, source.path, request.overwrite)
    export.check_source(source, int(source.config["num_hidden_layers"]))
    _check_before(request, asked, source)
    if asked.way.needs_data and not request.data:
        raise UserError(f"method {request.method} needs calibration text", "pass --data FILE (repeatable)")
    tokens = _tokens(request, source, progress) if request.data else None
    remedy = "use --device cpu, or a GPU with more memory"
    where = one_device(choose_device(request.device), [source], request.dtype, "convert", remedy)
    model = load_model(source, None, device=where, dtype=request.dtype)
    with timed(seconds, "train" if asked.way.learned else "convert"):
        converted, method = _decide(request, asked, source, model, tokens, progress)
    if dist.is_initialized() and dist.get_rank() > 0:
        return {}  # the training is done; the first rank writes
    flow.overlaps(converted, int(source.config["intermediate_size"]))
    target = asked.target
    numbers = export.sizes(source, converted.splits, target, converted.heads)
    progress.note(_size_line(source, converted, asked, numbers))
    flow.check_growth(
        numbers, request.max_growth, "use fewer --experts" + ("" if request.export == "core" else ", or --export core")
    )
    calibration = {} if tokens is None else {"fingerprint": tokens.fingerprint, "tokens": tokens.tokens}
    result = flow.report(asked, source, converted, numbers, method, calibration)
    with timed(seconds, "write"), progress.task("write", numbers["total"] * 4, "B") as advance:
        card = flow.card_of(result, source)
        texts = flow.texts_of(result, converted.splits, card)
        export.write(
            request.out,
            source,
            target,
            converted.splits,
            converted.logit_std,
            texts,
            heads=converted.heads,
            overwrite=request.overwrite,
            progress=advance,
        )
    with timed(seconds, "check"):
        result["export"] = flow.export_difference(model, converted.splits, converted.heads, request.out, _brief(tokens, model))
    if request.measure:
        with timed(seconds, "measure"):
            result["speed"] = flow.forward_times(model, request.out, min(_length(request, source), SEQUENCE))
            result["quality"] = _quality(request, source, model, progress)
    result["seconds"] = seconds
    card = flow.card_of(result, source, result.get("quality"))
    for name, text in flow.texts_of(result, converted.splits, card).items():
        (request.out / name).write_text(text, encoding="utf-8")
    return {"out": str(request.out), **result}


def _check_before(request: Request, asked: Asked, source: Checkpoint) -> None:
    """Refuse wrong training options, and an output that would be too large, before hours of training."""
    if not asked.way.learned:
        return
    if request.steps < 0 or request.batch < 1:
        raise UserError(
            f"--steps is {request.steps} and --batch {request.batch}", "give 0 steps or more, and 1 sequence or more"
        )
    if request.export == "plain" and request.widths == "equal":
        width = torch.arange(asked.width)
        one = Split([width] * asked.experts, torch.zeros(0, dtype=torch.long), torch.zeros(asked.experts, 1), 1)
        numbers = export.sizes(source, [one] * int(source.config["num_hidden_layers"]), asked.target)
        flow.check_growth(numbers, request.max_growth, "use --experts 2 to 4, or --export core")


def _length(request: Request, source: Checkpoint) -> int:
    return request.seq_len or min(SEQUENCE, window_of(source.config))


def _tokens(request: Request, source: Checkpoint, progress: Progress) -> TokenData:
    samples = request.samples
    if samples is None:
        samples = FREE_SAMPLES
        if WAYS[request.method].learned:
            samples = max(FREE_SAMPLES, -(-(request.steps * request.batch + WATCHED) // len(request.data)))
    return token_data(
        source.path,
        source.config,
        request.data,
        progress,
        samples=samples,
        seq_len=_length(request, source),
        columns=request.columns,
        seed=request.seed,
        overlong="truncate",
        pack=request.pack,
    )


def _decide(
    request: Request, asked: Asked, source: Checkpoint, model: LoadedModel, tokens: TokenData | None, progress: Progress
) -> tuple[flow.Converted, dict[str, Any]]:
    """(splits of every layer with their measures, the method's options for the report)."""
    options: dict[str, Any] = {"experts": asked.experts, "top_k": asked.top_k, "active": asked.active, "seed": request.seed}
    if not asked.way.learned:
        batches = tokens.batches(_length(request, source)) if tokens else _random_batches(model)
        made = flow.training_free(model, asked, batches, request.seed, request.markers, progress)
        return made, options
    assert tokens is not None
    sequences = [row for row in flow.interleaved(tokens.sequences) if len(row) > 1]
    watch, rest = sequences[:WATCHED], sequences[WATCHED:]
    if not rest:
        raise UserError(
            f"the data has {len(sequences)} sequences; training needs more than {WATCHED}",
            "give more text, or a smaller --seq-len",
        )
    grouped = request.start == "grouped"
    attention, mlp = block_parameters(source.config)
    share = 0.0 if request.attention == "none" else attention / (attention + mlp)
    recipe = Recipe(
        ratio=asked.active if request.attention == "none" else request.active or 0.5,
        steps=request.steps,
        experts=asked.experts,
        batch=request.batch,
        seed=request.seed,
        lr=request.lr,
        router_lr=request.router_lr,
        equal=request.widths == "equal",
        first_ratio=share + (1 - share) * asked.active if grouped else 1.0,
        attention=request.attention,
        attention_share=share,
        warmup=min(20, max(1, request.steps // 10)),
    )
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=model.device.type == "cpu", mixed_precision="no")
    identity = hashlib.sha256(f"{source.fingerprint} {tokens.fingerprint} {request.start} {model.dtype}".encode()).hexdigest()
    with work_beside(request.out, "training", progress.note, keep=True) as folder:  # another --export can resume it
        splits, heads = flow.learned(
            model, asked, recipe, rest, watch, folder, grouped, identity, accelerator, progress, request.resume
        )
    if request.export == "core":
        splits = [split.core() for split in splits]
    made = flow.measured(model, splits, heads, flow.as_batches(watch), request.seed, progress)
    return made, options | {
        "start": request.start,
        "export": request.export,
        "attention": request.attention,
        "recipe": asdict(recipe),
        "training_log": _log(folder),
    }


def _log(folder: Path) -> list[dict[str, Any]]:
    """The rows of the training log with a measurement of the noise-free model."""
    rows = [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "kl_written" in row]


def _random_batches(model: LoadedModel) -> list[Batch]:
    length = min(256, int(model.config.max_position_embeddings))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (WITHOUT_DATA // length, length), generator=generator)
    return [Batch(row[None], torch.ones(1, length, dtype=torch.bool), "default", [i]) for i, row in enumerate(ids)]


def _brief(tokens: TokenData | None, model: LoadedModel) -> list[Batch]:
    batches = _random_batches(model) if tokens is None else tokens.batches(1)
    kept: list[Batch] = []
    for batch in batches:
        if sum(entry.tokens for entry in kept) < flow.BRIEF:
            kept.append(batch)
    return kept


def _size_line(source: Checkpoint, converted: flow.Converted, asked: Asked, numbers: dict[str, Any]) -> str:
    """The size of the output; for overlapping experts, of both ways to write them."""

    def one(name: str, sizes: dict[str, Any]) -> str:
        return (
            f"{name} {sizes['total'] / 1e6:.1f} M parameters ({sizes['total_ratio']:.2f} × dense), {sizes['active']['total'] / 1e6:.1f} M active, "
            f"{sizes['active']['padding'] / 1e6:.2f} M of it padding"
        )

    if not asked.way.learned:
        return one("to be written:", numbers)
    plain, core = (TARGETS[asked.family.targets[i]] for i in (0, -1))
    parts = [one("plain", export.sizes(source, [s.whole() for s in converted.splits], plain, converted.heads))]
    if core.shared_key:
        parts.append(one("core", export.sizes(source, [s.core() for s in converted.splits], core, converted.heads)))
    return "; ".join(parts)


def _quality(request: Request, source: Checkpoint, model: LoadedModel, progress: Progress) -> dict[str, Any] | None:
    texts = list(request.eval_data) or list(request.data)
    if not texts:
        return None
    written = open_checkpoint(request.out)
    other = load_model(written, families()[written.config["model_type"]], device=model.device, dtype=request.dtype)
    tokens = token_data(
        source.path,
        source.config,
        texts,
        progress,
        samples=16,
        seq_len=_length(request, source),
        columns=request.columns,
        seed=request.seed,
        pack=True,
        overlong="truncate",
        overlap=1,
    )
    quality = measure_quality(other, tokens.batches(_length(request, source) + 1), model, progress).to_json()
    return {**quality, "held_out": bool(request.eval_data)}
