"""dense model → splits → stock checkpoint → report: the stages of `expertsmith convert`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from expertsmith.arch import families
from expertsmith.checkpoint import Checkpoint, open_checkpoint
from expertsmith.checkpoint.origin import front_matter, name_of, source_of
from expertsmith.checkpoint.work import work_beside
from expertsmith.checkpoint.writer import left_behind
from expertsmith.conversion import export, groups, routers, tomoe
from expertsmith.conversion.attention import Heads, attentions_of, pruned_heads
from expertsmith.conversion.passes import decide_layers
from expertsmith.conversion.settings import WAYS, Asked, step_of
from expertsmith.conversion.split import Split, chosen, mlps_of, sparse_forward
from expertsmith.conversion.start import Start, start_layer
from expertsmith.conversion.training import Recipe, outcome, padded, train
from expertsmith.engine import Batch, LoadedModel
from expertsmith.engine.layout import experts_of, routing_of
from expertsmith.engine.loading import load_model
from expertsmith.errors import UserError, install_line
from expertsmith.surgery.card import quality_line
from expertsmith.views.progress import Progress

MEASURED = 8  # every 8th calibration sequence is held out of the fits and used to measure
START_TOKENS = 12_288  # for ToMoE's start
BRIEF = 1024  # tokens on which the written checkpoint is compared with the masked dense model


@dataclass
class Converted:
    """The decisions and measures of a conversion, layer by layer. `heads`: the kept dimensions of attention, if it was pruned."""

    splits: list[Split]
    logit_std: list[float]
    layers: list[dict[str, Any]] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)


def training_free(
    model: LoadedModel, asked: Asked, batches: Sequence[Batch], seed: int, markers: int | None, progress: Progress
) -> Converted:
    """Groups and routers of every layer, each from the outputs of the converted layers before it."""
    made = Converted([], [])

    def decide(layer: int, mlp: Any, x: torch.Tensor, sequences: torch.Tensor) -> Split:
        held = sequences % MEASURED == MEASURED - 1
        if not bool(held.any()) or bool(held.all()):
            held = torch.arange(len(x), device=x.device) % MEASURED == MEASURED - 1
        seen = groups.Layer(mlp, x[~held], sequences[~held], asked.experts, asked.width, seed + layer, markers)
        experts, shared, representatives = groups.GROUPINGS[asked.way.name](seen)
        rows = routers.make_router(asked.router, mlp, seen.x, experts, seen.seed)
        split = Split(experts, shared, rows, asked.top_k)
        measured = routers.measure(mlp, x[held], split, seed, representatives)
        made.splits.append(split)
        made.logit_std.append(measured["logit_std"])
        made.layers.append({"layer": layer, **measured})
        return split

    decide_layers(model, batches, decide, progress, asked.way.title)
    return made


def learned(
    model: LoadedModel,
    asked: Asked,
    recipe: Recipe,
    sequences: Sequence[Sequence[int]],
    watch: Sequence[Sequence[int]],
    folder: Path,
    start: bool,
    fingerprint: str,
    accelerator: Any,
    progress: Progress,
    resume: bool,
) -> tuple[list[Split], list[Heads]]:
    """Train ToMoE's masks and routers."""
    config = model.config
    width = attentions_of(model.layers)[0].head_dim
    net = tomoe.MaskNet(
        len(model.layers), asked.experts, config.hidden_size, config.intermediate_size, recipe.seed, recipe.attention, width
    )
    net.to(model.device)
    if start and not (resume and (folder / "state.pt").exists()):
        net.start_from(*start_of(model, asked, sequences, recipe.seed, progress))
    align = step_of(asked.active, config.intermediate_size)
    train(
        model.module,
        model.layers,
        net,
        recipe,
        sequences,
        [padded(watch)] if watch else [],
        folder,
        align=align,
        fingerprint=fingerprint,
        accelerator=accelerator,
        progress=progress,
        resume=resume,
    )
    return outcome(net, recipe, align)


def start_of(
    model: LoadedModel, asked: Asked, sequences: Sequence[Sequence[int]], seed: int, progress: Progress
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Mask logits and router rows of every layer, before any training."""
    made: list[Start] = []
    taken = list(sequences[: max(1, START_TOKENS // max(map(len, sequences)))])

    def decide(layer: int, mlp: Any, x: torch.Tensor, _: torch.Tensor) -> None:
        made.append(start_layer(mlp, x, asked.experts, asked.width, seed + layer))

    decide_layers(model, as_batches(taken), decide, progress, "start")
    return [entry.logits for entry in made], [entry.router for entry in made]


def as_batches(sequences: Sequence[Sequence[int]]) -> list[Batch]:
    """One batch per sequence."""
    return [Batch(*padded([row]), "default", [i]) for i, row in enumerate(sequences)]


def measured(
    model: LoadedModel, splits: Sequence[Split], heads: Sequence[Heads], batches: Sequence[Batch], seed: int, progress: Progress
) -> Converted:
    """Measure existing splits (captured energy, shares, spread of logits), each on the outputs of the converted layers before it."""
    made = Converted(list(splits), [], heads=list(heads))

    def decide(layer: int, mlp: Any, x: torch.Tensor, _: torch.Tensor) -> Split:
        found = routers.measure(mlp, x, splits[layer], seed)
        made.logit_std.append(found["logit_std"])
        made.layers.append({"layer": layer, **found})
        return splits[layer]

    with pruned_heads(model.layers, heads):
        decide_layers(model, batches, decide, progress, "measure")
    return made


def overlaps(converted: Converted, neurons: int) -> None:
    """Add to every layer's row: mean overlap of its experts (Jaccard), share of neurons in some expert or the shared part, widths."""
    for row, split in zip(converted.layers, converted.splits, strict=True):
        members = split.members(neurons).any(0)
        members[split.shared] = True
        row["overlap"] = tomoe.mean_jaccard(split.experts)
        row["coverage"] = float(members.float().mean())
        row["widths"] = [len(ids) for ids in split.experts]
        row["shared_width"] = len(split.shared)


def warnings_of(converted: Converted, asked: Asked) -> list[str]:
    """Notes for the user about the result."""
    notes, even = [], 1 / asked.experts
    if asked.experts > 1 and asked.way.learned:
        overlap = sum(row["overlap"] for row in converted.layers) / len(converted.layers)
        if overlap > 0.9:
            notes.append(
                f"the experts share {100 * overlap:.0f} % of their neurons, so the router has almost no effect: this is a static prune"
            )
    odd = [
        row["layer"]
        for row in converted.layers
        if asked.experts > 1 and not all(even / 4 <= s <= 4 * even for s in row["share"])
    ]
    if odd:
        notes.append(
            f"in {len(odd)} of {len(converted.layers)} layers (first: {odd[0]}) an expert gets less than a quarter or more than four times an even share of the tokens"
        )
    return notes


def check_growth(numbers: Mapping[str, Any], max_growth: float, remedy: str) -> None:
    """Refuse a checkpoint that is more than `max_growth` times the dense one.

    Raises:
        UserError: with both sizes.
    """
    if numbers["total_ratio"] > max_growth:
        raise UserError(
            f"the checkpoint would have {numbers['total'] / 1e6:.1f} M parameters, {numbers['total_ratio']:.2f} times the dense model's "
            f"{numbers['dense']['total'] / 1e6:.1f} M, because neurons in several experts are written several times",
            f"{remedy}, or allow it with --max-growth {numbers['total_ratio'] + 0.05:.1f}",
        )


@torch.no_grad()
def export_difference(
    model: LoadedModel, splits: Sequence[Split], heads: Sequence[Heads], out: Path, batches: Sequence[Batch]
) -> dict[str, float]:
    """Compare the written checkpoint with the dense model with the same neurons masked, in float32. transformers loads the checkpoint
    without running its code.

    The reference runs the experts that the written model chose, so the difference is due to arithmetic alone; `same_choice` is the share of
    (token, layer) pairs for which the split's own router chooses the same experts on the same inputs.
    """
    written = open_checkpoint(out)
    record = families()[written.config["model_type"]]
    other = load_model(written, record, dtype="float32", device=model.device)
    dense = model if model.dtype == torch.float32 else load_model(model.checkpoint, None, dtype="float32", device=model.device)
    picked: dict[int, torch.Tensor] = {}
    agree = places = same = count = 0
    largest = scale = 0.0

    def watch(layer: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        selected = routing_of(args, kwargs)[0]
        empty = torch.zeros(len(selected), len(splits[layer].experts), dtype=torch.bool, device=selected.device)
        picked[layer] = empty.scatter_(-1, selected, True)

    def replay(layer: int, mlp: Any, x: torch.Tensor) -> torch.Tensor:
        nonlocal agree, places
        theirs = picked[layer].reshape(*x.shape[:-1], -1)
        own = chosen(splits[layer].router.to(x.device), x, splits[layer].top_k)
        agree, places = agree + int((own == theirs).all(-1).sum()), places + own[..., 0].numel()
        return sparse_forward(mlp, splits[layer], x, theirs)

    mlps = mlps_of(dense.layers)
    hooks = [
        experts_of(layer, record).register_forward_pre_hook(partial(watch, i), with_kwargs=True)
        for i, layer in enumerate(other.layers)
    ]
    try:
        for i, mlp in enumerate(mlps):
            mlp.forward = partial(replay, i, mlp)  # type: ignore[method-assign]
        for batch in batches:
            his = other.module(**batch.inputs(other.device), use_cache=False).logits[batch.mask]
            with pruned_heads(dense.layers, heads):
                mine = dense.module(**batch.inputs(dense.device), use_cache=False).logits[batch.mask]
            largest, scale = max(largest, float((mine - his).abs().max())), max(scale, float(mine.abs().max()))
            same, count = same + int((mine.argmax(-1) == his.argmax(-1)).sum()), count + len(mine)
    finally:
        for mlp in mlps:
            mlp.__dict__.pop("forward", None)
        for hook in hooks:
            hook.remove()
    return {
        "logits_difference": largest,
        "logits_scale": scale,
        "relative": largest / max(scale, 1e-30),
        "same_token": same / max(1, count),
        "same_choice": agree / max(1, places),
        "tokens": count,
    }


@torch.no_grad()
def forward_times(dense: LoadedModel, out: Path, tokens: int, rounds: int = 3) -> dict[str, Any]:
    """Time one forward of the same sequence, dense and written in turns: median seconds and their ratio."""
    from statistics import median

    from expertsmith.evaluation.speed import in_turns

    written = open_checkpoint(out)
    other = load_model(
        written, families()[written.config["model_type"]], dtype=str(dense.dtype).removeprefix("torch."), device=dense.device
    )
    vocabulary = dense.config.vocab_size
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(dense.device)
    bodies = {"dense": dense.module.model, "converted": other.module.model}
    runs = {name: (lambda body=body: body(input_ids=ids, use_cache=False)) for name, body in bodies.items()}
    seconds = {name: median(values) for name, values in in_turns(runs, rounds).items()}  # type: ignore[arg-type]
    return {
        "tokens": tokens,
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "ratio": seconds["converted"] / seconds["dense"],
    }


def report(
    asked: Asked,
    source: Checkpoint,
    converted: Converted,
    numbers: Mapping[str, Any],
    method: Mapping[str, Any],
    calibration: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `expertsmith/conversion.json`."""
    return {
        "format": "expertsmith.conversion",
        "version": 1,
        "method": {"name": asked.way.name, "paper": asked.way.paper, "router": asked.router, **method},
        "source": {"model_type": asked.family.model_type, "fingerprint": source.fingerprint},
        "target": asked.target.model_type,
        "calibration": dict(calibration),
        "sizes": dict(numbers),
        "layers": converted.layers,
        "notes": warnings_of(converted, asked) + left_behind(source),
    }


def texts_of(result: Mapping[str, Any], splits: Sequence[Split], card: str) -> dict[str, str]:
    """The files of a converted checkpoint other than its weights."""
    return {
        "README.md": card,
        "expertsmith/conversion.json": json.dumps(result, indent=1) + "\n",
        "expertsmith/splits.json": export.record_of(splits) + "\n",
    }


def card_of(result: Mapping[str, Any], source: Checkpoint, quality: Mapping[str, Any] | None = None) -> str:
    """The model card."""
    line = quality_line(quality, "dense") if quality else "not measured yet; see `expertsmith evaluate --reference`"
    title = f"{name_of(source)} as a Mixture of Experts"
    sizes, way = result["sizes"], WAYS[result["method"]["name"]]
    lines = [
        *front_matter(source, ["expertsmith", "mixture-of-experts", "converted"], quality, title),
        "",
        f"# {title}",
        "",
        f"Made by expertsmith from `{source_of(source)}` ({result['source']['model_type']}, dense) with {way.title} ({way.paper}). Attention, norms and embeddings "
        "are byte for byte the dense model's; MLP weights are its own rows and columns, with down projections multiplied by a factor if several experts run.",
        "",
        "| | dense | this |",
        "|---|---|---|",
        f"| total parameters | {sizes['dense']['total']:,} | {sizes['total']:,} |",
        f"| parameters per token | {sizes['dense']['total']:,} | {sizes['active']['total']:,} |",
        f"| routed experts, top_k | – | {sizes['experts']}, {sizes['top_k']} |",
        f"| neurons: routed expert, always on | {sizes['neurons']} | {sizes['expert_width']}, {sizes['shared_width']} |",
        "",
        f"- **Share of the MLP per token**: {sizes['mlp_ratio_useful']:.3f} of its neurons",
        f"- **Measured quality**: {line}",
        *(f"- **Note**: {note}" for note in result["notes"]),
        "",
    ]
    return "\n".join(lines)


def interleaved(sequences: Mapping[str, Sequence[Sequence[int]]]) -> list[Sequence[int]]:
    """The sequences of all domains, one of each in turn, so that every section has all domains."""
    longest = max(map(len, sequences.values()))
    return [rows[i] for i in range(longest) for rows in sequences.values() if i < len(rows)]


def from_gguf(source: str | Path, file: str, target: Path, progress: Progress) -> Path:
    """Dequantise a GGUF file, once, into a float32 directory in Hugging Face layout; returns the directory.

    Raises:
        UserError: no such file, the gguf package is missing, or transformers cannot load a model from the file.
    """
    folder = Path(source)
    if not (folder / file).is_file():
        raise UserError(f"there is no GGUF file {folder / file}", "give the folder as DENSE and the file's name as --gguf-file")
    origin = {"file": file, "bytes": (folder / file).stat().st_size, "ends": _ends(folder / file)}
    note = target / ".gguf.json"
    if target.exists():
        if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == origin:
            return target
        raise UserError(f"{target} exists and is not the dequantised {file}", "choose another output, or delete that folder")
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("reading GGUF files needs the gguf package", 'pip install "expertsmith[gguf]"') from None
    import transformers

    from expertsmith.engine.stock import quietly

    progress.note(f"dequantising {file} once, into {target}")
    try:
        with work_beside(target, "writing", scratch=True) as part, quietly():
            settings = transformers.GgufConfig(dequantize=True)
            module, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file, dtype=torch.float32, quantization_config=settings, output_loading_info=True
            )
            if info["missing_keys"]:
                raise UserError(f"{file} lacks the tensors of {sorted(info['missing_keys'])[0]}", "download it again")
            module.save_pretrained(part)
            transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(part)
            (part / note.name).write_text(json.dumps(origin), encoding="utf-8")
            part.rename(target)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything, from header parsing to tokenizer back ends
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"transformers cannot make a model of {folder / file}: {first}",
            install_line(error) or "use a complete GGUF file of a dense Llama, Mistral or Qwen model",
        ) from None
    return target


def _ends(file: Path) -> str:
    """sha256 of the first and the last MiB of a file."""
    with open(file, "rb") as stream:
        digest = hashlib.sha256(stream.read(2**20))
        stream.seek(max(0, file.stat().st_size - 2**20))
        digest.update(stream.read(2**20))
    return digest.hexdigest()
