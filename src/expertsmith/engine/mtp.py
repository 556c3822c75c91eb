"""Multi-token prediction: one more decoder layer, whose input is made from the next token's embedding and the last layer's output.

    x_i = W [embedding_norm(e(t_{i+1})); hidden_norm(final_norm(h_i))],   h'_i = layer(x)_i

with h the output of the last decoder layer, e the embedding and t the tokens, at the positions i of the trunk (DeepSeek-V3, section 2.2;
GLM-4.5; Qwen3-Next). Its decoder layer has the model's own class: a config with one more layer builds it, and it is streamed and masked
like the others. Before it are only three small weights. transformers' own `MtpModel` drafts tokens for one sequence, and gives the same
layer outputs (tests/engine/test_mtp.py). A position without a next token (the last of a sequence) does not count.

vLLM sets the embedding at position 0 to zero. The papers and transformers do not, and neither does this module.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from expertsmith.checkpoint import Checkpoint
from expertsmith.experts.inventory import Inventory

PARTS = ("embedding_norm", "hidden_norm", "projection")
LAYOUTS: tuple[Mapping[str, str], ...] = (  # endings of the parts' names, below "layers.N." or "mtp."
    {  # DeepSeek-V3, GLM-4.5 and similar
        "embedding_norm": "enorm.weight",
        "hidden_norm": "hnorm.weight",
        "projection": "eh_proj.weight",
        "embedding": "embed_tokens.weight",
    },
    {  # Qwen3-Next, Qwen3.5
        "embedding_norm": "pre_fc_norm_embedding.weight",
        "hidden_norm": "pre_fc_norm_hidden.weight",
        "projection": "fc.weight",
        "embedding": "embed_tokens.weight",
    },
)
OUTSIDE = ("shared_head.", "norm.weight", "lm_head.")  # turn the layer's output into tokens: not needed for its experts
LONGER = {"layer_types": "full_attention", "mlp_layer_types": "sparse"}  # lists of a config, one entry a decoder layer


def parts_of(inventory: Inventory) -> dict[str, str]:
    """Part → tensor name, for the parts before the multi-token-prediction layer; empty if the names are unknown."""
    names = [claim.info.name for claim in inventory.claims if claim.mtp]
    for layout in LAYOUTS:
        found = {part: [name for name in names if name.endswith("." + end)] for part, end in layout.items()}
        if all(len(found[part]) == 1 for part in PARTS):
            return {part: held[0] for part, held in found.items() if len(held) == 1}
    return {}


def why_not_played(inventory: Inventory) -> str | None:
    """The reason why the multi-token-prediction layers with experts cannot be run; None if they can, or if there are none."""
    layers = inventory.mtp_layers
    if not layers:
        return None
    if inventory.architecture.no_class:
        return inventory.architecture.no_class
    if len(layers) > 1 or layers != [inventory.num_layers]:
        return f"there are {len(layers)} such layers, but only one, right after the last decoder layer, can be run"
    if not parts_of(inventory):
        return "the tensors before its decoder layer have unknown names"
    if inventory.config.get("mtp_hidden_states_first"):
        return "config.json puts the hidden state before the embedding (mtp_hidden_states_first), which is not supported for layers with experts"
    if inventory.overrides:
        return "config.json gives numbers of experts by decoder layer, but none for this one"
    return None


def lengthen(inner: Any, layers: int) -> None:
    """Add `layers` decoder layers to a transformers text config: with experts, and with the attention that it names for them, or full."""
    depth = inner.num_hidden_layers
    for key, value in LONGER.items():
        held, own = getattr(inner, key, None), getattr(inner, f"mtp_{key}", None)
        if isinstance(held, list) and len(held) == depth:
            setattr(inner, key, held + (list(own) if own and len(own) == layers else [value] * layers))
    inner.num_hidden_layers = depth + layers


def known_names(inventory: Inventory) -> dict[str, str | None]:
    """Tensor of multi-token prediction → its name in a further decoder layer, or None if it does not belong in one."""
    first = next(claim for claim in inventory.claims if claim.layer is not None and not claim.mtp)
    prefix = first.info.name.removesuffix(f"{first.layer}.{first.rest}")
    outside = {*parts_of(inventory).values()}
    return {
        claim.info.name: f"{prefix}{claim.layer}.{claim.rest}"
        if claim.layer in inventory.mtp_layers and claim.info.name not in outside and not claim.rest.startswith(OUTSIDE)
        else None
        for claim in inventory.claims
        if claim.mtp
    }


@dataclass
class Ahead:
    """The parts before the multi-token-prediction layer, with their weights."""

    embedding: Any
    final_norm: Any
    embedding_norm: Any
    hidden_norm: Any
    projection: torch.Tensor  # [hidden, 2 hidden]

    def __call__(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's input [rows, length, hidden] from the token ids and the last decoder layer's output."""
        following = self.embedding(torch.roll(input_ids, -1, dims=1))
        both = torch.cat((self.embedding_norm(following), self.hidden_norm(self.final_norm(hidden))), dim=-1)
        return nn.functional.linear(both, self.projection)


def ahead_of(
    module: Any, layers: str, weights: Checkpoint, inventory: Inventory, device: torch.device, dtype: torch.dtype
) -> Ahead:
    """`Ahead` of a built model whose decoder layers are at `layers`.

    The embedding is the model's own if the checkpoint's copy of it is the same or missing.
    """
    parts = parts_of(inventory)
    final_norm = module.get_submodule(layers.rpartition(".")[0]).norm

    def read(part: str) -> torch.Tensor:
        return weights.read(parts[part]).to(device=device, dtype=dtype)

    def norm(part: str) -> Any:
        made = copy.deepcopy(final_norm)
        made.weight = nn.Parameter(
            weights.read(parts[part]).to(device=device, dtype=final_norm.weight.dtype), requires_grad=False
        )
        return made

    embedding = module.get_input_embeddings()
    if "embedding" in parts and not _same(weights, parts["embedding"], embedding.weight):
        embedding = copy.deepcopy(embedding)
        embedding.weight = nn.Parameter(read("embedding"), requires_grad=False)
    return Ahead(embedding, final_norm, norm("embedding_norm"), norm("hidden_norm"), read("projection"))


def _same(weights: Checkpoint, name: str, held: torch.Tensor, rows: int = 4096) -> bool:
    """Whether a tensor of the checkpoint equals the loaded one, compared in parts."""
    if weights.tensors[name].shape != tuple(held.shape):
        return False
    return all(
        torch.equal(weights.read(name, first, min(first + rows, len(held))).to(held), held[first : first + rows])
        for first in range(0, len(held), rows)
    )


def counted(mask: torch.Tensor) -> torch.Tensor:
    """Whether a position of a batch has a next token [rows, length], bool."""
    following = torch.zeros_like(mask)
    following[:, :-1] = mask[:, 1:]
    return mask & following


def shortened(lengths: Sequence[int]) -> list[int]:
    """The number of tokens with a next one, for each sequence length."""
    return [max(0, length - 1) for length in lengths]
