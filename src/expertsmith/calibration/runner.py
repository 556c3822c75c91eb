"""One pass over the calibration data: every layer is observed once and saved; a resumed run does not observe it again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertsmith.calibration import gradients, stats
from expertsmith.calibration.data import TokenData
from expertsmith.calibration.observers import SAMPLES, Extras, LayerSums, choose_sample, observing
from expertsmith.calibration.spill import Spill, clear, newest, read
from expertsmith.engine import Batch, LoadedModel
from expertsmith.engine.layout import expert_count, experts_of
from expertsmith.engine.mtp import counted, shortened
from expertsmith.engine.shared_reads import sharing
from expertsmith.engine.walk import Call, HaltingWalk
from expertsmith.errors import UserError
from expertsmith.ranks import ALONE, Ranks
from expertsmith.views.progress import Progress, Silent


@dataclass(frozen=True)
class Follow:
    """A choice of experts that progressive statistics follow.

    `said`: what the header records of it. `choose`: the statistics of one layer → what is chosen there; the first rank calls it. `enforce`:
    within the context, the model runs as was chosen.
    """

    said: Mapping[str, Any]
    choose: Callable[[stats.Statistics], Any]
    enforce: Callable[[LoadedModel, Any], AbstractContextManager[None]]


def collect(
    model: LoadedModel,
    data: TokenData,
    out: Path,
    *,
    batch_tokens: int = 8192,
    extras: Extras | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    follow: Follow | None = None,
) -> stats.Statistics:
    """Observe every MoE layer over the data and write the statistics folder.

    With `follow` the statistics are progressive: as soon as a layer is observed, a choice is made from its statistics, and the layer runs
    again with it, so that later layers get the inputs that a compressed model makes. The last layer is only observed.

    A folder that holds some layers of the same calibration (same model, token ids, dtype, options) is completed: those layers are not
    observed again, nor run again if their outputs were spilled (`calibration.spill`). With several `ranks` the batches are split
    over them, the sums are reduced, and nothing is spilled. Sums of gradients are made first, in a pass of their own (`calibration.gradients`).

    Raises:
        UserError: the folder holds another calibration (which `overwrite` replaces), there is nothing to observe, or the ranks have read
            different models or texts.
    """
    progress = progress or Silent()
    extras = extras or Extras()
    assert model.architecture is not None
    wanted = model.moe_layers
    if not wanted:
        raise UserError(f"{model.checkpoint.source} has no layer with routed experts")
    header = _header(model, data, wanted, batch_tokens, extras, follow)
    ranks.agree("model or text", lambda: {**header, "model": header["model"]["fingerprint"]})

    def begun() -> set[int]:
        _prepare(out, header, resume, overwrite)
        return {layer for layer in wanted if stats.layer_path(out, layer).exists()}

    def take(layer: int, sums: LayerSums) -> None:
        _reduce(sums, ranks)
        arrays = _arrays(sums)
        _check(arrays, layer)
        for domain, entry in neurons.get(layer, {}).items():
            arrays[domain] |= entry
        if ranks.first:
            stats.save_layer(out, layer, arrays)

    def settled(layer: int) -> AbstractContextManager[None]:
        assert follow is not None
        choose = follow.choose
        choice = ranks.leading(lambda: choose(_written(out, layer, header)))
        return follow.enforce(model, choice)

    done = ranks.leading(begun)
    todo = [layer for layer in wanted if layer not in done]
    if todo:
        batches = data.batches(batch_tokens, pad_id=_pad_id(model))
        batches, alone = ranks.share(batches), ranks.world == 1
        spilled = newest(out) if alone else None
        skip = 0 if spilled is None or spilled >= todo[0] else spilled + 1
        if done and ranks.first:
            progress.note(f"resuming: {len(done)} of {len(wanted)} layers are finished, continuing at decoder layer {skip}")
        small = data.batches(min(batch_tokens, gradients.TOKENS), pad_id=_pad_id(model)) if extras.neurons else []
        neurons = _gradients(model, ranks.share(small), out, extras, progress, ranks)
        states = Spill(out, enabled=alone)
        tokens = sum(batch.tokens for batch in batches)
        with (
            _tidied(out, ranks),
            sharing([model], ranks),
            progress.task("calibrate", tokens * (todo[-1] + 1 - skip), "layer tokens") as advance,
        ):
            chosen = None if follow is None else settled
            _Run(model, data, batches, wanted, set(todo), extras, states, skip, advance, take, chosen).observe()

    def cleared() -> None:
        clear(out)
        (out / gradients.FILE).unlink(missing_ok=True)

    ranks.leading(cleared)
    return stats.load_statistics(out)


def _written(out: Path, layer: int, header: dict[str, Any]) -> stats.Statistics:
    """The statistics of a finished layer, with the bits that a plan reads later."""
    return stats.Statistics(header, {layer: stats.load_layer(out, layer)})


def _gradients(
    model: LoadedModel, batches: list[Batch], out: Path, extras: Extras, progress: Progress, ranks: Ranks
) -> gradients.Arrays:
    """The sums that need gradients, if they are wanted; those that an interrupted run has left are used."""
    if not extras.neurons:
        return {}
    found = ranks.leading(lambda: gradients.load(out))
    if found is None:
        tokens = sum(batch.tokens for batch in batches)
        first = next(layer for layer in model.moe_layers if layer < model.depth)
        with progress.task("gradients", tokens * (len(model.layers) + model.depth - first), "layer tokens") as advance:
            found = gradients.collect_gradients(model, batches, ranks, advance)
        if ranks.first:
            gradients.save(out, found)
    return found


@contextmanager
def _tidied(out: Path, ranks: Ranks) -> Iterator[None]:
    """Remove the folder if the calibration fails while it holds only `stats.json`."""
    try:
        yield
    except BaseException:
        if ranks.first and [path.name for path in out.iterdir()] == ["stats.json"]:
            (out / "stats.json").unlink()
            with suppress(OSError):
                out.rmdir()
        raise


@dataclass
class _Run:
    """One pass of the batches through the layers from `skip` on, which observes the layers `todo`.

    `take` is called with the sums of every layer of `todo`. `settled`, of progressive statistics: within its context, a layer that was taken
    runs as was chosen.
    """

    model: LoadedModel
    data: TokenData
    batches: list[Batch]
    wanted: list[int]  # all layers with experts
    todo: set[int]
    extras: Extras
    states: Spill
    skip: int
    advance: Callable[[float], object]
    take: Callable[[int, LayerSums], None]
    settled: Callable[[int], AbstractContextManager[None]] | None

    def __post_init__(self) -> None:
        self.last = max(self.todo)
        self.twice = self.todo - {self.last} if self.settled else set()
        self.now: list[Batch] = []
        self.watch = ExitStack()
        self.sums: LayerSums | None = None
        hooks = {"before": self._before, "after": self._after, "restore": self._restore}
        self.walk = HaltingWalk(self.model, self.batches, self.twice, self._halt, skip=self.skip, **hooks)

    def observe(self) -> None:
        """Run to the last layer of `todo`."""
        with self.watch, self.walk:
            self._enter(self.skip)
            for layer in self.walk.layers(until=self.last):
                self.watch.close()  # a rank may have no batches
                if layer in self.todo - self.twice:
                    self._hand_over(layer)
                self.states.layer_ends(layer)
                self._enter(layer + 1)

    def _before(self, layer: int, number: int, batch: Batch) -> None:
        self._show(layer, batch)
        if number == 0:
            self.states.layer_begins(layer)
        if number == 0 and layer in self.todo - self.twice:
            self.watch.enter_context(self._observing(layer))

    def _after(self, layer: int, number: int, output: Any) -> None:
        self.advance(self.batches[number].tokens)
        self.states.batch_leaves(layer, number, output, complete=not self.walk.side_state)
        if number == len(self.batches) - 1:
            self.watch.close()

    def _halt(self, layer: int, calls: list[Call]) -> None:
        """Observe a layer that then runs with the choice made for it."""
        with self._observing(layer):
            for call, batch in zip(calls, self.batches, strict=True):
                self._show(layer, batch)
                call()
        self._hand_over(layer)
        self._settle(layer)

    def _enter(self, layer: int) -> None:
        """Before a layer that was taken by an earlier run: put its choice in force."""
        if self.settled and layer in self.wanted and layer not in self.todo and layer < self.last:
            self._settle(layer)

    def _settle(self, layer: int) -> None:
        assert self.settled is not None
        self.watch.enter_context(self.settled(layer))

    def _restore(self, number: int) -> Any:
        return read(self.states.folder, self.skip - 1, number, self.model.device)

    def _show(self, layer: int, batch: Batch) -> None:
        """The batch that the observed layer runs on next."""
        self.now[:] = [replace(batch, mask=counted(batch.mask)) if layer >= self.model.depth else batch]

    def _observing(self, layer: int) -> AbstractContextManager[None]:
        assert self.model.architecture is not None
        self.sums = self._begin(layer)
        return observing(self.model.layers[layer], self.model.architecture, self.sums, lambda: self.now[0])

    def _hand_over(self, layer: int) -> None:
        self.take(layer, self.sums or self._begin(layer))  # a rank may have no batches
        self.sums = None

    def _begin(self, layer: int) -> LayerSums:
        assert self.model.architecture is not None
        lengths = {domain: [len(row) for row in rows] for domain, rows in self.data.sequences.items()}
        chosen = {}
        if self.extras.sample_tokens:
            for domain, rows in lengths.items():
                there = shortened(rows) if layer >= self.model.depth else rows
                chosen[domain] = choose_sample(there, self.extras.sample_tokens, self.extras.seed, domain)
        experts = expert_count(experts_of(self.model.layers[layer], self.model.architecture))
        counts = {domain: len(rows) for domain, rows in lengths.items()}
        return LayerSums(experts, counts, self.model.places[layer], self.extras, chosen=chosen)


def _check(arrays: Mapping[str, Mapping[str, np.ndarray[Any, Any]]], layer: int) -> None:
    for domain, entry in arrays.items():
        for name, value in entry.items():
            if not np.isfinite(value).all():
                raise UserError(
                    f"decoder layer {layer}: the statistic {name} of domain {domain} is not finite",
                    "the activations overflow in this dtype: try --dtype float32",
                )


def _reduce(sums: LayerSums, ranks: Ranks) -> None:
    if ranks.world == 1:
        return
    import torch.distributed as dist

    for domain in sorted(sums.by_domain):
        entry = sums.by_domain[domain]
        shapes = ranks.gather({name: (value.shape, value.dtype) for name, value in entry.items() if name not in SAMPLES})
        for name, (shape, dtype) in {name: form for held in shapes for name, form in held.items()}.items():
            if name not in entry:  # a rank without batches of this domain
                entry[name] = torch.zeros(shape, dtype=dtype, device=sums.device)
        for name in sorted(entry):
            if name not in SAMPLES:
                dist.all_reduce(entry[name], op=dist.ReduceOp.MAX if name in stats.MAXIMA else dist.ReduceOp.SUM)
        if sums.extras.sample_tokens:
            parts: list[dict[str, Any]] = ranks.gather({name: entry.get(name) for name in SAMPLES})
            held = [part for part in parts if part["sample_index"] is not None]
            for name in SAMPLES:
                entry[name] = torch.cat([part[name] for part in held])


def _arrays(sums: LayerSums) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """The sums as numpy arrays; samples in the order of (sequence, position), independent of batches and ranks."""
    made = {}
    for domain, entry in sums.by_domain.items():
        tensors = _fetched(entry)
        if "sample_index" in tensors:
            keys = tensors["sample_index"].numpy()
            order = torch.from_numpy(np.lexsort((keys[:, 1], keys[:, 0])))
            tensors.update({name: tensors[name][order] for name in SAMPLES})
        made[domain] = {
            name: (value.float() if value.dtype == torch.bfloat16 else value).numpy() for name, value in tensors.items()
        }
    return made


def _fetched(entry: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors on the CPU, with one transfer for each dtype."""
    made: dict[str, torch.Tensor] = {}
    for dtype in dict.fromkeys(value.dtype for value in entry.values()):
        part = {name: value.detach() for name, value in entry.items() if value.dtype == dtype and name not in SAMPLES}
        sizes = [value.numel() for value in part.values()]
        flat = torch.cat([value.reshape(-1) for value in part.values()]).cpu() if part else torch.empty(0)
        made |= {name: piece.reshape(part[name].shape) for name, piece in zip(part, torch.split(flat, sizes), strict=True)}
    return {name: made.get(name, value.detach()) for name, value in entry.items()}  # samples are on the CPU already


def _header(
    model: LoadedModel, data: TokenData, layers: list[int], batch_tokens: int, extras: Extras, follow: Follow | None
) -> dict[str, Any]:
    from expertsmith import __version__

    assert model.architecture is not None
    return {
        "format": stats.FORMAT,
        "version": stats.VERSION,
        "made_by": f"expertsmith {__version__}",
        "model": {
            "model_type": model.architecture.model_type,
            "fingerprint": model.checkpoint.fingerprint,
            "source": model.checkpoint.source,
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "options": {
            "batch_tokens": batch_tokens,
            "output_sum": extras.output_sum,
            "all_outputs": extras.all_outputs,
            "sample_tokens": extras.sample_tokens,
            "seed": extras.seed,
            # left out, folders of older versions stay valid
            **({"output_moments": True} if extras.output_moments else {}),
            **({"neurons": True} if extras.neurons else {}),
        },
        "data": {
            "fingerprint": data.fingerprint,
            "tokens": data.tokens,
            "sequences": {domain: len(rows) for domain, rows in data.sequences.items()},
            "sequence_lengths": {domain: [len(row) for row in rows] for domain, rows in data.sequences.items()},
            "packed": data.packed,
        },
        "layers": layers,
        **({stats.PROGRESSIVE: dict(follow.said)} if follow else {}),
    }


def _prepare(out: Path, header: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
    if out.exists() and any(out.iterdir()):
        old = stats.load_header(out) if (out / "stats.json").exists() else None
        if old is None:
            raise UserError(f"{out} contains files that are not statistics", "choose another folder")
        other = _other(header, old)
        if other and resume and not overwrite and any(out.glob("layer_*")):  # without a finished layer there is nothing to lose
            raise UserError(
                f"{out} has the statistics of another calibration ({other} differs)",
                "choose another output, or pass --fresh or --overwrite to replace it",
            )
        if other or not resume:
            shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    stats.save_header(out, header)


def _other(header: Mapping[str, Any], old: Mapping[str, Any]) -> str | None:
    """The first key in which a calibration differs from the earlier one, or None; the model's location is ignored."""
    for key in ("model", "data", "dtype", "options", "layers", stats.PROGRESSIVE):
        mine, theirs = (
            {k: v for k, v in held[key].items() if k != "source"} if key == "model" else held.get(key) for held in (header, old)
        )
        if mine != theirs:
            return key
    return None


def _pad_id(model: LoadedModel) -> int:
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0
