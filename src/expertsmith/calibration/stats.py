"""The statistics folder: `stats.json` and one `layer_NNN.safetensors` per MoE layer. Reading it needs numpy only, no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from expertsmith.errors import UserError, parse_json
from expertsmith.views.notebook import Shown

FORMAT = "expertsmith.statistics"
VERSION = 1
PROGRESSIVE = "progressive"  # key of the header: the choice that progressive statistics follow
MAXIMA = frozenset({"norm_max"})
JOINED = frozenset({"easy_ep_by_sequence", "sample_inputs", "sample_outputs", "sample_index"})
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one MoE layer: domain → name → array (described in `calibration.observers.STATISTICS`)."""

    layer: int
    domains: Mapping[str, Mapping[str, Array]]

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer."""
        return int(next(iter(self.domains.values()))["selections"].shape[0])

    def total(self, name: str) -> Array:
        """A statistic over all domains: the sum (the maximum for maxima), in float64 or int64."""
        arrays = [entry[name] for entry in self.domains.values()]
        total: Array = np.maximum.reduce(arrays) if name in MAXIMA else np.sum(arrays, axis=0)
        return total


@dataclass(repr=False)
class Statistics(Shown):
    """All layers of a calibration, and its header: model, data and options."""

    header: dict[str, Any]
    layers: dict[int, LayerStatistics] = field(default_factory=dict)

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": layer,
                "domain": name,
                "experts": held.num_experts,
                "selections": int(arrays["selections"].sum()),
                "unused experts": int((arrays["selections"] == 0).sum()),
            }
            for layer, held in self.layers.items()
            for name, arrays in held.domains.items()
        ]

    def _line(self) -> str:
        told = ", ".join(f"{name} {count:,}" for name, count in self.tokens.items())
        return f"{len(self.layers)} layers, tokens: {told}"

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens that counted, by domain."""
        return dict(self.header["data"]["tokens"])

    @property
    def domains(self) -> list[str]:
        """Domain labels, in alphabetical order."""
        return list(self.tokens)

    @property
    def sequence_lengths(self) -> dict[str, list[int]]:
        """Tokens of every sequence, by domain."""
        return dict(self.header["data"]["sequence_lengths"])

    def select(self, domains: Sequence[str] | None) -> Statistics:
        """The same statistics for a part of the domains.

        Raises:
            UserError: a domain that was not calibrated, or progressive statistics.
        """
        if not domains:
            return self
        self._refuse_progressive("they have no part by domain")
        for name in domains:
            if name not in self.tokens:
                raise UserError(f"the statistics have no domain {name!r}", f"there are: {', '.join(self.domains)}")
        header = json.loads(json.dumps(self.header))
        for key in ("tokens", "sequences", "sequence_lengths", "packed"):
            header["data"][key] = {name: value for name, value in header["data"][key].items() if name in domains}
        layers = {
            number: LayerStatistics(number, {name: entry.domains[name] for name in entry.domains if name in domains})
            for number, entry in self.layers.items()
        }
        return Statistics(header, layers)

    def _refuse_progressive(self, so: str) -> None:
        if PROGRESSIVE in self.header:
            raise UserError(
                f"the statistics are progressive: they follow one choice of experts, made on all of their text, so {so}",
                "calibrate on this text alone, or without --progressive",
            )

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of the union of two calibrations of the same model: sums are added, maxima take the larger, sequences are joined.

        Raises:
            UserError: the two are of different models or layers, or progressive.
        """
        if self.header["model"]["fingerprint"] != other.header["model"]["fingerprint"] or set(self.layers) != set(other.layers):
            raise UserError("the two statistics are from different models")
        for part in (self, other):
            part._refuse_progressive("they cannot be added")
        data: dict[str, dict[str, Any]] = {}
        for key in ("tokens", "sequences", "sequence_lengths", "packed"):
            mine, theirs = self.header["data"][key], other.header["data"][key]
            data[key] = {name: _plus(mine.get(name), theirs.get(name)) for name in sorted({*mine, *theirs})}
        fingerprints = sorted((self.header["data"]["fingerprint"], other.header["data"]["fingerprint"]))
        header = {**self.header, "data": {**data, "fingerprint": "+".join(fingerprints)}}
        layers = {}
        for number, entry in self.layers.items():
            theirs_by_domain = other.layers[number].domains
            domains = {}
            for name in sorted({*entry.domains, *theirs_by_domain}):
                a, b = entry.domains.get(name), theirs_by_domain.get(name)
                domains[name] = {key: combine(key, a[key], b[key]) for key in a if key in b} if a and b else dict(a or b or {})
            layers[number] = LayerStatistics(number, domains)
        return Statistics(header, layers)


def combine(name: str, a: Array, b: Array) -> Array:
    """Combine two parts of one statistic."""
    if name in MAXIMA:
        return np.maximum(a, b)
    if name in JOINED:
        return np.concatenate((a, b))
    return a + b


def _plus(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    return (a or b) if isinstance(a, bool) else a + b


def layer_path(folder: Path, layer: int) -> Path:
    """The file of a layer."""
    return folder / f"layer_{layer:03d}.safetensors"


def save_layer(folder: Path, layer: int, domains: Mapping[str, Mapping[str, Array]]) -> None:
    """Write one layer under a temporary name and rename it, so that an existing file is complete."""
    target = layer_path(folder, layer)
    partial = target.with_name(target.name + ".partial")
    flat = {
        f"{domain}/{name}": np.ascontiguousarray(value)
        for domain, entry in sorted(domains.items())
        for name, value in sorted(entry.items())
    }
    try:
        save_file(flat, partial)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{target} could not be written: {error}", "free some space and run the same command again to resume"
        ) from None
    partial.replace(target)


def save_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Write `stats.json` under a temporary name and rename it."""
    partial = folder / "stats.json.partial"
    partial.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "stats.json")


def load_header(folder: Path) -> dict[str, Any]:
    """The header of a statistics folder.

    Raises:
        UserError: no statistics, another format or version, or damaged.
    """
    try:
        header = parse_json((folder / "stats.json").read_bytes(), str(folder / "stats.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no statistics found in {folder} (no stats.json)",
            "make them with `expertsmith calibrate MODEL --data … -o STATS`",
        ) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise UserError(f"{folder / 'stats.json'} is not {FORMAT} version {VERSION}", "calibrate again with this version")
    wrong = next((name for name, right in _rules(header) if not right), None)
    if wrong is not None:
        raise UserError(f"{folder / 'stats.json'} is damaged: {wrong} is not what it has to be", "calibrate again")
    return header


def _rules(header: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield (key in a header, whether its value is valid)."""

    def whole(value: Any) -> bool:
        return type(value) is int and value >= 0

    model, data, layers = header.get("model"), header.get("data"), header.get("layers")
    yield "model.fingerprint", isinstance(model, dict) and isinstance(model.get("fingerprint"), str)
    yield "layers", isinstance(layers, list) and bool(layers) and all(map(whole, layers)) and len({*layers}) == len(layers)
    yield "data.fingerprint", isinstance(data, dict) and isinstance(data.get("fingerprint"), str)
    kinds: dict[str, Callable[[Any], bool]] = {
        "tokens": whole,
        "sequences": whole,
        "sequence_lengths": lambda held: isinstance(held, list) and all(map(whole, held)),
        "packed": lambda held: isinstance(held, bool),
    }
    for key, right in kinds.items():
        held = data.get(key) if isinstance(data, dict) else None
        yield f"data.{key}", isinstance(held, dict) and bool(held) and all(map(right, held.values()))
    follows = header.get(PROGRESSIVE, {"method": "", "options": {}, "keep": 1})
    named = isinstance(follows, dict) and isinstance(follows.get("method"), str) and isinstance(follows.get("options"), dict)
    yield PROGRESSIVE, named and type(follows.get("keep")) in (int, float)
    yield "data", isinstance(data, dict) and len({frozenset(data[key]) for key in kinds}) == 1


def load_layer(folder: Path, layer: int, names: Iterable[str] | None = None) -> LayerStatistics:
    """Read one layer; with `names` only these statistics."""
    domains: dict[str, dict[str, Array]] = {}
    try:
        flat = load_file(layer_path(folder, layer))
    except FileNotFoundError:
        raise UserError(
            f"{layer_path(folder, layer)} is missing", "run `expertsmith calibrate` again with the same options to resume"
        ) from None
    except Exception as error:  # safetensors raises its own error class for a damaged file
        raise UserError(
            f"{layer_path(folder, layer)} is damaged: {error}", "delete it and calibrate again; only that layer is recomputed"
        ) from None
    wanted = None if names is None else set(names)
    for key, value in flat.items():
        domain, _, name = key.rpartition("/")
        if wanted is None or name in wanted:
            domains.setdefault(domain, {})[name] = value
    return LayerStatistics(layer, domains)


def load_statistics(folder: Path | str) -> Statistics:
    """Read a finished statistics folder.

    Raises:
        UserError: there are none, or the calibration was interrupted.
    """
    root = Path(folder)
    header = load_header(root)
    layers = {layer: load_layer(root, layer) for layer in header["layers"] if layer_path(root, layer).exists()}
    absent = [layer for layer in header["layers"] if layer not in layers]
    if absent:
        raise UserError(
            f"the calibration in {root} is not finished: layer {absent[0]} is missing",
            "run `expertsmith calibrate` again with the same options to resume",
        )
    return Statistics(header, layers)
