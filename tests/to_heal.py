"""What the tests of healing share: short texts as token ids, experts of one hidden layer, the options of each method, and comparisons of checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from conftest import DEVICE
from expertsmith.checkpoint import open_checkpoint
from expertsmith.experts.inventory import take_inventory
from expertsmith.experts.weights import layout_of

CORE = ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "dbrx", "llama4_text", "longcat_flash", "gemma4_text"]
SHAPE = {"seq_len": 24, "pack": False, "batch_tokens": 300, "device": DEVICE}
METHODS = {
    "least_squares": {},
    "layer_local": {"steps": 4, "step_tokens": 64},
    "router": {"step_tokens": 64, "learning_rate": 0.003, "epochs": 3},
    "lora": {"step_tokens": 64, "rank": 4, "epochs": 2},
}


def write_texts(folder: Path, *domains: str) -> list[str]:
    """Twelve sequences of 14 to 24 tokens a domain, other ones in each; returns what --data takes."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for domain in domains:
        rows = [torch.randint(3, 120, (24 - 5 * (i % 3),), generator=generator).tolist() for i in range(12)]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        made.append(f"{domain}={folder / f'{domain}.jsonl'}")
    return made


class RandomExperts:
    """Experts with 4 inputs, 5 neurons and 3 outputs: phi = w relu(up x)."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.count = count
        self.up = torch.randn(count, 5, 4, generator=generator)
        self.start = torch.randn(count, 3, 5, generator=generator)

    def features(self, routed, expert, rows, slots):
        return (routed.x[rows] @ self.up[expert].T).relu() * routed.weight[rows, slots, None]

    def down(self, expert):
        return self.start[expert].double()


def same_tensors(a, b) -> bool:
    return not differing(a, b)


def differing(a, b) -> list[str]:
    """Names of tensors with other bytes; names, dtypes and shapes have to be the same."""
    mine, theirs = open_checkpoint(a), open_checkpoint(b)
    assert {n: (i.dtype, i.shape) for n, i in mine.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in theirs.tensors.items()
    }
    return [name for name in mine.tensors if not torch.equal(mine.read(name), theirs.read(name))]


def shaken(model, out, amount: float = 0.2) -> Path:
    """The same model with noise on the down projections of its routed experts."""
    inventory = take_inventory(open_checkpoint(model))
    shutil.copytree(model, out)
    generator = torch.Generator().manual_seed(5)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for claim in inventory.claims:
            if claim.routed and layout_of(claim, inventory) in ("down", "down_t") and claim.info.name in tensors:
                old = tensors[claim.info.name]
                tensors[claim.info.name] = old + amount * old.std() * torch.randn(old.shape, generator=generator)
        save_file(tensors, file, metadata={"format": "pt"})
    return out
