"""Memory that is used again: freed blocks are kept while batches pass, and batches are small enough on a CPU."""

from __future__ import annotations

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from expertsmith.arch import families
from expertsmith.engine.loading import BUFFER, LoadedModel

FAULTS = """
import contextlib, resource, sys, torch
from expertsmith.engine.pages import kept_pages
torch.set_num_threads(1)
def work():
    a = torch.ones(2**21)  # 8 MB
    b = [torch.ones(2**21) for _ in range(12)]  # above the free memory that glibc keeps by itself
    return a
work()
with kept_pages() if sys.argv[1] == "kept" else contextlib.nullcontext():
    work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        work()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_blocks_are_used_again():
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("usual", "kept")
    }
    assert faults["kept"] < 0.01 * faults["usual"]


@pytest.mark.parametrize(
    ("experts", "top_k", "width", "hidden", "expected"),
    [
        (64, 8, 128, 512, 1024),  # 1024 * 8 * 512 * 4 bytes = 16 MB
        (128, 8, 768, 2048, 2048),  # 128 tokens for each of 128 experts
        (8, 2, 32, 32, 8192),
        (4, 1, 4096, 16384, 512),
    ],
)
def test_tokens_of_a_batch(experts, top_k, width, hidden, expected):
    config = {"num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width, "hidden_size": hidden}
    model = SimpleNamespace(
        device=torch.device("cpu"), architecture=families()["qwen3_moe"], checkpoint=SimpleNamespace(config=config)
    )
    found = LoadedModel.batch_tokens(model, None)
    assert found == expected
    assert found * top_k * max(hidden, 2 * width) * 4 <= BUFFER or found <= max(512, 128 * experts // top_k)
    assert LoadedModel.batch_tokens(model, 100) == 100
    model.device = torch.device("cuda")
    assert LoadedModel.batch_tokens(model, None) == 8192
