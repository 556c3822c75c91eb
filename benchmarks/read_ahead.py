"""A streamed model whose weights take as long to read as its layers take to compute: what does reading ahead save?

Batches go through a generated model. Reads are slowed down to a rate at which all decoder layers are read in the time of computing them
(`--share` times that). In turns, in one process: computing alone (the model resident), reading alone (every tensor of the decoder layers),
streaming, and streaming without reading ahead. Target: streaming at most 1.25 times the slower of reading and computing alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from common import MIB, Shape, alternate, generate_in_child, ratio, scratch, spread, table, verdict
from expertsmith.arch import record_of
from expertsmith.checkpoint import Checkpoint, open_checkpoint
from expertsmith.engine import Batch, LoadedModel, Walk, load_model, read_ahead

TARGET = 1.25


class Disk:
    """Reads of at most `rate` bytes a second."""

    def __init__(self) -> None:
        self.rate = float("inf")
        self._read = Checkpoint.read
        Checkpoint.read = lambda *given: self.read(*given)  # type: ignore[method-assign, assignment]

    def read(self, checkpoint: Checkpoint, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """In place of `Checkpoint.read`."""
        begin = time.perf_counter()
        found = self._read(checkpoint, name, first, last)
        rest = found.numel() * found.element_size() / self.rate - (time.perf_counter() - begin)
        if rest > 0:
            time.sleep(rest)
        return found


def walked(model: LoadedModel, batches: list[Batch]) -> float:
    """Seconds in which all batches go through all decoder layers."""
    begin = time.perf_counter()
    with Walk(model, batches) as walk:
        for _ in walk.layers():
            pass
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=512, help="of an expert")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--share", type=float, default=1.0, help="of the time of computing, for reading")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for generated files")
    parser.add_argument("--fp8", action="store_true", help="matrices in FP8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with scratch(options.work) as folder:
        shape = Shape("qwen3_moe", options.layers, options.hidden, options.width, options.experts, 4, 16, 4, fp8=options.fp8)
        generate_in_child(folder / "model", shape)
        source = open_checkpoint(folder / "model")
        record = record_of(source.config)
        ids = torch.randint(3, shape.vocab, (options.tokens // 512, 512), generator=torch.Generator().manual_seed(0))
        parts = ids.split(options.batch_tokens // 512)
        batches = [Batch(part, torch.ones_like(part, dtype=torch.bool), "a", list(range(len(part)))) for part in parts]
        names = [name for name in source.tensors if ".layers." in name]
        resident, streamed = (load_model(source, record, memory=memory) for memory in ("resident", "stream"))
        disk, share = Disk(), read_ahead.SHARE
        nbytes = sum(source.tensors[name].nbytes for name in names)
        disk.rate = nbytes / (options.share * min(walked(resident, batches) for _ in range(2)))

        def reading() -> float:
            begin = time.perf_counter()
            for name in names:
                source.read(name)
            return time.perf_counter() - begin

        def streaming(ahead: bool) -> float:
            read_ahead.SHARE = share if ahead else 0.0
            return walked(streamed, batches)

        seconds = alternate(
            {
                "computing": lambda: walked(resident, batches),
                "reading": reading,
                "ahead": lambda: streaming(True),
                "plainly": lambda: streaming(False),
            },
            options.rounds,
        )
    print(
        f"{options.layers} layers of {shape.layer_bytes / MIB:.0f} MiB {'FP8' if options.fp8 else 'bfloat16'}, {options.tokens} tokens, "
        f"reads at {disk.rate / MIB:.0f} MiB/s"
    )
    slower = [max(pair) for pair in zip(seconds["computing"], seconds["reading"], strict=True)]
    rows = [[name, f"{statistics.median(taken):.2f} s", "", "", ""] for name, taken in seconds.items()]
    found = ratio(seconds["ahead"], slower)
    rows.append(
        ["ahead / slower of both", f"{found:.3f}", f"≤ {TARGET}", verdict(found, TARGET), spread(seconds["ahead"], slower)]
    )
    for other in ("plainly",):
        rows.append(
            [f"{other} / slower of both", f"{ratio(seconds[other], slower):.3f}", "", "", spread(seconds[other], slower)]
        )
    table(["measure", "value", "target", "", "range"], rows)


if __name__ == "__main__":
    main()
