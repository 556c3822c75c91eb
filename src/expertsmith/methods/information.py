"""Entropy and mutual information of binned arrays, fast and with exact integer counts.

Entries of two arrays of equal size are paired by position. Each array has its own equal-width bins (`edges`). With p = counts / n:

    H(A) = -sum p ln p = ln n - (1/n) sum c ln c        (natural logarithm, c: non-zero counts, n: entries)
    I(A; B) = H(A) + H(B) - H(A, B)
    NMI(A, B) = I(A; B) / sqrt(H(A) H(B))  in [0, 1]

An array is binned once (`codes`), so a pair costs one pass over small integers. The sum of an entropy has one term for each distinct
count, added with `math.fsum`. It depends on the counts alone, so NMI(A, B) and NMI(B, A) are equal to the last bit.
"""

from __future__ import annotations

import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from expertsmith.errors import UserError
from expertsmith.methods.counting import CHUNK, count_pairs

Array = np.ndarray[Any, Any]
BinRule = Literal["numpy2", "numpy1"]
Precision = Literal["float32", "float64"]

ALONE = 1 << 27  # entry pairs (about half a second); below this, starting processes costs more than it saves

MOST_BINS = 1 << 26  # half a GB of edges


@dataclass(frozen=True)
class Codes:
    """A binned array. Non-empty bins are numbered from 0; a far outlier makes thousands of bins, but almost all are empty.

    `codes` [n] in [0, used), uint16 if they fit, else int32; `k`: number of bins with empty ones; `entropy` in nats;
    `constant`: all entries are equal.
    """

    codes: Array
    k: int
    used: int
    entropy: float
    constant: bool
    value: float  # of a constant array; else its smallest entry


def edges(values: Array, bins: BinRule = "numpy2") -> Array:
    """The k + 1 bin edges of numpy's rule "auto" for a float32 or float64 array, in its dtype; k = 1 if all entries are equal.

    k = ceil((max - min) / width), width = min(FD, Sturges), Sturges = (max - min) / (log2 n + 1), FD = 2 IQR / n^(1/3) with quartiles by
    linear interpolation.

    numpy2: as numpy 2.4. FD is at least half the square-root rule, (max - min) / (2 sqrt n), so k <= max(2 sqrt n, log2 n + 1), even if
    IQR = 0. numpy1: as numpy 1.26. There is no such cap, so far outliers make many bins; if IQR = 0, Sturges alone; edges are computed in
    float64 and then cast.

    Raises:
        UserError: the array is empty, its range is infinite, or it would have too many bins for memory or for its precision.
    """
    if values.size == 0:
        raise UserError("an empty array has no histogram")
    flat = values.reshape(-1)
    return edges_between(flat.min(), flat.max(), lambda places: np.partition(flat, places)[places], flat.size, bins)


def edges_between(low: Any, high: Any, ranked: Callable[[list[int]], Array], size: int, bins: BinRule) -> Array:
    """`edges` of an array of `size` entries, from its smallest and largest entry (numpy scalars) and a function that returns its entries
    at these places of its ascending order."""
    dtype = low.dtype
    if low == high:
        return np.array([low - 0.5, high + 0.5], dtype=dtype)
    width = (high - low) / (np.log2(size) + 1.0)
    diaconis = 2.0 * _quartile_range(ranked, size) * size ** (-1.0 / 3.0)
    if bins == "numpy2":
        diaconis = max(diaconis, (high - low) / np.sqrt(size) / 2)
    if diaconis:
        width = min(diaconis, width)
    k = (high - low) / width
    if not k <= MOST_BINS:  # also NaN
        raise UserError(f"entries from {low} to {high} would take {k:.3g} bins", "use -O bins=numpy2, which caps their number")
    k = math.ceil(k)
    if bins == "numpy2":
        found = np.linspace(low, high, k + 1, dtype=dtype)
    else:
        found = np.linspace(float(low), float(high), k + 1).astype(dtype)
    if (found[:-1] >= found[1:]).any():
        raise UserError(
            f"{k} bins between {low} and {high} are too narrow for {dtype}", "use -O precision=float64 or -O bins=numpy2"
        )
    return found


def _quartile_range(ranked: Callable[[list[int]], Array], size: int) -> float:
    """75th minus 25th percentile, interpolated with the same operations as in numpy, since their rounding decides some bin counts."""
    places = [share * (size - 1) for share in (0.75, 0.25)]
    below = [math.floor(place) for place in places]
    above = [min(place + 1, size - 1) for place in below]
    needed = sorted({*below, *above})
    ordered = dict(zip(needed, ranked(needed), strict=True))
    found = []
    for place, i, j in zip(places, below, above, strict=True):
        share, step = np.float64(place - i), ordered[j] - ordered[i]
        found.append(ordered[j] - step * (1 - share) if share >= 0.5 else ordered[i] + step * share)
    return float(found[0] - found[1])


def codes(values: Array, bins: BinRule = "numpy2", precision: Precision = "float32") -> Codes:
    """Put an array into its bins (`edges`): half-open, the last one closed, as `numpy.histogram` and `numpy.histogram2d` count.

    `precision`: dtype of range, quartiles, edges and comparisons. Entries are cast first (edges in float16 would collide). Edges in float32
    and float64 differ by rounding, so a few entries on an edge change their bin.

    Raises:
        UserError: as `edges`.
    """
    flat = np.ascontiguousarray(values, dtype=precision).reshape(-1)
    bounds = edges(flat, bins)
    k = len(bounds) - 1
    low = float(flat.min())
    if k == 1:
        return Codes(np.zeros(flat.size, np.uint16), 1, 1, 0.0, True, low)
    found = np.empty(flat.size, np.uint16 if k <= 2**16 else np.int32)
    # x -> (x - low) * scale is monotone, also after rounding. An entry's place rounded down is its bin if the place is farther from a whole
    # number than the place of every edge is; the few other entries are compared with the edges themselves
    scale = k / (float(bounds[-1]) - float(bounds[0]))
    places = (bounds.astype(np.float64) - float(bounds[0])) * scale
    near = float(np.abs(places - np.arange(k + 1)).max()) + 1e-12
    buffer = np.empty(min(CHUNK, flat.size))
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        place = np.subtract(part, float(bounds[0]), out=buffer[: len(part)], dtype=np.float64)
        place *= scale
        bin_of = place.astype(np.int32)
        place -= bin_of
        doubtful = np.flatnonzero((place <= near) | (place >= 1 - near))
        bin_of[doubtful] = np.searchsorted(bounds, part[doubtful], side="right") - 1
        found[start : start + CHUNK] = np.minimum(bin_of, k - 1)
    counts = np.zeros(k, np.int64)
    chunk = max(CHUNK, k)
    for start in range(0, flat.size, chunk):
        counts += np.bincount(found[start : start + chunk], minlength=k)
    used = int(np.count_nonzero(counts))
    if used < k:
        found = renumbered(counts)[found]
    return Codes(found, k, used, entropy(counts, flat.size), False, low)


def renumbered(counts: Array) -> Array:
    """Bin → its number among the bins that are not empty."""
    return (np.cumsum(counts > 0) - 1).astype(np.uint16 if np.count_nonzero(counts) <= 2**16 else np.int32)


def joint_counts(a: Codes, b: Codes) -> Array:
    """Count how often each pair of codes occurs: the flattened table [a.used * b.used], or only its non-zero cells if the table would have
    more cells than the arrays have entries.

    Raises:
        UserError: the arrays differ in size.
    """
    n = a.codes.size
    if b.codes.size != n:
        raise UserError(f"arrays of {n} and {b.codes.size} entries cannot be paired", "compare matrices of the same shape")
    cells = a.used * b.used
    if cells > n:
        kind = np.uint32 if cells < 2**32 else np.uint64
        index = a.codes.astype(kind)
        np.multiply(index, kind(b.used), out=index)
        np.add(index, b.codes.astype(kind), out=index)
        index.sort()
        starts = np.flatnonzero(index[1:] != index[:-1]) + 1
        return np.diff(np.concatenate(([0], starts, [n])))
    return count_pairs(a.codes, b.codes, (a.used, b.used))


def entropy(counts: Array, n: int) -> float:
    """ln n - (1/n) sum c ln c; the same for the same counts in any order."""
    if int(counts.max()) <= max(counts.size, 1 << 16):
        often = np.bincount(counts)
        each = np.flatnonzero(often[1:]) + 1
        often = often[each]
    else:
        each, often = np.unique(counts[counts > 0], return_counts=True)
    return entropy_of(each, often, n)


def entropy_of(each: Array, often: Array, n: int) -> float:
    """The entropy in nats of `n` entries, if the count each[i] (ascending, at least 1) occurs in often[i] cells."""
    if each[-1] == n:
        return 0.0
    return math.log(n) - math.fsum((often * (each * np.log(each))).tolist()) / n


def joint_entropy(a: Codes, b: Codes) -> float:
    """H(A, B) in nats."""
    return entropy(joint_counts(a, b), a.codes.size)


def nmi(a: Codes, b: Codes) -> float:
    """I(A; B) / sqrt(H(A) H(B)) in [0, 1], symmetric to the last bit.

    For a constant array (flag `constant`) this is 0 / 0: taken as 1 for two equal constants, else 0.

    Raises:
        UserError: the arrays differ in size.
    """
    if a.constant or b.constant:
        return _of_constants(a, b)
    return _normalised(a, b, joint_entropy(a, b))


def _of_constants(a: Codes, b: Codes) -> float:
    return 1.0 if a.constant and b.constant and a.value == b.value else 0.0


def _normalised(a: Codes, b: Codes, joint: float) -> float:
    # rounding may exceed the range by about 1e-16
    return min(1.0, max(0.0, (math.fsum((a.entropy, b.entropy, -joint))) / math.sqrt(a.entropy * b.entropy)))


Joint = Callable[[Sequence[Codes]], Iterator[tuple[int, int, float]]]


def nmi_matrix(arrays: Sequence[Codes], joint: Joint | None = None, advance: Callable[[int], object] | None = None) -> Array:
    """NMI of every pair of E arrays: [E, E] float64, symmetric, with a ZERO diagonal (an array is never compared with itself).

    `joint`: yields (i, j, H(i, j) in nats) for every pair i < j of arrays of equal size, in any order; by default `on_cores`. `advance` is
    called with 1 after each pair.

    Raises:
        UserError: the arrays differ in size.
    """
    done = advance or (lambda _: None)
    count = len(arrays)
    matrix = np.zeros((count, count))
    varied = [i for i in range(count) if not arrays[i].constant]
    for i in range(count):
        for j in range(i + 1, count):
            if arrays[i].codes.size != arrays[j].codes.size:
                raise UserError(
                    f"arrays {i} and {j} have {arrays[i].codes.size} and {arrays[j].codes.size} entries",
                    "compare matrices of the same shape",
                )
            if arrays[i].constant or arrays[j].constant:
                matrix[i, j] = matrix[j, i] = _of_constants(arrays[i], arrays[j])
                done(1)
    if len(varied) < 2:
        return matrix
    chosen = [arrays[i] for i in varied]
    for i, j, value in (joint or on_cores)(chosen):
        value = _normalised(chosen[i], chosen[j], value)
        matrix[varied[i], varied[j]] = matrix[varied[j], varied[i]] = value
        done(1)
    return matrix


def on_cores(arrays: Sequence[Codes], workers: int | None = None) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, joint entropy) for every pair i < j of arrays of equal size, counted on CPU cores.

    `workers`: number of processes, by default one for each core that this process may use, or its share of them under `torchrun`; the
    result does not depend on it. Threads would not help: numpy counts under the interpreter lock. Workers are new interpreters that read
    the codes from one file of E * n * 2 bytes in the temporary folder and import only numpy and scipy. Nothing is forked while the caller
    has threads, and the caller's script is not run again.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    workers = min(workers, len(arrays) - 1)
    if workers == 1 or arrays[0].codes.size * len(arrays) * (len(arrays) - 1) // 2 < ALONE:
        return _alone(arrays)
    return _together(arrays, workers)


def _alone(arrays: Sequence[Codes]) -> Iterator[tuple[int, int, float]]:
    for i in range(len(arrays)):
        for j in range(i + 1, len(arrays)):
            yield i, j, joint_entropy(arrays[i], arrays[j])


def _together(arrays: Sequence[Codes], workers: int) -> Iterator[tuple[int, int, float]]:  # noqa: C901  (processes, threads and queues that live and end together)
    """Yield joint entropies from worker processes. Each worker gets the next row when it has finished one, longest rows first."""
    count, size = len(arrays), arrays[0].codes.size
    wide = np.dtype(np.int32 if any(a.codes.dtype == np.int32 for a in arrays) else np.uint16)
    rows: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for row in [*range(count - 1), *[None] * workers]:
        rows.put(row)
    answers: queue.SimpleQueue[tuple[int, int, float] | BaseException] = queue.SimpleQueue()
    failed = threading.Event()

    def drive(process: subprocess.Popen[str]) -> None:
        try:
            while (row := rows.get()) is not None and not failed.is_set():
                for column, value in _ask(process, row, count):
                    answers.put((row, column, value))
        except BaseException as error:
            failed.set()
            answers.put(error)

    with ExitStack() as stack:
        # Windows cannot remove a file that a process maps, so the folder is removed after the workers have ended
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="expertsmith-"))
        file = Path(folder) / "codes"
        with open(file, "wb") as sink:
            for array in arrays:
                sink.write(np.ascontiguousarray(array.codes, dtype=wide).data)
        command = [
            sys.executable,
            "-c",
            "from expertsmith.methods.information import _serve; _serve()",
            str(file),
            wide.str,
            str(size),
        ]
        command += [str(array.used) for array in arrays]
        threads = []
        for _ in range(workers):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            stack.callback(_end, process)
            threads.append(threading.Thread(target=drive, args=(process,), daemon=True))
        for thread in threads:
            thread.start()
        for _ in range(count * (count - 1) // 2):
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer
        for thread in threads:
            thread.join()


def _ask(process: subprocess.Popen[str], row: int, count: int) -> Iterator[tuple[int, float]]:
    """Yield (array, joint entropy with array `row`) for all later arrays, computed by a worker."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{row}\n")
    process.stdin.flush()
    for column in range(row + 1, count):
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process that counts pairs ended with exit code {process.wait()}")
        yield column, float(line)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _serve() -> None:
    """Run a worker: for every row number on stdin, print the joint entropies of that array with all later ones, one per line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent ends this one
    name, kind, size, *used = sys.argv[1:]
    table = np.memmap(name, dtype=np.dtype(kind), mode="r").reshape(len(used), int(size))
    arrays = [Codes(row, int(k), int(k), math.nan, False, math.nan) for row, k in zip(table, used, strict=True)]
    for line in sys.stdin:
        row = int(line)
        for other in arrays[row + 1 :]:
            print(repr(joint_entropy(arrays[row], other)), flush=True)


class Counting(NamedTuple):
    """How arrays are binned and their pairs counted: on CPU cores, or by other functions that give the same values to the last bit."""

    codes: Callable[[Array, BinRule, Precision], Codes] = codes
    joint: Joint = on_cores
