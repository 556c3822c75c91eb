"""The verbs of expertsmith as functions. Models are paths or hub ids; statistics and plans are paths or loaded objects.

    calibrate → statistics → plan → apply → checkpoint → verify, evaluate

Importing this module is quick: torch and transformers are imported by the functions that run a model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.inventory import Inventory, take_inventory
from expertsmith.plan import CalibrationData, LayerPlan, Method, Plan, Source, Summary, load_plan
from expertsmith.progress import Progress, Silent
from expertsmith.selection import Rules, keep_count, over_layers, parse_keep, uniform

if TYPE_CHECKING:
    from expertsmith.calibration.stats import Statistics
    from expertsmith.evaluation.quality import Quality
    from expertsmith.lint import Finding
    from expertsmith.surgery.verify import Verdict

Keep = float | int | str
RATIOS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
FEW_TOKENS = 30  # below this many tokens a mean over an expert's tokens is noise (frontier card, section 1)


def inspect(model: str | Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """What a checkpoint is and what each keep ratio would leave, from its config and headers only (no weight is read).

    Raises:
        UserError: not a checkpoint of a supported MoE family, or a damaged one.
    """
    inventory = take_inventory(open_checkpoint(model, headers_only=True, allow_pickle=allow_pickle))
    record, rules = inventory.architecture, inventory.rules
    parameters, nbytes = inventory.size()
    ratios: list[dict[str, float]] = []
    for ratio in RATIOS:
        with suppress(UserError):  # a ratio below what the router needs is left out
            count = keep_count(ratio, rules)
            after = inventory.size(dict.fromkeys(inventory.layers, count))
            if count < inventory.num_experts and not any(row["experts"] == count for row in ratios):
                ratios.append(
                    {
                        "keep": ratio,
                        "experts": count,
                        "parameters": after[0],
                        "bytes": after[1],
                        "bytes_ratio": after[1] / nbytes,
                    }
                )
    groups = None if rules.groups == 1 else {"groups": rules.groups, "top_groups": rules.top_groups}
    return {
        "model": str(model),
        "family": record.title,
        "model_type": record.model_type,
        "status": record.status,
        "notes": record.notes,
        "layers": inventory.num_layers,
        "moe_layers": inventory.layers,
        "num_experts": inventory.num_experts,
        "top_k": inventory.top_k,
        "shared_experts": _shared(inventory),
        "router": {"score": record.score, "selection_bias": bool(record.selection_bias), "expert_groups": groups},
        "least_experts": rules.least,
        "parameters": {
            "total": parameters,
            "active": inventory.active_parameters,
            "routed_experts": inventory.routed_parameters,
        },
        "bytes": nbytes,
        "tensors": len(inventory.checkpoint.tensors),
        "keep_ratios": ratios,
    }


def _shared(inventory: Inventory) -> int | None:
    """Shared experts: their number where the config counts them, else 1 where the family has one."""
    from expertsmith.arch import config_get

    record = inventory.architecture
    if record.shared_key:
        value = config_get(inventory.config, record.shared_key)
        return int(value) if isinstance(value, int) else 0
    return 1 if record.shared else 0


def lint(model: str | Path, *, engine: str | None = None, tensor_parallel: int = 1, expert_parallel: int = 1) -> list[Finding]:
    """Whether serving engines will take this checkpoint's expert count, router and groups; from config and headers only."""
    from expertsmith.lint import lint as find

    inventory = take_inventory(open_checkpoint(model, headers_only=True))
    return find(inventory, engine, tensor_parallel=tensor_parallel, expert_parallel=expert_parallel)


def calibrate(
    model: str | Path,
    data: Sequence[str],
    out: str | Path,
    *,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 42,
    pack: bool | None = None,
    overlong: Literal["refuse", "truncate", "drop"] = "refuse",
    batch_tokens: int = 8192,
    output_sum: bool = False,
    sample_tokens: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    memory: str = "auto",
    resume: bool = True,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """One pass over the data → a folder with the statistics of every criterion, by layer and domain.

    Args:
        data: `[DOMAIN=]SOURCE[:N]` each.
        samples: sequences a domain, drawn with `seed`.
        seq_len: tokens a sequence at most; None: 2048 or the model's window, whichever is less.
        pack: join texts into full sequences; None: texts yes, demonstrations (messages, prompt + response) no.
        output_sum: also sum the raw outputs of every expert.
        sample_tokens: also keep the block's inputs and outputs of this many tokens a domain.
        memory: "resident", "stream" (one decoder layer at a time) or "auto".
        resume: complete a folder that an interrupted run left; otherwise start again.
    """
    from expertsmith.calibration.observers import Extras
    from expertsmith.calibration.runner import collect

    progress = progress or Silent()
    inventory = take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    tokens = _tokens(
        inventory.checkpoint.path,
        inventory.checkpoint.config,
        data,
        progress,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        pack=pack,
        overlong=overlong,
        batch_tokens=batch_tokens,
    )
    loaded = _load(inventory, memory, device, dtype, progress)
    extras = Extras(output_sum, sample_tokens, seed)
    return collect(loaded, tokens, Path(out), batch_tokens=batch_tokens, extras=extras, resume=resume, progress=progress)


def plan(
    model: str | Path | Inventory,
    method: str,
    keep: Keep,
    *,
    stats: str | Path | Statistics | None = None,
    data: Sequence[str] = (),
    domains: Sequence[str] = (),
    budget: str = "uniform",
    options: Mapping[str, Any] | None = None,
    router_groups: Literal["keep", "flatten"] = "keep",
    out: str | Path | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    **calibration: Any,
) -> Plan:
    """Choose which experts stay.

    Args:
        keep: a ratio (0.5, "50%") or a count (4, "4").
        stats: statistics of `calibrate`; without them `data` is calibrated first (into `<out>.stats`).
        domains: use only these domains of the statistics.
        budget: "uniform" (every layer alike) or "global" (one ranking over all layers).
        options: the method's own options, see `expertsmith methods`.
        router_groups: "keep" drops the same number from every expert_group; "flatten" gives up the groups (n_group = 1).
        calibration: options of `calibrate`, used with `data`.

    Raises:
        UserError: unknown method or option, a keep that the router cannot work with, statistics of another model.
    """
    from expertsmith import methods as registered
    from expertsmith.calibration.stats import Statistics, load_statistics

    progress = progress or Silent()
    chosen = registered.find(method)
    values = chosen.parse_options(options or {})
    share = parse_keep(keep)
    inventory = model if isinstance(model, Inventory) else take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    rules = inventory.rules if router_groups == "keep" else Rules(inventory.num_experts, inventory.top_k)
    if budget not in ("uniform", "global"):
        raise UserError(f"budget is {budget!r}", "choose uniform or global")
    keep_count(share, rules, inventory.checkpoint.source)  # refuse before anything is computed
    statistics = None
    if not chosen.data_free:
        if stats is None:
            if not data:
                raise UserError(
                    f"method {method} needs calibration", "pass --stats STATS (made by `expertsmith calibrate`) or --data FILE"
                )
            stats = calibrate(
                inventory.checkpoint.source,
                data,
                _beside(out or "plan.json", "stats"),
                progress=progress,
                allow_pickle=allow_pickle,
                **calibration,
            )
        statistics = stats if isinstance(stats, Statistics) else load_statistics(stats)
        statistics = statistics.select(domains)
        if statistics.header["model"]["fingerprint"] != inventory.checkpoint.fingerprint:
            raise UserError(f"the statistics are of another model than {inventory.checkpoint.source}", "calibrate this one")
        if list(statistics.layers) != inventory.layers:
            raise UserError("the statistics do not cover the same layers as the checkpoint", "calibrate again")
    saliency = _saliency(chosen, values, inventory, statistics, progress)
    if budget == "uniform":
        kept = uniform(saliency, share, rules, chosen.ties)
    else:
        kept = over_layers(saliency, share, rules, chosen.ties)
    layers = []
    for layer in inventory.layers:
        why = {"selections": statistics.layers[layer].total("selections").tolist()} if statistics else None
        layers.append(
            LayerPlan(layer=layer, num_experts=inventory.num_experts, keep=kept[layer], saliency=list(saliency[layer]), why=why)
        )
    after = inventory.size({layer: len(ids) for layer, ids in kept.items()})
    before = inventory.size()
    used = {"budget": budget, "keep": share, **values, **({"domains": list(domains)} if domains else {})}
    made = Plan(
        method=Method(name=method, options=used),
        model=Source(model_type=inventory.architecture.model_type, fingerprint=inventory.checkpoint.fingerprint),
        calibration=CalibrationData(fingerprint=statistics.header["data"]["fingerprint"], tokens=statistics.tokens)
        if statistics
        else None,
        router_groups=router_groups,
        layers=layers,
        summary=Summary(
            experts=(inventory.num_experts * len(layers), sum(len(ids) for ids in kept.values())),
            parameters=(before[0], after[0]),
            bytes=(before[1], after[1]),
        ),
    )
    _warn(made, chosen.averages, progress)
    if out is not None:
        made.save(out)
    return made


def _saliency(
    chosen: Any, values: Mapping[str, Any], inventory: Inventory, statistics: Statistics | None, progress: Progress
) -> dict[int, list[float]]:
    from expertsmith.methods.base import Facts
    from expertsmith.weights import expert_weights

    lengths = statistics.sequence_lengths if statistics else {}
    saliency = {}
    with progress.task("score", len(inventory.layers), "layers") as advance:
        for layer in inventory.layers:
            facts = Facts(layer, inventory.num_experts, lengths)
            if chosen.reads == "weights":
                scores = chosen.saliency(expert_weights(inventory, layer), facts, **values)
            elif chosen.reads == "nothing":
                scores = chosen.saliency(facts, **values)
            else:
                assert statistics is not None
                scores = chosen.saliency(statistics.layers[layer], facts, **values)
            saliency[layer] = [float(score) for score in scores]
            bad = next((e for e, score in enumerate(saliency[layer]) if not math.isfinite(score)), None)
            if bad is not None:
                raise UserError(
                    f"method {chosen.name} gives decoder layer {layer}'s expert {bad} the saliency {saliency[layer][bad]}",
                    "activations overflowed while calibrating? calibrate with --dtype float32",
                )
            advance(1)
    return saliency


def _warn(made: Plan, averages: bool, progress: Progress) -> None:
    """Say where the calibration was too small for what the plan keeps."""
    unreached = [(entry.layer, e) for entry in made.layers if entry.why for e in entry.keep if entry.why["selections"][e] == 0]
    if unreached:
        layers = sorted({layer for layer, _ in unreached})
        progress.note(
            f"{len(unreached)} kept experts (layers {', '.join(map(str, layers))}) were reached by no calibration token: the calibration is too small for this ratio"
        )
    few = [e for entry in made.layers if entry.why for e in entry.keep if 0 < entry.why["selections"][e] < FEW_TOKENS]
    if few and averages:
        progress.note(
            f"{len(few)} kept experts were reached by fewer than {FEW_TOKENS} tokens: their mean is noise; more calibration text helps"
        )


def apply(
    model: str | Path | Inventory,
    plan: str | Path | Plan,
    out: str | Path,
    *,
    overwrite: bool = False,
    check_values: bool = True,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write the checkpoint that the plan describes, tensor by tensor; the model is never loaded. Returns notes.

    Raises:
        UserError: the plan is for another model or breaks a rule, the output exists, the disk is full, NaN in a kept tensor.
    """
    from expertsmith.surgery.apply import apply_plan

    loaded = plan if isinstance(plan, Plan) else load_plan(plan)
    inventory = model if isinstance(model, Inventory) else take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    return apply_plan(loaded, inventory, Path(out), overwrite=overwrite, check_values=check_values, progress=progress)


def verify(
    model: str | Path | Inventory,
    out: str | Path,
    *,
    plan: str | Path | Plan | None = None,
    data: Sequence[str] = (),
    tokens: int = 1024,
    seq_len: int | None = None,
    tolerance: float = 1e-4,
    device: str = "auto",
    dtype: str = "float32",
    memory: str = "auto",
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Verdict:
    """Prove that OUT is MODEL with the plan's experts gone; leaves `OUT/expertsmith/verify.json`.

    Args:
        plan: None: the plan inside OUT.
        data: text to compare on; none: seeded random tokens, which reach experts that a narrow text would not.
        tokens: how many tokens to compare on, about.
        tolerance: largest difference allowed, relative to the largest reference value of the same layer (and of the logits).
    """
    from expertsmith.engine.loading import choose_device, choose_memory
    from expertsmith.surgery import verify as proof

    progress = progress or Silent()
    inventory = model if isinstance(model, Inventory) else take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    output = open_checkpoint(out)
    loaded = plan if isinstance(plan, Plan) else load_plan(plan if plan is not None else proof.find_plan(Path(out)))
    config = inventory.config
    if data:
        length = seq_len or min(256, _window(inventory.checkpoint.config))
        count = max(1, tokens // (length * len(data)))
        source = inventory.checkpoint
        batches = _tokens(
            source.path,
            source.config,
            data,
            progress,
            samples=count,
            seq_len=length,
            seed=0,
            pack=True,
            overlong="truncate",
            batch_tokens=2048,
        ).batches(2048)
    else:
        batches = proof.random_batches(
            int(config.get("vocab_size", 2)), tokens, length=min(seq_len or 64, _window(inventory.checkpoint.config))
        )
    where = choose_device(device)
    mode = choose_memory(memory, [inventory.checkpoint, output], where, dtype)
    verdict = proof.verify(
        loaded, inventory, output, batches, memory=mode, device=where, dtype=dtype, tolerance=tolerance, progress=progress
    )
    proof.save_verdict(verdict, Path(out))
    return verdict


def evaluate(
    model: str | Path,
    data: Sequence[str],
    *,
    reference: str | Path | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 42,
    batch_tokens: int = 4096,
    device: str = "auto",
    dtype: str = "auto",
    memory: str = "auto",
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Quality:
    """Perplexity by domain on held-out text; against a reference also KL divergence, top-1 agreement and ESAP.

    Documents are packed into windows that overlap by one token, so that each token is predicted once.
    """
    from expertsmith.arch import families, text_config
    from expertsmith.engine.loading import choose_device, choose_memory, load_model
    from expertsmith.evaluation.quality import measure

    progress = progress or Silent()
    opened = [
        open_checkpoint(path, allow_pickle=allow_pickle) for path in ([model] if reference is None else [model, reference])
    ]
    tokens = _tokens(
        opened[0].path,
        opened[0].config,
        data,
        progress,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        pack=True,
        overlong="truncate",
        batch_tokens=batch_tokens,
        overlap=1,
    )
    where = choose_device(device)
    mode = choose_memory(memory, opened, where, dtype)
    loaded = [
        load_model(
            entry, families().get(text_config(entry.config).get("model_type", "")), memory=mode, device=where, dtype=dtype
        )
        for entry in opened
    ]
    return measure(loaded[0], tokens.batches(batch_tokens), loaded[1] if reference is not None else None, progress)


def compress(
    model: str | Path,
    method: str,
    keep: Keep,
    out: str | Path,
    *,
    data: Sequence[str] = (),
    stats: str | Path | Statistics | None = None,
    domains: Sequence[str] = (),
    budget: str = "uniform",
    options: Mapping[str, Any] | None = None,
    router_groups: Literal["keep", "flatten"] = "keep",
    eval_data: Sequence[str] = (),
    measure: bool = True,
    overwrite: bool = False,
    allow_pickle: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory: str = "auto",
    progress: Progress | None = None,
    **calibration: Any,
) -> dict[str, Any]:
    """calibrate + plan + apply + verify + evaluate in one go; returns what was done, found and measured.

    The statistics stay in `<out>.stats`, so that an interrupted run resumes and further plans need no calibration.

    Args:
        eval_data: held-out text to measure quality on; without it, the calibration text is used (which flatters the result).
        measure: False leaves the quality measurement out.
    """
    from expertsmith import methods as registered
    from expertsmith.checkpoint.writer import prepare_target
    from expertsmith.surgery.card import model_card

    progress = progress or Silent()
    seconds: dict[str, float] = {}
    target = Path(out)
    inventory = take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    prepare_target(target, inventory.checkpoint.path, overwrite)
    registered.find(method).parse_options(options or {})
    keep_count(
        parse_keep(keep),
        inventory.rules if router_groups == "keep" else Rules(inventory.num_experts, inventory.top_k),
        inventory.checkpoint.source,
    )
    run: dict[str, Any] = {"device": device, "memory": memory}
    if stats is None and data and not registered.find(method).data_free:
        with _timed(seconds, "calibrate"):
            stats = calibrate(
                model,
                data,
                _beside(out, "stats"),
                dtype=dtype,
                allow_pickle=allow_pickle,
                progress=progress,
                **run,
                **calibration,
            )
    with _timed(seconds, "plan"):
        made = plan(
            inventory,
            method,
            keep,
            stats=stats,
            domains=domains,
            budget=budget,
            options=options,
            router_groups=router_groups,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    with _timed(seconds, "apply"):
        notes = apply(inventory, made, target, overwrite=overwrite, progress=progress)
    with _timed(seconds, "verify"):
        verdict = verify(inventory, target, plan=made, progress=progress, **run)
    quality = None
    texts = list(eval_data) or list(data)
    if measure and texts:
        shape = {key: calibration[key] for key in ("samples", "seq_len", "seed") if key in calibration}
        with _timed(seconds, "evaluate"):
            quality = evaluate(
                target,
                texts,
                reference=inventory.checkpoint.path,
                dtype=dtype,
                allow_pickle=allow_pickle,
                progress=progress,
                **run,
                **shape,
            ).to_json()
        quality["held_out"] = bool(eval_data)
        (target / "README.md").write_text(model_card(made, inventory, notes, _quality_line(quality)), encoding="utf-8")
    return {"out": str(target), "plan": made, "notes": notes, "verify": verdict, "quality": quality, "seconds": seconds}


def run(recipe: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Run the steps of a recipe file in order; every fault of the file is reported before anything runs."""
    from expertsmith.recipe import load_recipe, run_recipe

    return run_recipe(load_recipe(recipe), progress)


def _quality_line(quality: Mapping[str, Any]) -> str:
    rows = ", ".join(
        f"{name} {row['perplexity']:.2f} (base {row['reference_perplexity']:.2f})" for name, row in quality["domains"].items()
    )
    return f"perplexity on {'held-out text' if quality['held_out'] else 'the calibration text itself'}: {rows}"


@contextmanager
def _timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Seconds of a stage, into a dict."""
    begin = time.perf_counter()
    yield
    into[name] = round(time.perf_counter() - begin, 3)


def _beside(path: str | Path, suffix: str) -> Path:
    target = Path(path)
    return target.with_name(f"{target.name}.{suffix}")


def _window(config: Mapping[str, Any]) -> int:
    from expertsmith.arch import text_config

    for key in ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions"):
        value = text_config(config).get(key)
        if isinstance(value, int) and value > 1:
            return value
    return 2**31


def _tokens(
    path: Path,
    config: Mapping[str, Any],
    data: Sequence[str],
    progress: Progress,
    *,
    seq_len: int | None,
    overlap: int = 0,
    **options: Any,
) -> Any:
    from expertsmith.arch import text_config
    from expertsmith.calibration.data import DataOptions, load_tokenizer, load_tokens

    window = _window(config)
    length = seq_len if seq_len is not None else min(2048, window)
    if length != window:  # a full window has no position for the token that is only predicted
        length += overlap
    settings = DataOptions(seq_len=length, overlap=overlap, **options)
    vocab = text_config(config).get("vocab_size")
    tokens = load_tokens(
        data, load_tokenizer(path), settings, None if window == 2**31 else window, vocab if isinstance(vocab, int) else None
    )
    counts = ", ".join(
        f"{name} {number:,} in {len(tokens.sequences[name])} sequences" for name, number in tokens.tokens.items()
    )
    progress.note(f"tokens: {counts}")
    return tokens


def _load(inventory: Inventory, memory: str, device: str, dtype: str, progress: Progress) -> Any:
    from expertsmith.engine.loading import choose_device, choose_memory, load_model

    where = choose_device(device)
    mode = choose_memory(memory, [inventory.checkpoint], where, dtype)
    progress.note(f"{inventory.architecture.title}: {mode} on {where}")
    return load_model(inventory.checkpoint, inventory.architecture, memory=mode, device=where, dtype=dtype)
