"""Normalised mutual information of experts' weights (method moeits): the package's counting against the plain formula in numpy.

Plain: `numpy.histogram(…, bins="auto")` of both matrices, `numpy.histogram2d` on their edges, entropies, for every pair anew. Ours: each matrix is
put into bins once (`codes`), a pair is one count of small integers (`nmi`); both are shown, and so is a pair with all it needs (two
matrices into bins, then counted), which no layer pays for every pair. Both sides use one thread and must agree to 1e-10.
Target: a pair at least 30 times faster (aim: 60).

Then the same pairs by the counter for devices (`planning.pairs`), on --device, whose results must be equal to the last bit: one core's time
over its time for a pair and for putting a matrix into bins, and its operations and fetches. On a CPU it is slower; it is made for GPUs.

Then a layer on all cores (`nmi_matrix`), from a subset of its experts if asked, and what whole models would take: measured seconds a
matrix and a pair times their numbers, reading the checkpoint left out. Weights are random: normal, with a common part.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from functools import partial

import numpy as np

from common import alternate, ratio, spread, table, verdict
from expertsmith.methods.information import Codes, codes, nmi, nmi_matrix, on_cores

TARGET, AIM, AGREE = 30.0, 60.0, 1e-10
# layers, experts a layer, shape of an expert's matrices (three of them)
MODELS = {"Qwen1.5-MoE": (24, 60, (1408, 2048)), "Mixtral": (32, 8, (4096, 14336))}


def entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def plain(a: np.ndarray, b: np.ndarray) -> float:
    one, first = np.histogram(a, bins="auto")
    two, second = np.histogram(b, bins="auto")
    both = np.histogram2d(a.reshape(-1), b.reshape(-1), bins=[first, second])[0]
    h, g = entropy(one), entropy(two)
    return (h + g - entropy(both)) / math.sqrt(h * g)


def matrices(shape: tuple[int, int], count: int, outlier: float = 0.0) -> list[np.ndarray]:
    """`outlier`: one entry of each so many standard deviations away, which makes many bins."""
    draw = np.random.default_rng(0)
    common = draw.standard_normal(shape, dtype=np.float32)
    made = []
    for _ in range(count):
        matrix = (0.3 * common + 0.95 * draw.standard_normal(shape, dtype=np.float32)) * np.float32(0.02)
        if outlier:
            matrix.reshape(-1)[draw.integers(matrix.size)] = 0.02 * outlier
        made.append(matrix)
    return made


def clock(run) -> float:  # type: ignore[no-untyped-def]
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def pair_rows(name: str, shape: tuple[int, int], outlier: float, rounds: int) -> tuple[list[list[object]], float, float]:
    """Table rows; median seconds of putting a matrix into bins and of a pair."""
    a, b = matrices(shape, 2, outlier)
    x, y = codes(a), codes(b)
    far = abs(plain(a, b) - nmi(x, y))
    runs = {
        "plain": lambda: plain(a, b),
        "pair": lambda: nmi(x, y),
        "codes": lambda: codes(a),
        "all": lambda: nmi(codes(a), codes(b)),
    }
    cpu: dict[str, list[float]] = {what: [] for what in runs}

    def timed(what: str) -> float:
        used = time.process_time()
        wall = clock(runs[what])
        cpu[what].append(time.process_time() - used)
        return wall

    taken = alternate({what: lambda what=what: timed(what) for what in runs}, rounds)  # type: ignore[misc]
    seconds = {what: statistics.median(values) for what, values in taken.items()}
    speed = ratio(taken["plain"], taken["pair"])
    note = f"{seconds['plain']:.2f} s / {seconds['pair'] * 1e3:.1f} ms; {spread(taken['plain'], taken['pair'])}; {x.k} x {y.k} bins"
    whole = f"{seconds['all'] * 1e3:.0f} ms, of which codes {seconds['codes'] * 1e3:.0f} ms a matrix"
    busy = ratio(cpu["plain"], cpu["pair"])
    rows: list[list[object]] = [
        [
            f"{name}: plain / pair, wall",
            f"{speed:.1f}",
            f">= {TARGET:.0f} (aim {AIM:.0f})",
            "ok" if speed >= TARGET else "UNDER",
            note,
        ],
        [
            f"{name}: plain / pair, CPU",
            f"{busy:.1f}",
            "",
            "ok" if busy >= TARGET else "UNDER",
            spread(cpu["plain"], cpu["pair"]),
        ],
        [f"{name}: plain / (codes of both + pair)", f"{ratio(taken['plain'], taken['all']):.1f}", "", "", whole],
        [f"{name}: |difference|", f"{far:.1e}", f"<= {AGREE:.0e}", verdict(far, AGREE), f"NMI {nmi(x, y):.6f}"],
    ]
    return rows, seconds["codes"], seconds["pair"]


def device_rows(name: str, shape: tuple[int, int], count: int, rounds: int) -> list[list[object]]:
    """Table rows: pairs and bins on a device against one core."""
    import torch

    from expertsmith.planning.pairs import codes_on, joint_entropies
    from operations import counting

    device = torch.device(name)
    made = matrices(shape, count)
    binned = [codes(matrix) for matrix in made]
    assert all(np.array_equal(one.codes, codes_on(device, matrix).codes) for one, matrix in zip(binned, made, strict=True))
    assert sorted(joint_entropies(device, binned)) == sorted(on_cores(binned, 1))
    runs = {
        "core": lambda: list(on_cores(binned, 1)),
        "device": lambda: list(joint_entropies(device, binned)),
        "core bins": lambda: codes(made[0]),
        "device bins": lambda: codes_on(device, made[0]),
    }
    taken = alternate({what: lambda what=what: clock(runs[what]) for what in runs}, rounds)  # type: ignore[misc]
    with counting() as mode:
        list(joint_entropies(device, binned))
    pairs = count * (count - 1) // 2
    note = f"{statistics.median(taken['device']) / pairs * 1e3:.2f} ms a pair; {mode.launched.total()} operations and {mode.waited.total()} fetches for {pairs} pairs"
    bins = f"{statistics.median(taken['device bins']) * 1e3:.1f} ms a matrix"
    return [
        [f"pairs: one core / {name}, {count} experts", f"{ratio(taken['core'], taken['device']):.2f}", "", "", note],
        [f"bins: one core / {name}", f"{ratio(taken['core bins'], taken['device bins']):.2f}", "", "", bins],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--experts", type=int, default=60, help="of the layer of Qwen1.5-MoE's shape; fewer are a subset of its pairs"
    )
    parser.add_argument("--workers", type=int, help="processes for the layer; default: all cores")
    parser.add_argument("--no-mixtral", action="store_true", help="leave out the pair of 4096 x 14336 (takes 3 GB)")
    parser.add_argument("--device", default="cpu", help="for the counter of devices")
    options = parser.parse_args()

    cores = options.workers or len(os.sched_getaffinity(0))
    rows: list[list[object]] = []
    cost: dict[str, tuple[float, float]] = {}
    for name, (_, _, shape) in MODELS.items():
        if name == "Mixtral" and options.no_mixtral:
            continue
        found, *cost[name] = pair_rows(  # type: ignore[assignment]
            f"{name} {shape[0]}x{shape[1]}", shape, 0.0, options.rounds if name != "Mixtral" else 1
        )
        rows += found
    rows += pair_rows("1408x2048 with outliers", (1408, 2048), 60.0, options.rounds)[0]

    rows += device_rows(options.device, (768, 2048), min(options.experts, 16), options.rounds)

    layers, experts, shape = MODELS["Qwen1.5-MoE"]
    count = min(options.experts, experts)
    binned: list[Codes] = []
    into_bins = clock(lambda: binned.extend(codes(matrix) for matrix in matrices(shape, count)))
    pairs = count * (count - 1) // 2
    together = clock(lambda: nmi_matrix(binned, partial(on_cores, workers=cores)))
    note = f"{pairs} of {experts * (experts - 1) // 2} pairs, starting the processes included; generated and into bins before in {into_bins:.1f} s"
    rows.append([f"one matrix of a layer, {count} experts", f"{together:.1f} s", "", "", note])
    rows.append([f"a pair on {cores} cores", f"{together / pairs * 1e3:.2f} ms", "", "", "of that layer"])
    table(["measure", "value", "target", "", "detail"], rows)

    print()
    for name, (matrix, pair) in cost.items():
        layers, experts, _ = MODELS[name]
        number = experts * (experts - 1) // 2
        each = together / pairs if name == "Qwen1.5-MoE" else pair  # Mixtral's pairs on several cores are not measured
        total = 3 * layers * (experts * matrix + number * each)
        how = f"{cores} cores" if name == "Qwen1.5-MoE" else "one core"
        print(
            f"{name}: {3 * layers * number} pairs and {3 * layers * experts} matrices: {total / 60:.0f} min (extrapolated; pairs on {how}, bins on one)"
        )


if __name__ == "__main__":
    main()
