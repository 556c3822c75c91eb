"""Shared by the benchmarks: checkpoints of a given size, paired timings, child processes with their peak memory.

torch is imported only where a checkpoint is generated, and that runs in a child process: the peak that the kernel reports for a child
begins at what its parent held when it was started, so a parent with torch in it would hide a small child.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

MIB = 2**20
BITS = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """A generated MoE model: every decoder layer is alike, and the small vocabulary leaves almost all bytes to the experts."""

    family: str = (
        "qwen3_moe"  # or mixtral, deepseek_v3 (its first layer is dense, and attention has the proportions of DeepSeek-V3)
    )
    layers: int = 4
    hidden: int = 512
    width: int = 256  # of an expert
    experts: int = 32
    top_k: int = 4
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 1024
    dtype: str = "bfloat16"
    fp8: bool = False  # matrices of the decoder layers, but for the router, in FP8 with a scale for each block of 128 × 128

    @property
    def head_dim(self) -> int:
        """Of one attention head; all heads together are as wide as the model."""
        return self.hidden // self.heads

    @property
    def layer_bytes(self) -> int:
        """Of one decoder layer, norms aside."""
        parts = [prod(shape) for _, shape in self.layer_tensors(self.layers - 1) if len(shape) > 1]
        return int(sum(parts) * (1 + 4 / 128**2 if self.fp8 else BITS[self.dtype]))

    def config(self) -> dict[str, Any]:
        """config.json of the model."""
        made = {
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "head_dim": self.head_dim,
            "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab, "num_experts_per_tok": self.top_k, "hidden_act": "silu",
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
            "dtype": self.dtype, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "model_type": self.family,
        }  # fmt: skip
        if self.fp8:
            made["quantization_config"] = {
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            }  # fmt: skip
        if self.family == "deepseek_v3":
            del made["head_dim"]
            groups = 8 if self.experts % 8 == 0 and self.experts >= 32 else 1
            return {
                **made, "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": self.heads, "n_routed_experts": self.experts,
                "n_shared_experts": 1, "moe_intermediate_size": self.width, "intermediate_size": 9 * self.width, "first_k_dense_replace": 1,
                "n_group": groups, "topk_group": max(1, groups // 2), "norm_topk_prob": True, "routed_scaling_factor": 2.5,
                "scoring_func": "sigmoid", "topk_method": "noaux_tc", **self.latent,
            }  # fmt: skip
        if self.family == "mixtral":
            return {
                **made,
                "architectures": ["MixtralForCausalLM"],
                "num_local_experts": self.experts,
                "intermediate_size": self.width,
            }
        own = {"num_experts": self.experts, "moe_intermediate_size": self.width, "norm_topk_prob": True, "mlp_only_layers": []}
        return {
            **made,
            **own,
            "architectures": ["Qwen3MoeForCausalLM"],
            "intermediate_size": 4 * self.width,
            "decoder_sparse_step": 1,
        }

    @property
    def latent(self) -> dict[str, int]:
        """Sizes of DeepSeek-V3's attention, in its proportions to the model's width."""
        unit = max(8, self.hidden * 128 // 7168 // 8 * 8)
        return {
            "q_lora_rank": 12 * unit, "kv_lora_rank": 4 * unit, "qk_nope_head_dim": unit, "qk_rope_head_dim": max(8, unit // 2), "v_head_dim": unit,
        }  # fmt: skip

    def _deepseek_attention(self, head: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        sizes, h = self.latent, self.hidden
        q, kv, rope = sizes["q_lora_rank"], sizes["kv_lora_rank"], sizes["qk_rope_head_dim"]
        nope, v = sizes["qk_nope_head_dim"], sizes["v_head_dim"]
        yield f"{head}.self_attn.q_a_proj.weight", (q, h)
        yield f"{head}.self_attn.q_a_layernorm.weight", (q,)
        yield f"{head}.self_attn.q_b_proj.weight", (self.heads * (nope + rope), q)
        yield f"{head}.self_attn.kv_a_proj_with_mqa.weight", (kv + rope, h)
        yield f"{head}.self_attn.kv_a_layernorm.weight", (kv,)
        yield f"{head}.self_attn.kv_b_proj.weight", (self.heads * (nope + v), kv)
        yield f"{head}.self_attn.o_proj.weight", (h, self.heads * v)

    def layer_tensors(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of one decoder layer, as the families' published checkpoints have them: one tensor an expert and matrix."""
        head, h, w, q, kv = (
            f"model.layers.{layer}",
            self.hidden,
            self.width,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        yield f"{head}.input_layernorm.weight", (h,)
        yield f"{head}.post_attention_layernorm.weight", (h,)
        if self.family == "deepseek_v3":
            yield from self._deepseek_attention(head)
            parts = {"gate_proj": (w, h), "up_proj": (w, h), "down_proj": (h, w)}
            if layer == 0:
                for name, shape in parts.items():
                    yield f"{head}.mlp.{name}.weight", tuple(9 * n if n == w else n for n in shape)
                return
            yield f"{head}.mlp.gate.weight", (self.experts, h)
            yield f"{head}.mlp.gate.e_score_correction_bias", (self.experts,)
            for owner in ("shared_experts", *(f"experts.{expert}" for expert in range(self.experts))):
                for name, shape in parts.items():
                    yield f"{head}.mlp.{owner}.{name}.weight", shape
            return
        for name, shape in (("q", (q, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, q))):
            yield f"{head}.self_attn.{name}_proj.weight", shape
        if self.family == "mixtral":
            block, parts = "block_sparse_moe", {"w1": (w, h), "w2": (h, w), "w3": (w, h)}
        else:
            block, parts = "mlp", {"gate_proj": (w, h), "down_proj": (h, w), "up_proj": (w, h)}
            yield f"{head}.self_attn.q_norm.weight", (self.head_dim,)
            yield f"{head}.self_attn.k_norm.weight", (self.head_dim,)
        yield f"{head}.{block}.gate.weight", (self.experts, h)
        for expert in range(self.experts):
            for name, shape in parts.items():
                yield f"{head}.{block}.experts.{expert}.{name}.weight", shape

    def outer_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of what lies outside the decoder layers."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)


def generate(folder: Path, shape: Shape, seed: int = 0) -> int:
    """Write a checkpoint, one shard a decoder layer, so that it takes the memory of one layer; returns its bytes of weights.

    Matrices are normal with a variance of 1 / inputs and norms are 1: activations keep their size through any number of layers.
    """
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, shape.dtype)
    groups = [list(shape.outer_tensors()), *(list(shape.layer_tensors(layer)) for layer in range(shape.layers))]
    weight_map, total = {}, 0
    pool: dict[tuple[int, ...], Any] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for key, size in group:
            if shape.fp8 and len(size) == 2 and "layers" in key and not key.endswith("gate.weight"):
                made = fp8_of(size, pool, draw)
                tensors |= {key: made[0], f"{key}_scale_inv": made[1]}
                weight_map |= {key: name, f"{key}_scale_inv": name}
                total += made[0].numel() + 4 * made[1].numel()
                continue
            value = torch.empty(size, dtype=dtype)
            # embeddings of unit size; what leaves a block is small beside the residual stream, as in trained models
            spread = 1.0 if "embed" in key else size[-1] ** -0.5
            tensors[key] = value.fill_(1.0) if len(size) == 1 else value.normal_(0.0, spread, generator=draw)
            weight_map[key] = name
            total += value.numel() * value.element_size()
        save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    return total


def fp8_of(size: tuple[int, ...], pool: dict[tuple[int, ...], Any], draw: Any) -> tuple[Any, Any]:
    """Codes and block scales of a matrix with variance 1 / inputs. Codes of one shape are drawn once and rolled from matrix to matrix, scales differ:
    drawing billions of normal numbers would take longer than what is measured."""
    import torch

    if size not in pool:
        pool[size] = (
            torch.empty(size).normal_(0.0, 80.0, generator=draw).clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        )
    by = int(torch.randint(0, size[0], (1,), generator=draw))
    grid = (-(-size[0] // 128), -(-size[1] // 128))
    scale = (0.5 + torch.rand(grid, generator=draw)) * size[1] ** -0.5 / 80.0
    return torch.roll(pool[size], by, 0).view(torch.float8_e4m3fn), scale


def write_data(file: Path, tokens: int, length: int, vocab: int, seed: int = 0) -> None:
    """Calibration data without a tokenizer: records of random `input_ids`."""
    draw = random.Random(seed)
    rows = [
        json.dumps({"input_ids": [draw.randrange(3, vocab) for _ in range(length)]}) for _ in range(max(1, tokens // length))
    ]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@dataclass(frozen=True)
class Child:
    """A finished child process."""

    code: int
    seconds: float  # wall, with interpreter start and imports
    peak: int  # bytes, resident set at its highest
    report: dict[str, Any]  # what the child printed as its last line, if that was JSON
    tail: str  # last lines of its stderr
    cpu: float = 0.0  # seconds of processor time, which other load on the machine does not change much

    @property
    def died(self) -> str:
        """Why the child failed, for a message."""
        return "" if self.code == 0 else f"exit {self.code}: {self.tail}"


def run_child(command: Sequence[str], env: Mapping[str, str] | None = None, threads: int = 1) -> Child:
    """Run a command to its end. `wait4` gives the peak of this child alone (RUSAGE_CHILDREN is the largest of all so far)."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        **(env or {}),
    }
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=variables)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # an interrupted benchmark leaves no child behind
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace").strip())
    report: dict[str, Any] = {}
    last = texts[0].rsplit("\n", 1)[-1]
    if last.startswith("{"):
        report = json.loads(last)
    tail = " | ".join(texts[1].splitlines()[-3:])[-600:]
    return Child(process.returncode, seconds, usage.ru_maxrss * 1024, report, tail, usage.ru_utime + usage.ru_stime)


def peak_now() -> int:
    """Bytes of this process's resident set at its highest, whatever started it (`ru_maxrss` begins at what the parent held)."""
    return next(
        int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )


def this_script(*arguments: object) -> list[str]:
    """The command that runs the calling benchmark again, for its children."""
    return [sys.executable, os.path.abspath(sys.argv[0]), *map(str, arguments)]


def generate_in_child(folder: Path, shape: Shape) -> int:
    child = run_child([sys.executable, os.path.abspath(__file__), "generate", str(folder), json.dumps(asdict(shape))])
    if child.code:
        raise SystemExit(f"generating {folder} failed: {child.died}")
    return int(child.report["bytes"])


def alternate(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every run once a round, in turn, so that a machine that slows down slows all of them; returns what they returned."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(rounds):
        for name in order if number % 2 == 0 else reversed(order):
            taken[name].append(runs[name]())
    return taken


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def spread(numerator: Sequence[float], denominator: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return f"{min(ratios):.2f} – {max(ratios):.2f}"


@contextmanager
def scratch(parent: Path | None, keep: bool = False) -> Iterator[Path]:
    """A folder for generated files that is gone afterwards, also when the benchmark is terminated: the files are large."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="expertsmith-bench-", dir=parent))
    try:
        yield folder
    finally:
        if keep:
            print(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [list(headers), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    for number, row in enumerate(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def verdict(value: float, limit: float) -> str:
    return "ok" if value <= limit else "OVER"


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate a checkpoint (used by the benchmarks as a child process).")
    parser.add_argument("action", choices=["generate"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("shape", help="JSON of the fields of Shape")
    options = parser.parse_args()
    print(json.dumps({"bytes": generate(options.folder, Shape(**json.loads(options.shape)))}))


if __name__ == "__main__":
    main()
