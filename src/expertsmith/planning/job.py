"""The inputs of a plan, and what every way of making one asks of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expertsmith.calibration.stats import LayerStatistics, Statistics
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory
from expertsmith.experts.rules import Rules, keep_count
from expertsmith.methods.base import Array, Budget, Facts, Method
from expertsmith.planning.budgets import Search
from expertsmith.planning.plan import CalibrationData
from expertsmith.views.progress import Progress
from expertsmith.views.show import ranges

if TYPE_CHECKING:
    from expertsmith.calibration.data import TokenData
    from expertsmith.engine import LoadedModel


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
    neurons: dict[int, Array] = field(default_factory=dict)  # layer → numbers of the neurons that its experts keep

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

    def statistics_of(self, layer: int) -> LayerStatistics:
        """The statistics of a layer, for a method that reads them."""
        assert self.statistics is not None
        return self.statistics.layers[layer]

    def usage(self, layer: int) -> dict[str, Any] | None:
        """How many tokens each expert got, if there are statistics."""
        return {"selections": self.statistics_of(layer).total("selections").tolist()} if self.statistics else None

    def say(self, said: Sequence[tuple[str, int]]) -> None:
        """Note every text once, with the layers that it is about."""
        for text in dict.fromkeys(text for text, _ in said):
            where = [layer for other, layer in said if other == text]
            self.notes.append(f"{self._place(where)}: {text}")

    def _place(self, layers: list[int]) -> str:
        """ "all layers", "layer 3" or "layers 0–2 5"."""
        if layers == self.inventory.layers:
            return "all layers"
        return f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"


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
