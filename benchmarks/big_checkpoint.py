"""Prune a checkpoint that is larger than memory: calibrate, plan, apply (and verify) with a hard limit on the memory of each process.

A checkpoint of random weights is written layer by layer (12 GB by default, a vocabulary of 1024, calibration data as `input_ids`), then
`expertsmith` runs stage by stage, each in a process that may not take more than `--limit` GB. Target: every stage exits with 0.

DeepSeek-V3's own layers, cut in depth, as FP8: `--family deepseek_v3 --fp8 --hidden 7168 --width 2048 --experts 256 --heads 128 --limit 8 --verify`. The
experts of one such layer take 22 GB in bfloat16, so they are read when tokens are sent to them.

How the limit is set, the first that works here (`--limit-with` picks one):

systemd   a transient scope (`systemd-run --scope -p MemoryMax=… -p MemorySwapMax=0`): counts the resident set and the page cache that cannot
          be dropped; needs a running systemd.
cgroup2   a cgroup made by hand below this process's own, with memory.max: the same accounting; needs cgroup v2 with the memory
          controller and the right to write there (under v1 hierarchies, as in many containers, there is none).
prlimit   `prlimit --as` (else `ulimit -v`): limits the address space, so everything mapped counts, touched or not: stricter than the resident
          set. The page cache of files that are read or written does not count, and the kernel may drop it at any time.
data      `prlimit --data`, only on request: private memory that the process may write. Unlike --as it leaves out the code and read-only data of
          libraries and the address space that is only reserved, so it is the closest to the resident set without a cgroup.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from common import Child, Shape, generate_in_child, run_child, scratch, table, verdict, weight_bytes, write_data

Wrap = Callable[[list[str]], list[str]]


def by_systemd(limit: int) -> Wrap | None:
    head = ["systemd-run", "--scope", "--quiet", "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
    for scope in ([], ["--user"]):
        if (
            shutil.which("systemd-run")
            and subprocess.run([head[0], *scope, *head[1:], "true"], capture_output=True).returncode == 0
        ):
            return lambda command, scope=scope: [head[0], *scope, *head[1:], *command]  # type: ignore[misc]
    return None


def by_cgroup(limit: int) -> Wrap | None:
    """A cgroup v2 below our own that the child joins before it becomes the command."""
    with suppress(OSError, StopIteration):
        own = next(line.split("::")[1] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        root = next(
            mount
            for mount in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
            if (mount / "cgroup.controllers").exists()
        )
        if "memory" not in (root / "cgroup.controllers").read_text().split():
            return None
        group = root / own.strip().lstrip("/") / f"expertsmith-{os.getpid()}"
        group.mkdir()
        try:
            (group / "memory.max").write_text(str(limit))
        except OSError:
            group.rmdir()
            return None
        return lambda command: ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command]
    return None


def by_prlimit(limit: int) -> Wrap | None:
    if shutil.which("prlimit"):
        return lambda command: ["prlimit", f"--as={limit}", "--", *command]
    return lambda command: ["sh", "-c", f'ulimit -v {limit // 1024} && exec "$@"', "sh", *command]


def by_data(limit: int) -> Wrap | None:
    return (lambda command: ["prlimit", f"--data={limit}", "--", *command]) if shutil.which("prlimit") else None


LIMITERS: dict[str, Callable[[int], Wrap | None]] = {
    "systemd": by_systemd,
    "cgroup2": by_cgroup,
    "prlimit": by_prlimit,
    "data": by_data,
}


def holds(wrap: Wrap, limit: int) -> bool:
    """Whether a process that takes more than the limit dies of it (a limiter that does nothing would prove nothing)."""
    take = f"b = bytearray({limit + limit // 8}); b[::4096] = b'x' * len(b[::4096])"
    return run_child(wrap([sys.executable, "-c", "pass"])).code == 0 and run_child(wrap([sys.executable, "-c", take])).code != 0


def choose(name: str, limit: int) -> tuple[str, Wrap]:
    for candidate, make in LIMITERS.items():
        if name in ("auto", candidate):
            wrap = make(limit)
            if wrap is not None and holds(wrap, limit):
                return candidate, wrap
            print(f"limit by {candidate}: does not work here")
    raise SystemExit("no way to limit memory works here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3_moe", choices=["qwen3_moe", "mixtral", "deepseek_v3"])
    parser.add_argument("--fp8", action="store_true", help="matrices in FP8 with scales of blocks")
    parser.add_argument("--heads", type=int, help="of attention; default: hidden / 128")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="size of the checkpoint, at least")
    parser.add_argument("--limit", type=float, default=6.0, help="GB of memory a process may take")
    parser.add_argument("--limit-with", default="auto", choices=["auto", *LIMITERS])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768, help="of an expert")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--method", default="reap")
    parser.add_argument("--keep", default="0.5")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    # not auto: that looks at the memory that is free on the whole machine, which a limit on one process does not change
    parser.add_argument("--memory", default="stream", choices=["auto", "stream", "resident"], help="of calibrate")
    parser.add_argument("--verify", action="store_true", help="also run verify --memory stream (float32)")
    parser.add_argument("--work", type=Path, help="folder for generated files")
    parser.add_argument("--keep-files", action="store_true")
    options = parser.parse_args()

    limit = int(options.limit * 1e9)
    limiter, wrap = choose(options.limit_with, limit)
    shape = Shape(
        options.family,
        2,
        options.hidden,
        options.width,
        options.experts,
        options.top_k,
        heads=options.heads or options.hidden // 128,
        kv_heads=4,
        fp8=options.fp8,
    )
    dense = 1 if options.family == "deepseek_v3" else 0
    shape = replace(shape, layers=dense + int(-(-options.gigabytes * 1e9 // shape.layer_bytes)))
    with scratch(options.work, options.keep_files) as folder:
        free = shutil.disk_usage(folder).free
        if free < 1.6 * options.gigabytes * 1e9:
            raise SystemExit(f"needs {1.6 * options.gigabytes:.0f} GB of disk, but {folder} has {free / 1e9:.0f} GB")
        model, data, stats, plan, out = (
            folder / "model",
            folder / "data.jsonl",
            folder / "stats",
            folder / "plan.json",
            folder / "out",
        )
        total = generate_in_child(model, shape)
        write_data(data, options.tokens, options.length, shape.vocab)
        print(
            f"{options.family}: {total / 1e9:.2f} GB {'FP8' if options.fp8 else 'bfloat16'}, {shape.layers} layers of {shape.layer_bytes / 1e9:.2f} GB, {shape.experts} experts, top "
            f"{shape.top_k}; {options.tokens} tokens, {options.threads} threads\neach process limited to {options.limit:g} GB by {limiter}"
        )
        stages = {
            "calibrate": [
                model,
                "-o",
                stats,
                "-d",
                data,
                "--seq-len",
                options.length,
                "--batch-tokens",
                options.batch_tokens,
                "--memory",
                options.memory,
            ],
            "plan": [model, "--stats", stats, "-m", options.method, "-k", options.keep, "-o", plan],
            "apply": [model, plan, "-o", out],
        }
        if options.verify:
            stages["verify"] = [model, out, "--tokens", 256, "--memory", "stream"]
        rows: list[list[object]] = []
        for name, arguments in stages.items():
            command = [
                sys.executable,
                "-m",
                "expertsmith",
                name,
                *map(str, arguments),
                *(["--device", "cpu"] if name in ("calibrate", "verify") else []),
                "--quiet",
            ]
            done: Child = run_child(wrap(command), threads=options.threads)
            rows.append(
                [
                    name,
                    done.code,
                    f"{done.seconds:.1f} s",
                    f"{done.peak / 1e9:.2f} GB",
                    f"exit 0 in {options.limit:g} GB",
                    verdict(done.code, 0),
                ]
            )
            if done.code:
                rows[-1].append(done.tail)
                break
        if out.exists():
            print(f"output: {weight_bytes(out) / 1e9:.2f} GB")
    if limiter == "cgroup2":
        with suppress(OSError):
            own = next(Path("/sys/fs/cgroup").rglob(f"expertsmith-{os.getpid()}"))
            own.rmdir()
    table(["stage", "exit", "wall", "peak RSS", "target", "", "error"], [[*row, ""][:7] for row in rows])


if __name__ == "__main__":
    main()
