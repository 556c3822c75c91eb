"""The model card (README.md) of an output checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expertsmith.checkpoint.origin import front_matter, name_of, source_of
from expertsmith.experts.inventory import Inventory
from expertsmith.planning.plan import Plan
from expertsmith.planning.sizes import shared_claims
from expertsmith.surgery.counts import size_after


def _from_to(counts: Sequence[int]) -> str:
    """ "8", or "6 to 12"."""
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def model_card(plan: Plan, inventory: Inventory, notes: Sequence[str] = (), quality: Mapping[str, Any] | None = None) -> str:
    """Markdown: metadata, base model, method, ratio, calibration, sizes, measured quality (or that it was not measured).

    Args:
        quality: `Quality.to_json` with `held_out`.
    """
    source = inventory.checkpoint
    before, after = inventory.size(), size_after(plan, inventory)
    had = _from_to(list(inventory.counts.values()))
    has = _from_to(plan.counts)
    share = f"{has} of {had}"
    options = ", ".join(f"{key}={value}" for key, value in plan.method.options.items())
    if plan.calibration:
        tokens = ", ".join(f"{name} {number:,}" for name, number in plan.calibration.tokens.items())
        calibration = f"{sum(plan.calibration.tokens.values()):,} tokens ({tokens}), data fingerprint `{plan.calibration.fingerprint[:23]}…`"
    else:
        calibration = "none (the method needs no data)"
    stayed = "The kept weights are byte for byte those of the base model."
    if plan.merges:
        stayed = "Merged experts are weighted means of the base model's experts; all other kept weights are byte for byte those of the base model."
    title = f"{name_of(source)} with {share} experts"
    neurons = []
    if plan.neurons:
        had_neurons = _from_to([entry.width for entry in plan.neurons.values()])
        kept_neurons = _from_to([count for entry in plan.neurons.values() for count in entry.counts])
        stayed = "The kept neurons' weights are byte for byte those of the base model."
        if plan.one_width is not None and inventory.architecture.sized_by_width == "shared" and shared_claims(inventory):
            stayed += " Shared experts are filled up with neurons of zeros where their width in config.json needs it."
        title = f"{name_of(source)} with {kept_neurons} of {had_neurons} neurons in each expert"
        neurons = [f"| neurons of an expert | {had_neurons} | {kept_neurons} |"]
    lines = [
        *front_matter(source, ["expertsmith", "mixture-of-experts", "merged" if plan.merges else "pruned"], quality, title),
        "",
        f"# {title}",
        "",
        f"Made by expertsmith from `{source_of(source)}` ({inventory.architecture.title}). {stayed}",
        "",
        "| | base | this |",
        "|---|---|---|",
        f"| routed experts per layer | {had} | {has} |",
        *neurons,
        f"| experts per token (top_k) | {inventory.top_k} | {inventory.top_k} |",
        f"| parameters | {before[0]:,} | {after[0]:,} |",
        f"| bytes | {before[1]:,} | {after[1]:,} |",
        "",
        f"- **Method**: {plan.method.name}" + (f" ({options})" if options else ""),
        f"- **Calibration**: {calibration}",
        f"- **Kept {'neurons' if neurons else 'experts'}, and why**: `expertsmith/plan.json` (ids are those of the base model)",
        f"- **Measured quality**: {quality_line(quality) if quality else 'not measured yet; see `expertsmith evaluate`'}",
        *(f"- **Note**: {note}" for note in notes),
        "",
    ]
    return "\n".join(lines)


def quality_line(quality: Mapping[str, Any], original: str = "base") -> str:
    """A measurement (`Quality.to_json` with `held_out`) as one line of a model card."""
    rows = ", ".join(
        f"{name} {row['perplexity']:.2f} ({original} {row['reference_perplexity']:.2f})"
        for name, row in quality["domains"].items()
    )
    return f"perplexity on {'held-out text' if quality['held_out'] else 'the calibration text itself'}: {rows}"
