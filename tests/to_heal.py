"""What the tests of healing share: short texts as token ids, and experts of one hidden layer."""

from __future__ import annotations

import json
from pathlib import Path

import torch


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
