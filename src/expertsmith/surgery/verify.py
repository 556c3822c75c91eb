"""Proof that an output checkpoint is the source without the dropped experts.

Three checks: every tensor of the output is byte for byte as planned; every decoder layer's output equals that of the source with the same
experts masked; and so do the logits. The source runs with the plan in force (`surgery.enforced`). The
output runs as any user would load it. If transformers has no class for the family, only the first check is made, and the verdict says so.
Where two experts' scores are equal up to rounding, the two models may choose differently, and the token's outputs are far apart from there on. So
if outputs differ, both run once more, and every layer of the output gets the inputs of the source's: rounding does not add up, and whatever is
wrong in a layer still shows.
If the plan has skip thresholds, skipping is compared layer by layer with the stock forward, on the same inputs and with the weights of
skipped slots at zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertsmith.checkpoint import Checkpoint
from expertsmith.checkpoint.code import code_files
from expertsmith.checkpoint.floats import quantisation_of
from expertsmith.checkpoint.writer import CHUNK, OutputTensor, chunks, read_into
from expertsmith.engine import Batch, LoadedModel, Walk, hidden_of, load_model
from expertsmith.engine.devices import Memory
from expertsmith.engine.layout import expert_count, experts_of, is_grouped, routing_of
from expertsmith.engine.mtp import counted, why_not_played
from expertsmith.engine.shared_reads import sharing
from expertsmith.engine.skipping import Rule, keep_slots, rescaled_weights, skipping
from expertsmith.engine.uneven import SHIM
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory, take_inventory
from expertsmith.planning.plan import Plan
from expertsmith.ranks import ALONE, Ranks
from expertsmith.surgery.apply import check_plan, output_config, output_tensors, output_texts, written
from expertsmith.surgery.enforced import enforced
from expertsmith.surgery.novices import with_constants_of
from expertsmith.surgery.skip import is_padded
from expertsmith.views.notebook import Shown
from expertsmith.views.progress import Progress, Silent

VERDICT = "expertsmith/verify.json"


@dataclass(repr=False)
class Verdict(Shown):
    """The result of `verify`. Differences are the largest |a - b| over all tokens that count, in the units of the activations."""

    passed: bool
    tolerance: float  # relative: largest difference allowed, as a share of the largest reference value
    tensors: int
    wrong_tensors: list[str] = field(default_factory=list)
    config_differs: list[str] = field(default_factory=list)
    layers: list[dict[str, float]] = field(default_factory=list)  # layer, difference, scale
    skipping: list[dict[str, float]] = field(
        default_factory=list
    )  # layer, difference, scale, skipped: share of slots that did not run
    logits_difference: float = 0.0
    logits_scale: float = 0.0
    top1_agreement: float = 1.0
    apart: int = 0  # tokens whose outputs were apart by more than allowed, until each layer of both models got the same inputs
    mtp_not_compared: str | None = (
        None  # why the kept multi-token-prediction layer was compared by bytes only; None: its outputs were compared, or there is none
    )
    not_compared: str | None = None  # why no outputs were compared (then `passed` is for the bytes only); None: they were
    tokens: int = 0
    dtype: str = "float32"
    memory: str = "resident"

    def _rows(self) -> list[dict[str, Any]]:
        return [{**row, "relative": _relative(row["difference"], row["scale"])} for row in self.layers]

    def _line(self) -> str:
        found = (
            f"{len(self.wrong_tensors)} of {self.tensors:,} tensors wrong"
            if self.wrong_tensors
            else f"{self.tensors:,} tensors"
        )
        return f"{'passed' if self.passed else 'FAILED'}, {found}, largest relative difference {self.largest:.1e} of {self.tolerance:g} allowed"

    @property
    def largest(self) -> float:
        """The largest relative difference over layers and logits."""
        rows = (*self.layers, *self.skipping)
        pairs = [(row["difference"], row["scale"]) for row in rows] + [(self.logits_difference, self.logits_scale)]
        return max(_relative(difference, scale) for difference, scale in pairs)

    def to_json(self) -> dict[str, Any]:
        """The verdict as written to verify.json."""
        held = {"format": "expertsmith.verify", "version": 1, **asdict(self), "largest_relative_difference": self.largest}
        if self.not_compared:  # nothing was measured
            held |= dict.fromkeys(("largest_relative_difference", "logits_difference", "logits_scale", "top1_agreement"))
        return held


def _relative(difference: float, scale: float) -> float:
    """difference / scale; infinite if the difference is, also where the scale is too (NaN in both models), which would divide to NaN."""
    return difference / scale if scale and math.isfinite(difference) else difference


@dataclass
class Outputs:
    """What the batches of one rank showed: largest difference and largest value by layer and of the logits, and counts of tokens and slots."""

    layers: dict[int, dict[str, float]] = field(default_factory=dict)
    skipping: dict[int, dict[str, float]] = field(default_factory=dict)
    counters: dict[int, tuple[int, int]] = field(default_factory=dict)  # layer → slots, slots that ran
    logits: dict[str, float] = field(default_factory=lambda: {"difference": 0.0, "scale": 0.0})
    same: int = 0  # tokens with the same most probable next token
    tokens: int = 0
    apart: int = 0  # tokens with a difference above the tolerance, relative to the largest value of their batch


def compare_bytes(
    plan: Plan,
    inventory: Inventory,
    output: Checkpoint,
    progress: Progress | None = None,
    pad: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[int, list[str]]:
    """(tensors compared, names that differ): dtype, shape and every byte of the output against the plan's byte ranges of the source.

    Each of several `ranks` compares its share of the bytes, in tensors that are neighbours in the output's files.
    """
    wanted = {tensor.name: tensor for tensor in output_tensors(plan, inventory, pad)}
    there = sorted(
        set(wanted) & set(output.tensors), key=lambda name: (str(output.tensors[name].file), output.tensors[name].start, name)
    )
    mine = [there[position] for position in ranks.share_by_size([wanted[name].nbytes for name in there])]
    wrong = []
    with (progress or Silent()).task("compare bytes", sum(wanted[name].nbytes for name in mine), "B") as advance:
        for name in mine:
            info = output.tensors[name]
            same = (info.dtype, info.shape) == (wanted[name].dtype, wanted[name].shape) and _same_bytes(
                wanted[name], output, advance
            )
            if not same:
                wrong.append(name)
    different = sorted(name for names in ranks.gather(wrong) for name in names)
    return len(wanted), sorted(set(wanted) ^ set(output.tensors)) + different


def _same_bytes(tensor: OutputTensor, output: Checkpoint, advance: Any) -> bool:
    info = output.tensors[tensor.name]
    size = min(CHUNK, max((piece.nbytes for piece in tensor.pieces), default=0))
    buffer, others = memoryview(bytearray(size)), memoryview(bytearray(size))
    with open(info.file, "rb", buffering=0) as theirs:
        theirs.seek(info.start)
        for piece in tensor.pieces:
            for mine in chunks(piece, buffer):
                count = read_into(theirs, others[: len(mine)])
                # not as memoryviews, which are compared element by element as Python numbers
                if count != len(mine) or not np.array_equal(_words(mine), _words(others[:count])):
                    return False
                advance(count)
    return True


def verify(
    plan: Plan,
    inventory: Inventory,
    output: Checkpoint,
    batches: Sequence[Batch],
    *,
    memory: Memory = "resident",
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    tolerance: float = 1e-4,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Verdict:
    """Compare the output checkpoint with the masked source. Each of several `ranks` compares its share of the bytes and of the batches, and
    all return the same verdict.

    Raises:
        UserError: the plan is not for this source, or a model cannot be loaded.
    """
    progress = progress or Silent()
    pad = is_padded(output.config)
    check_plan(plan, inventory, pad)
    plan, wrong = with_constants_of(plan, inventory, output)
    if wrong:
        return Verdict(False, tolerance, len(output.tensors), wrong, dtype=dtype, memory=memory)
    held = written(plan, inventory, requantise=quantisation_of(output) is not None)
    tensors, wrong = compare_bytes(plan, held, output, progress, pad, ranks)
    differs = ranks.leading(lambda: _differing_texts(plan, held, output, pad))
    verdict = Verdict(
        False, tolerance, tensors, wrong, differs, tokens=sum(batch.tokens for batch in batches), dtype=dtype, memory=memory
    )
    if wrong or differs:
        return verdict
    record = inventory.architecture
    if record.no_class:
        verdict.passed, verdict.not_compared, verdict.tokens = True, record.no_class, 0
        return verdict
    overrides = record.one_group if plan.router_groups == "flatten" else {}
    ahead = plan.mtp == "keep" and bool(inventory.mtp_layers)
    if ahead and plan.novices:
        verdict.mtp_not_compared = "it is not run in a model with experts that are constants"
    elif ahead and plan.neurons and plan.one_width is None:
        verdict.mtp_not_compared = "it is not run in a model whose experts have different numbers of neurons"
    elif ahead:
        verdict.mtp_not_compared = why_not_played(held) or why_not_played(take_inventory(output))
    where: dict[str, Any] = {
        "memory": memory,
        "device": device,
        "dtype": dtype,
        "mtp": ahead and verdict.mtp_not_compared is None,
    }
    return _compare_outputs(plan, held, output, batches, verdict, where, progress, ranks, overrides)


def _compare_outputs(
    plan: Plan,
    held: Inventory,
    output: Checkpoint,
    batches: Sequence[Batch],
    verdict: Verdict,
    where: Mapping[str, Any],
    progress: Progress,
    ranks: Ranks,
    overrides: Mapping[str, Any],
) -> Verdict:
    """The verdict with what both models' layers and heads gave, on their own inputs or, if these are apart, on the same."""
    mine, models = ranks.share(batches), list[LoadedModel]()
    if mine or verdict.memory == "stream":  # there may be more ranks than batches; where reads are shared, they walk along
        source = load_model(held.checkpoint, held.architecture, config_overrides=overrides, **where)
        models = [source, load_model(output, held.architecture, **where)]

    def compared(fed: bool) -> list[Outputs]:
        part = Outputs()
        with sharing(models if verdict.memory == "stream" else [], ranks) as shared:
            if mine or shared:
                _compare_models(plan, held, models[0], models[1], mine, part, verdict.tolerance, progress, fed)
        return ranks.gather(part)

    parts = compared(False)
    _add_up(verdict, parts)
    if verdict.tolerance < verdict.largest < math.inf:
        progress.note("outputs differ: once more, with the same inputs for each layer of both models")
        again = replace(verdict, skipping=[], apart=sum(part.apart for part in parts))
        _add_up(again, compared(True))
        verdict = again if again.largest <= verdict.tolerance else verdict
    verdict.passed = verdict.largest <= verdict.tolerance
    return verdict


def _compare_models(
    plan: Plan,
    held: Inventory,
    source: LoadedModel,
    pruned: LoadedModel,
    batches: Sequence[Batch],
    found: Outputs,
    tolerance: float,
    progress: Progress,
    fed: bool,
) -> None:
    """Run the masked source, as it is `held`, and the output on the batches, and compare what their layers and heads give; if `fed`, layers of the
    output get the inputs of the source's."""
    with enforced(source, plan, held), progress.task("verify", len(source.layers), "layers") as advance:
        _compare_forwards(source, pruned, batches, found, tolerance, advance, fed)
    if plan.skip is not None:
        _compare_skipping(pruned, batches, plan.thresholds, plan.skip.rule, found)


def _differing_texts(plan: Plan, inventory: Inventory, output: Checkpoint, pad: bool) -> list[str]:
    """Keys of config.json and names of other small files of the output that are not as planned."""
    expected, source = output_config(plan, inventory, pad), inventory.checkpoint.path
    differs = sorted(key for key in {*expected, *output.config} if expected.get(key) != output.config.get(key))
    for name, text in output_texts(plan, inventory, pad).items():
        if not (output.path / name).is_file() or (output.path / name).read_text(encoding="utf-8") != text:
            differs.append(name)
    for name in code_files(source, expected):
        theirs = output.path / name
        if name != SHIM and (not theirs.is_file() or theirs.read_bytes() != (source / name).read_bytes()):
            differs.append(name)
    return differs


def _add_up(verdict: Verdict, parts: Sequence[Outputs]) -> None:
    """Put what the ranks found into the verdict: maxima of differences and scales, and shares from sums of counts."""
    verdict.layers = [{"layer": layer, **row} for layer, row in _largest_rows([part.layers for part in parts]).items()]
    for layer, row in _largest_rows([part.skipping for part in parts]).items():
        slots, ran = (sum(part.counters.get(layer, (0, 0))[i] for part in parts) for i in (0, 1))
        verdict.skipping.append({"layer": layer, **row, "skipped": 1 - ran / slots if slots else 0.0})
    verdict.logits_difference = max(part.logits["difference"] for part in parts)
    verdict.logits_scale = max(part.logits["scale"] for part in parts)
    verdict.top1_agreement = sum(part.same for part in parts) / max(1, sum(part.tokens for part in parts))


def _largest_rows(parts: Sequence[Mapping[int, Mapping[str, float]]]) -> dict[int, dict[str, float]]:
    layers = sorted({layer for part in parts for layer in part})
    return {
        layer: {key: max(part[layer][key] for part in parts if layer in part) for key in ("difference", "scale")}
        for layer in layers
    }


def _hidden_in(call: Any) -> torch.Tensor:
    """The hidden states among a decoder layer's arguments."""
    found: torch.Tensor = call.args[0] if call.args else call.keywords["hidden_states"]
    return found


class _Recorded(Walk):
    """A walk that copies the inputs of a decoder layer."""

    inputs: dict[int, torch.Tensor]

    def _run(self, index: int, number: int, call: Any) -> Any:
        self.inputs[number] = _hidden_in(call).clone()
        return call()


class _Fed(Walk):
    """A walk whose decoder layers, after the first, get the inputs of another walk's."""

    inputs: dict[int, torch.Tensor]

    def _run(self, index: int, number: int, call: Any) -> Any:
        own, theirs = _hidden_in(call), self.inputs.pop(number)
        given = theirs.to(own.device) if index else own  # what comes before the first layer is compared too
        return call.func(given, *call.args[1:], **call.keywords) if call.args else call(hidden_states=given)


def _compare_forwards(
    source: LoadedModel,
    pruned: LoadedModel,
    batches: Sequence[Batch],
    found: Outputs,
    tolerance: float,
    advance: Any,
    fed: bool,
) -> None:
    reference: dict[int, torch.Tensor] = {}
    apart = [torch.zeros_like(batch.mask) for batch in batches]
    row = {"difference": 0.0, "scale": 0.0}

    def keep(layer: int, number: int, output: Any) -> None:
        reference[number] = hidden_of(output)

    def compare(layer: int, number: int, output: Any) -> None:
        hidden = hidden_of(output)
        theirs = reference.pop(number).to(hidden.device)  # two models may be spread over GPUs in other ways
        mask = batches[number].mask
        rows = (counted(mask) if layer >= source.depth else mask).to(hidden.device)
        a, b = theirs[rows].float(), hidden[rows].float()
        row["difference"] = max(row["difference"], _largest(a - b))
        row["scale"] = max(row["scale"], _largest(a))
        note(number, rows, a, b)

    def note(number: int, rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        far = (a - b).flatten(1).abs().amax(1) > tolerance * _largest(a)
        apart[number][rows.cpu()] |= far.cpu()

    kinds = (_Recorded, _Fed) if fed else (Walk, Walk)
    with kinds[0](source, batches, after=keep) as first, kinds[1](pruned, batches, after=compare) as second:
        if isinstance(first, _Recorded) and isinstance(second, _Fed):
            first.inputs = second.inputs = {}
        for layer, _ in zip(first.layers(), second.layers(), strict=True):
            found.layers[layer] = dict(row)
            row.update(difference=0.0, scale=0.0)
            advance(1)
        for number, (batch, a, b) in enumerate(zip(batches, first.outputs(), second.outputs(), strict=True)):
            rows = batch.mask.to(a.logits.device)
            x, y = a.logits[rows].float(), b.logits[rows.to(b.logits.device)].to(a.logits.device).float()
            found.logits["difference"] = max(found.logits["difference"], _largest(x - y))
            found.logits["scale"] = max(found.logits["scale"], _largest(x))
            found.same += int((x.argmax(-1) == y.argmax(-1)).sum())
            found.tokens += x.shape[0]
            note(number, rows, x, y)
    found.apart = sum(int(mask.sum()) for mask in apart)


def _compare_skipping(
    model: LoadedModel, batches: Sequence[Batch], thresholds: Mapping[int, float], rule: Rule, found: Outputs
) -> None:
    """Compare every layer's skipping forward with the stock forward, on the same inputs and with the weights of skipped slots at zero."""
    assert model.architecture is not None
    found.skipping = {layer: {"difference": 0.0, "scale": 0.0} for layer in thresholds}
    with skipping(model, thresholds, rule, found.counters), ExitStack() as stack:
        for layer in thresholds:
            experts = experts_of(model.layers[layer], model.architecture)
            stack.callback(setattr, experts, "forward", experts.forward)
            experts.forward = _compared(experts, experts.forward, thresholds[layer], rule, found.skipping[layer])
        with Walk(model, batches) as walk:
            for _ in walk.layers():
                pass


def _compared(experts: Any, sparse: Any, threshold: float, rule: Rule, row: dict[str, float]) -> Any:
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        selected, weights = routing_of(args, kwargs)
        flat = weights.reshape(-1, weights.shape[-1])
        skippable = None if is_grouped(experts) else selected.reshape(flat.shape) < expert_count(experts)
        keep = keep_slots(flat, rule, threshold, skippable)
        zeroed = (rescaled_weights(flat, keep, skippable) * keep).reshape(weights.shape)
        dense = type(experts).forward(
            experts,
            hidden_states,
            *(zeroed if value is weights else value for value in args),
            **{name: zeroed if value is weights else value for name, value in kwargs.items()},
        )
        mine: torch.Tensor = sparse(hidden_states, *args, **kwargs)
        row["difference"] = max(row["difference"], _largest(dense - mine))
        row["scale"] = max(row["scale"], _largest(dense))
        return mine

    return forward


def _largest(values: torch.Tensor) -> float:
    """Largest magnitude; NaN counts as infinite, so that it can never pass."""
    top = float(values.abs().max()) if values.numel() else 0.0
    return top if top == top else float("inf")


def random_batches(vocab_size: int, tokens: int, seed: int = 0, length: int = 64) -> list[Batch]:
    """Seeded random token ids, for verification without data: they reach experts that a narrow text would not."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, tokens // length)
    ids = torch.randint(0, vocab_size, (rows, length), generator=generator)
    return [
        Batch(ids[i : i + 4], torch.ones_like(ids[i : i + 4], dtype=torch.bool), "random", list(range(i, min(i + 4, rows))))
        for i in range(0, rows, 4)
    ]


def find_plan(output: Path) -> Path:
    """The plan inside an output checkpoint.

    Raises:
        UserError: it has none.
    """
    path = output / "expertsmith" / "plan.json"
    if (output / "expertsmith" / "heal.json").is_file():
        raise UserError(
            f"{output} was healed, so its weights differ from the original's",
            "verify the checkpoint from before healing, and evaluate this one with `expertsmith evaluate --reference`",
        )
    if not path.is_file():
        raise UserError(f"{output} has no expertsmith/plan.json", "pass --plan plan.json")
    return path


def save_verdict(verdict: Verdict, output: Path) -> None:
    """Write `expertsmith/verify.json` into the output checkpoint."""
    target = output / VERDICT
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(verdict.to_json(), indent=1) + "\n", encoding="utf-8")


def _words(view: memoryview) -> np.ndarray[Any, Any]:
    """Bytes as 64-bit integers if they divide into these, otherwise as bytes."""
    return np.frombuffer(view, dtype=np.uint8 if len(view) % 8 else np.uint64)
