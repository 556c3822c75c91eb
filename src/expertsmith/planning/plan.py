"""The plan: the kept experts, layer by layer. Small, readable, diffable JSON that people review before it is applied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PrivateAttr, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.numpy import save as save_bytes

from expertsmith.errors import UserError, parse_json
from expertsmith.views.notebook import Shown

FORMAT = "expertsmith.plan"
CONSTANTS = ".constants.safetensors"
NEURONS = ".neurons.safetensors"
Array = np.ndarray[Any, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Method(_Strict):
    """The method that chose the experts, with every option that the choice depends on."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Source(_Strict):
    """The checkpoint that the plan was made for."""

    model_type: str
    fingerprint: str


class CalibrationData(_Strict):
    """The calibration data of the choice: the fingerprint of the token ids, and tokens per domain."""

    fingerprint: str
    tokens: dict[str, int]


class Merge(_Strict):
    """Experts `sources` become one, which replaces `into`: their matrices are averaged with `weights`.

    `align` "weights" puts every source's neurons into the order that best fits those of `into` before averaging. `router`: the
    merged expert's router row is that of `into` ("dominant") or the sources' rows averaged with `weights` ("mean"); `log_count`
    adds ln(number of sources) to its logit bias.
    """

    into: int
    sources: list[int] = Field(alias="from")
    weights: list[FiniteFloat]
    align: Literal["none", "weights"] = "none"
    router: Literal["dominant", "mean"] = "dominant"
    log_count: bool = False


class Novices(_Strict):
    """Experts that become constants: the router still selects them, and each returns its row of the constants [experts, width]. These are
    not in the JSON, but in a file next to it; `sha256` is of their bytes (float32, little-endian)."""

    experts: list[int]
    width: int = Field(ge=1)
    sha256: str

    def holds(self, values: Array) -> bool:
        """Whether these are the constants."""
        return values.shape == (len(self.experts), self.width) and digest(values) == self.sha256


class Neurons(_Strict):
    """Experts that lose neurons: of `width` neurons each, expert j keeps `counts[j]`. Their numbers (ascending, expert after expert) are not
    in the JSON, but in a file next to it; `sha256` is of their bytes (int32, little-endian)."""

    width: int = Field(ge=1)
    counts: list[int]
    sha256: str

    @property
    def total(self) -> int:
        """Neurons that stay, of all experts."""
        return sum(self.counts)

    def holds(self, values: Array) -> bool:
        """Whether these are the numbers of the neurons."""
        return values.shape == (self.total,) and digest_ids(values) == self.sha256


class LayerPlan(_Strict):
    """One decoder layer, or with `mtp` one multi-token-prediction layer, numbered after the last decoder layer. Expert ids are those of the
    source checkpoint; `keep` is ascending."""

    layer: int = Field(ge=0)
    num_experts: int = Field(ge=1)
    mtp: Literal[True] | None = None
    keep: list[int]
    saliency: list[FiniteFloat] | None = None
    merge: list[Merge] = Field(default_factory=list)
    novices: Novices | None = None
    neurons: Neurons | None = None
    skip_threshold: FiniteFloat | None = None
    why: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _ids(self) -> LayerPlan:
        where = f"layer {self.layer}"
        if not self.keep:
            raise ValueError(f"{where}: keep is empty; keep at least one expert")
        if len(set(self.keep)) != len(self.keep):
            twice = sorted({e for e in self.keep if self.keep.count(e) > 1})
            raise ValueError(f"{where}: keep names expert {twice[0]} twice")
        outside = [e for e in self.keep if not 0 <= e < self.num_experts]
        if outside:
            raise ValueError(f"{where}: keep names expert {outside[0]}, but the ids run from 0 to {self.num_experts - 1}")
        if self.keep != sorted(self.keep):
            raise ValueError(f"{where}: keep is not in ascending order")
        if self.saliency is not None and len(self.saliency) != self.num_experts:
            raise ValueError(f"{where}: saliency has {len(self.saliency)} numbers for {self.num_experts} experts")
        self._check_merges(where)
        if self.novices is not None:
            self._check_novices(self.novices.experts, where)
        if self.neurons is not None:
            self._check_neurons(self.neurons, where)
        if self.skip_threshold is not None and self.skip_threshold < 0:
            raise ValueError(f"{where}: skip_threshold is {self.skip_threshold}, but it must be a ratio of routing weights")
        return self

    def _check_novices(self, experts: list[int], where: str) -> None:
        gone = sorted(set(range(self.num_experts)) - set(self.keep))
        if experts != gone:
            raise ValueError(f"{where}: novices lists experts {experts}, but the experts that are not kept are {gone}")
        if not experts:
            raise ValueError(f"{where}: novices is empty, although all experts are kept")
        if self.merge or self.mtp:
            raise ValueError(
                f"{where}: novices cannot be combined with {'merged experts' if self.merge else 'multi-token prediction'}"
            )

    def _check_neurons(self, held: Neurons, where: str) -> None:
        if len(self.keep) < self.num_experts or self.merge:
            raise ValueError(f"{where}: neurons can be removed only if all experts are kept and none is merged")
        if len(held.counts) != self.num_experts:
            raise ValueError(f"{where}: neurons has {len(held.counts)} counts for {self.num_experts} experts")
        wrong = next((count for count in held.counts if not 1 <= count <= held.width), None)
        if wrong is not None:
            raise ValueError(f"{where}: neurons keeps {wrong} of {held.width} neurons of an expert; keep at least one")

    def _check_merges(self, where: str) -> None:
        for merge in self.merge:
            if len(merge.sources) != len(merge.weights):
                raise ValueError(
                    f"{where}: merge into {merge.into} has {len(merge.sources)} experts and {len(merge.weights)} weights"
                )
            if merge.into not in self.keep:
                raise ValueError(f"{where}: merge into {merge.into}, which is not a kept expert")
            if not merge.sources or len(set(merge.sources)) != len(merge.sources):
                raise ValueError(f"{where}: merge into {merge.into} must list experts, each once, but lists {merge.sources}")
            outside = [e for e in merge.sources if not 0 <= e < self.num_experts]
            if outside:
                raise ValueError(
                    f"{where}: merge into {merge.into} names expert {outside[0]}, but the ids run from 0 to {self.num_experts - 1}"
                )
            if merge.into not in merge.sources:
                raise ValueError(
                    f"{where}: merge into {merge.into} does not name that expert among its sources {merge.sources}"
                )
            kept = [e for e in merge.sources if e in self.keep and e != merge.into]
            if kept:
                raise ValueError(f"{where}: expert {kept[0]} is merged into {merge.into}, so it cannot be kept as well")
            if min(merge.weights) < 0 or sum(merge.weights) <= 0:
                raise ValueError(f"{where}: merge into {merge.into} has weights {merge.weights}, but they must be shares")
        merged = [e for merge in self.merge for e in merge.sources]
        if len(set(merged)) != len(merged):
            again = next(e for e in merged if merged.count(e) > 1)
            raise ValueError(f"{where}: expert {again} is merged twice")


class Skip(_Strict):
    """How tokens skip experts: `rule` "ratio" or "tail" (`engine.skipping`), and the statistic and calibration data of the layers'
    `skip_threshold`."""

    rule: Literal["ratio", "tail"]
    statistic: str
    calibration: CalibrationData


class Summary(_Strict):
    """[before, after] of routed experts over all layers, parameters and bytes of the checkpoint."""

    experts: tuple[int, int]
    parameters: tuple[int, int]
    bytes: tuple[int, int]


class Plan(Shown, _Strict):
    """A whole plan. `router_groups` "flatten" sets n_group and topk_group to 1 in the output's config. `notes`: remarks for the user.
    `mtp`: whether the output has the source's multi-token prediction; its layers are then in `layers`, numbered after the last decoder
    layer. None: the source has none, or the plan is of an old version, which removed it if experts were dropped."""

    format: Literal["expertsmith.plan"] = "expertsmith.plan"
    version: Literal[1] = 1
    method: Method
    model: Source
    calibration: CalibrationData | None = None
    router_groups: Literal["keep", "flatten"] = "keep"
    mtp: Literal["keep", "drop"] | None = None
    skip: Skip | None = None
    layers: list[LayerPlan]
    summary: Summary | None = None
    notes: list[str] = Field(default_factory=list)
    _constants: dict[int, bytes] = PrivateAttr(default_factory=dict)  # not arrays, which have no single answer to ==
    _neurons: dict[int, bytes] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _layers(self) -> Plan:
        numbers = [entry.layer for entry in self.layers]
        if not numbers:
            raise ValueError("layers is empty")
        if numbers != sorted(set(numbers)):
            raise ValueError(f"layers must be ascending without repetition, but is {numbers}")
        without = next((entry.layer for entry in self.layers if entry.skip_threshold is not None), None)
        if without is not None and self.skip is None:
            raise ValueError(f"layer {without} has a skip_threshold, but the plan has no skip rule")
        ahead = next((entry.layer for entry in self.layers if entry.mtp), None)
        if ahead is not None and (self.mtp != "keep" or not all(entry.mtp for entry in self.layers if entry.layer >= ahead)):
            raise ValueError(
                f"layer {ahead} is for multi-token prediction, which must follow the decoder layers in a plan that keeps it"
            )
        if self.skip is not None and without is None:
            raise ValueError(f"the plan has the skip rule {self.skip.rule}, but no layer has a skip_threshold")
        self._check_all_novices()
        self._check_all_neurons()
        return self

    def _check_all_neurons(self) -> None:
        if not self.neurons:
            return
        other = next((e.layer for e in self.layers if e.novices is not None or len(e.keep) < e.num_experts), None)
        if other is not None:
            raise ValueError(f"layer {other} removes experts, but other layers remove neurons: use one of both in all layers")
        if self.skip is not None or self.router_groups == "flatten":
            what = "a skip rule" if self.skip is not None else 'router_groups "flatten"'
            raise ValueError(f"the plan removes neurons and has {what}, but then the router stays unchanged")

    def _check_all_novices(self) -> None:
        if not self.novices:
            return
        removing = next((e.layer for e in self.layers if e.novices is None and len(e.keep) < e.num_experts), None)
        if removing is not None:
            raise ValueError(f"layer {removing} removes experts, but other layers have novices: use one of both in all layers")
        if self.skip is not None or self.router_groups == "flatten":
            what = "a skip rule" if self.skip is not None else 'router_groups "flatten"'
            raise ValueError(f"the plan has novices and {what}, but with novices the router stays unchanged")

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": entry.layer,
                "kept": len(entry.keep),
                "experts": entry.num_experts,
                "kept experts": ", ".join(map(str, entry.keep)),
                **({"kept neurons": entry.neurons.total} if entry.neurons else {}),
            }
            for entry in self.layers
        ]

    def _line(self) -> str:
        if self.neurons:
            left = sum(held.total for held in self.neurons.values())
            had = sum(held.width * len(held.counts) for held in self.neurons.values())
            return f"{self.method.name} keeps {left:,} of {had:,} neurons in the experts of {len(self.neurons)} layers of {self.model.model_type}"
        kept, experts = sum(len(entry.keep) for entry in self.layers), sum(entry.num_experts for entry in self.layers)
        return (
            f"{self.method.name} keeps {kept:,} of {experts:,} experts in {len(self.layers)} layers of {self.model.model_type}"
        )

    @property
    def thresholds(self) -> dict[int, float]:
        """Decoder layer → skip threshold, of the layers that have one."""
        return {entry.layer: entry.skip_threshold for entry in self.layers if entry.skip_threshold is not None}

    @property
    def merges(self) -> bool:
        """Whether any experts are merged."""
        return any(entry.merge for entry in self.layers)

    @property
    def novices(self) -> dict[int, Novices]:
        """Decoder layer → its experts that become constants, of the layers that have any."""
        return {entry.layer: entry.novices for entry in self.layers if entry.novices is not None}

    @property
    def neurons(self) -> dict[int, Neurons]:
        """Layer → the neurons that its experts keep, of the layers whose experts lose any."""
        return {entry.layer: entry.neurons for entry in self.layers if entry.neurons is not None}

    @property
    def one_width(self) -> int | None:
        """The number of neurons that every expert of every layer keeps; None if they differ, or none is removed."""
        found = {count for held in self.neurons.values() for count in held.counts}
        return found.pop() if len(found) == 1 and len(self.neurons) == len(self.layers) else None

    @property
    def masks(self) -> dict[int, list[int]]:
        """Decoder layer → experts that the router may still select: `kept`, or with novices all."""
        return {entry.layer: list(range(entry.num_experts)) for entry in self.layers} if self.novices else self.kept

    @property
    def held_constants(self) -> set[int]:
        """Layers whose constants are loaded."""
        return set(self._constants)

    def constants(self, layer: int) -> Array:
        """The constants [novices, width] of a layer, float32.

        Raises:
            UserError: they are not next to the plan.
        """
        if layer not in self._constants:
            raise UserError(
                f"the plan makes experts of layer {layer} constants, but their values are missing",
                f"keep the file NAME{CONSTANTS} next to the plan NAME.json",
            )
        held: Array = np.frombuffer(self._constants[layer], dtype="<f4").reshape(-1, self.novices[layer].width)
        return held

    def with_constants(self, found: Mapping[int, Array], where: str) -> Plan:
        """The same plan with the constants of its layers; checked against it.

        Raises:
            UserError: constants of another shape or other values than the plan names.
        """
        for layer, entry in self.novices.items():
            values = found.get(layer)
            if values is None or not entry.holds(values):
                raise UserError(
                    f"{where}: the constants of layer {layer} are not those of the plan",
                    "make the plan again, or restore the file",
                )
        made = self.model_copy()
        made._constants = {layer: np.ascontiguousarray(found[layer], dtype="<f4").tobytes() for layer in self.novices}
        return made

    def kept_neurons(self, layer: int) -> list[Array]:
        """The numbers of the neurons that each expert of a layer keeps, ascending.

        Raises:
            UserError: they are not next to the plan.
        """
        if layer not in self._neurons:
            raise UserError(
                f"the plan removes neurons in layer {layer}, but does not say which",
                f"keep the file NAME{NEURONS} next to the plan NAME.json",
            )
        ids = np.frombuffer(self._neurons[layer], dtype="<i4")
        return np.split(ids, np.cumsum(self.neurons[layer].counts)[:-1])

    def with_neurons(self, found: Mapping[int, Array], where: str) -> Plan:
        """The same plan with the numbers of the neurons that its experts keep; checked against it.

        Raises:
            UserError: other numbers than the plan names, or numbers that are not ascending or do not exist.
        """
        made = self.model_copy()
        for layer, entry in self.neurons.items():
            values = found.get(layer)
            if values is None or not entry.holds(values):
                raise UserError(
                    f"{where}: the neurons of layer {layer} are not those of the plan",
                    "make the plan again, or restore the file",
                )
            for expert, ids in enumerate(np.split(values, np.cumsum(entry.counts)[:-1])):
                if ids[0] < 0 or ids[-1] >= entry.width or (np.diff(ids) < 1).any():
                    raise UserError(
                        f"{where}: the neurons of layer {layer}, expert {expert}, must be ascending numbers below {entry.width}"
                    )
        made._neurons = {layer: np.ascontiguousarray(found[layer], dtype="<i4").tobytes() for layer in self.neurons}
        return made

    def neuron_bytes(self) -> bytes:
        """The file of the neurons' numbers, which belongs next to the plan."""
        arrays = {str(layer): np.concatenate(self.kept_neurons(layer)) for layer in self.neurons}
        return bytes(save_bytes(arrays))

    @property
    def kept(self) -> dict[int, list[int]]:
        """Decoder layer → kept expert ids."""
        return {entry.layer: entry.keep for entry in self.layers}

    @property
    def counts(self) -> list[int]:
        """Kept experts of every decoder layer."""
        return [len(entry.keep) for entry in self.layers if not entry.mtp]

    @property
    def uniform_count(self) -> int | None:
        """The number of experts every decoder layer keeps, or None if layers differ."""
        return self.counts[0] if len(set(self.counts)) == 1 else None

    def of_decoder_layers(self) -> Plan:
        """The plan without multi-token prediction."""
        return self.model_copy(update={"layers": [entry for entry in self.layers if not entry.mtp]})

    def save(self, path: Path | str) -> None:
        """Write the plan, with the fewest digits of floats that read back equal, and one line for each layer."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        if self.novices:
            beside = constants_file(target)
            half = beside.with_name(beside.name + ".partial")
            save_file({str(layer): self.constants(layer) for layer in self.novices}, half)
            half.replace(beside)
        if self.neurons:
            beside = neurons_file(target)
            half = beside.with_name(beside.name + ".partial")
            half.write_bytes(self.neuron_bytes())
            half.replace(beside)
        partial.write_text(self.dumps(), encoding="utf-8")
        partial.replace(target)

    def to_json(self) -> dict[str, Any]:
        """Plain data with the key names of the file; missing values are left out."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return data if self.notes else {key: value for key, value in data.items() if key != "notes"}

    def dumps(self) -> str:
        """The JSON text: a line a layer, keys in a fixed order, so that plans can be diffed."""
        data = self.to_json()
        layers = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in data.pop("layers"))
        summary, notes = data.pop("summary", None), data.pop("notes", None)
        head = ",\n".join(f' "{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in data.items())
        tail = f',\n "summary": {json.dumps(summary)}' if summary else ""
        tail += f',\n "notes": {json.dumps(notes, ensure_ascii=False)}' if notes else ""
        return "{\n" + head + ',\n "layers": [\n' + layers + "\n ]" + tail + "\n}\n"


def load_plan(path: Path | str | Plan) -> Plan:
    """Read and validate a plan. A plan that is already loaded is returned unchanged.

    Raises:
        UserError: no such file, not JSON, or a violation of the format, with its place.
    """
    if isinstance(path, Plan):
        return path
    try:
        raw = parse_json(Path(path).read_bytes(), str(path))
    except FileNotFoundError:
        raise UserError(f"no plan found at {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a plan", "give the plan.json file") from None
    made = parse_plan(raw, str(path))
    beside = neurons_file(Path(path)) if made.neurons else constants_file(Path(path))
    if not (made.novices or made.neurons) or not beside.is_file():
        return made
    try:
        found = {int(layer): values for layer, values in load_file(beside).items()}
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{beside} cannot be read: {error}", "make the plan again") from None
    return made.with_neurons(found, str(beside)) if made.neurons else made.with_constants(found, str(beside))


def constants_file(plan: Path) -> Path:
    """The file of a plan's constants: plan.json → plan.constants.safetensors."""
    return plan.with_name(plan.name.removesuffix(".json") + CONSTANTS)


def neurons_file(plan: Path) -> Path:
    """The file of the neurons that a plan keeps: plan.json → plan.neurons.safetensors."""
    return plan.with_name(plan.name.removesuffix(".json") + NEURONS)


def digest_ids(values: Array) -> str:
    """SHA-256 of numbers of neurons, as int32 in little-endian order."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<i4").tobytes()).hexdigest()


def digest(values: Array) -> str:
    """SHA-256 of constants, as float32 in little-endian order."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").tobytes()).hexdigest()


def parse_plan(raw: Any, where: str) -> Plan:
    """Validate a plan that was read from JSON; `where` names it in errors."""
    if not isinstance(raw, Mapping) or raw.get("format") != FORMAT:
        raise UserError(f'{where} is not an expertsmith plan (its "format" is not {FORMAT!r})')
    try:
        return Plan.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: " + explain(error)) from None


def explain(error: ValidationError, limit: int = 3) -> str:
    """pydantic's errors in one line, each with its place."""
    found = []
    for item in error.errors()[:limit]:
        place = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        found.append(f"{place}: {message}" if place else message)
    rest = error.error_count() - limit
    return "; ".join(found) + (f"; and {rest} more" if rest > 0 else "")
