"""How close `apply` and the byte half of `verify` come to the disk.

A generated bfloat16 checkpoint is copied with all experts kept: `apply` (NaN check included) beside `cp`, and the byte comparison of
`verify` beside `cmp`, in turns, on the same files. Targets: `apply` at least 0.8 times as fast as `cp`, the comparison at least 0.7 times as
fast as `cmp`. Put the work folder on a tmpfs to measure the program and not the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from expertsmith import api
from expertsmith.checkpoint import open_checkpoint
from expertsmith.experts.inventory import take_inventory
from expertsmith.surgery.verify import compare_bytes


def checkpoint(folder: Path, gigabytes: float, experts: int = 8, hidden: int = 2048, width: int = 4096) -> None:
    """A Mixtral-shaped checkpoint of about `gigabytes`, one shard a decoder layer."""
    folder.mkdir(parents=True)
    size = 2 * experts * 3 * hidden * width
    layers = max(1, round(gigabytes * 1e9 / size))
    config = {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 128, "num_local_experts": experts, "num_experts_per_tok": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    index = {}
    block = torch.randn(width, hidden, dtype=torch.bfloat16)
    for layer in range(layers):
        prefix = f"model.layers.{layer}.block_sparse_moe."
        tensors = {f"{prefix}gate.weight": torch.randn(experts, hidden, dtype=torch.bfloat16)}
        for expert in range(experts):
            tensors |= {f"{prefix}experts.{expert}.w{part}.weight": block.clone() for part in (1, 3)}
            tensors[f"{prefix}experts.{expert}.w2.weight"] = block.T.contiguous()
        name = f"model-{layer:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def compare_files(pairs: list[tuple[Path, Path]]) -> None:
    """`cmp` of files that are the same."""
    for one, other in pairs:
        subprocess.run(["cmp", one, other], check=True)


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm") if Path("/dev/shm").is_dir() else None)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.work) as root:
        source, out, copied = Path(root) / "source", Path(root) / "out", Path(root) / "copied"
        checkpoint(source, asked.gigabytes)
        inventory = take_inventory(open_checkpoint(source))
        plan = api.plan(inventory, "random", inventory.num_experts)
        files = sorted(source.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        took: dict[str, list[float]] = {"apply": [], "cp": [], "compare": [], "cmp": []}
        for _ in range(asked.rounds):
            shutil.rmtree(copied, ignore_errors=True)
            took["cp"].append(seconds(partial(subprocess.run, ["cp", "-r", source, copied], check=True)))
            took["cmp"].append(seconds(partial(compare_files, [(file, copied / file.name) for file in files])))
            shutil.rmtree(copied)
            shutil.rmtree(out, ignore_errors=True)
            took["apply"].append(seconds(partial(api.apply, inventory, plan, out)))
            took["compare"].append(seconds(partial(compare_bytes, plan, inventory, open_checkpoint(out))))
        rate = {name: size / statistics.median(values) / 1e9 for name, values in took.items()}
        for mine, theirs, target in (("apply", "cp", 0.8), ("compare", "cmp", 0.7)):
            ratio = statistics.median(b / a for a, b in zip(took[mine], took[theirs], strict=True))
            verdict = "ok" if ratio >= target else "MISSED"
            print(
                f"{mine:8} {rate[mine]:.2f} GB/s, {theirs} {rate[theirs]:.2f} GB/s: {ratio:.2f} × (target ≥ {target}) {verdict}"
            )


if __name__ == "__main__":
    main()
