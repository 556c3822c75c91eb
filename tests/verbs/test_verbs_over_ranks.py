"""Verbs under `torchrun`: the result of several ranks is that of one process, one rank prints and writes, and one tells of a failure."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import run_cli
from expertsmith import api
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine.devices import choose_memory, free_memory
from expertsmith.errors import UserError
from expertsmith.ranks import _NOW, ALONE, ApartError, Ranks, _Outcome, current, own_device

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, pkgutil, sys

rank, folder, lines = int(os.environ["RANK"]), sys.argv[1], json.loads(sys.argv[2])

def reads_only(event, args):
    # refuses changes in the folder of the test; libraries may have caches elsewhere
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
    changes |= event == "open" and bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    assert not (changes and str(args[0]).startswith(folder)), f"rank {rank} changes {args[0]}"

if rank > 0:
    sys.addaudithook(reads_only)

def broken(*args):
    raise UserError("the cooling failed", "open a window")

from expertsmith.cli import main
from expertsmith.errors import UserError
codes = []
for line in lines:
    if line[0].startswith("broken ") and (place := line.pop(0).split()[1]) and rank == 1:
        owner, name = place.rsplit(".", 1)
        setattr(pkgutil.resolve_name(owner), name, broken)
    sys.argv = ["expertsmith", *line]
    try:
        main()
    except SystemExit as stop:
        codes.append(stop.code or 0)
os.write(2, f"exit codes {rank} {codes}\\n".encode())  # in one piece: the ranks share stderr
sys.exit(max(codes))
"""


def torchrun(folder: Path, *lines: list[object], ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Several commands, one after another in the same processes."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    told = json.dumps([[str(word) for word in line] for line in lines])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return subprocess.run(
        [*command, str(script), str(folder), told],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process: other splits of a sum round differently
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def pruned(checkpoints, data, tmp_path_factory) -> tuple[Path, Path]:
    """(a tiny model, the same with half of its experts)."""
    source, out = checkpoints("qwen2_moe"), tmp_path_factory.mktemp("pruned") / "out"
    plan = api.plan(source, "random", 0.5, out=out.with_name("plan.json"))
    api.apply(source, plan, out)
    return source, out


def test_two_ranks_find_what_one_process_finds(pruned, data, tmp_path, capsys):
    """Bit for bit, since every batch is the same and sums are added in the order of the batches."""
    source, out = pruned
    texts = [word for spec in data for word in ("-d", spec)]
    here, many = tmp_path / "one", tmp_path / "many"
    verify = ["verify", source, out, "--device", "cpu", "--tokens", 700, "--json"]
    one_batch = [*verify[:-2], 64, "--memory", "stream", "--json"]
    measured = ["evaluate", out, "-r", source, *texts, "--seq-len", 23, "--batch-tokens", 48, "--device", "cpu", "--json"]
    alone = ["evaluate", out, *texts, "--seq-len", 23, "--batch-tokens", 48, "--device", "cpu", "--memory", "stream", "--json"]
    compare = ["compare", source, "-m", "reap", "-m", "m_smoe", "-m", "expert_sparsity", "-k", 0.5, "--heal", "least_squares"]
    compare += ["--budget", "uniform", "--budget", "sensitivity"]
    compare += [*texts, "-e", data[0], "--seq-len", 24, "--batch-tokens", 72, "--dtype", "float32", "--device", "cpu", "-o"]
    damaged = tmp_path / "damaged"
    shutil.copytree(out, damaged)
    damage(damaged)
    lines = [verify, one_batch, measured, alone, [*compare, many, "--json"], ["verify", source, damaged, "--json"]]
    done = torchrun(tmp_path, *lines)
    assert "exit codes 1 [0, 0, 0, 0, 0, 1]" in done.stderr, done.stderr[-4000:]
    assert done.returncode != 0
    printed = objects(done.stdout)
    lines[4] = [*compare, here, "--json"]
    expected = [json.loads(run_cli(capsys, *line)[1]) for line in lines]
    assert [entry["format"] for entry in printed] == [entry["format"] for entry in expected]  # each printed once
    assert printed[:4] == expected[:4]
    assert printed[0]["passed"]
    assert printed[0]["tokens"] == 640  # three batches for two ranks
    assert measures(printed[4]) == measures(expected[4])
    assert {path.name for path in many.iterdir()} == {path.name for path in here.iterdir()}
    assert printed[5] == expected[5]
    assert [len(entry["wrong_tensors"]) for entry in (printed[0], printed[5])] == [0, 2]


def damage(folder: Path) -> None:
    """Change the first and the last tensor of the file, which are in the shares of different ranks."""
    tensors = sorted(open_checkpoint(folder).tensors.values(), key=lambda info: info.start)
    for info in (tensors[0], tensors[-1]):
        with open(info.file, "r+b") as stream:
            stream.seek(info.start)
            byte = stream.read(1)
            stream.seek(info.start)
            stream.write(bytes([byte[0] ^ 1]))


def objects(text: str) -> list[dict]:
    """JSON objects that were printed one after another."""
    decoder, found, rest = json.JSONDecoder(), [], text.strip()
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(value)
        rest = rest[end:].strip()
    return found


def measures(found):
    """A comparison without what it took."""
    if isinstance(found, dict):
        return {key: measures(value) for key, value in found.items() if key not in ("seconds", "memory", "cuda_memory")}
    return [measures(value) for value in found] if isinstance(found, list) else found


@pytest.mark.parametrize(
    ("verb", "place"),
    [
        ("evaluate", "expertsmith.evaluation.quality._of_batch"),
        ("compare", "expertsmith.evaluation.quality._of_batch"),
        ("compare", "expertsmith.calibration.runner._Run.observe"),
        ("compare", "expertsmith.evaluation.overlap.Overlap.of"),
    ],
)
def test_one_rank_that_fails_ends_all_and_says_why(verb, place, pruned, data, tmp_path):
    """`compare` goes on after a plan that all ranks refuse, but not after what only one of them cannot do, while others go on with it."""
    shape = ["-d", data[0], "--seq-len", 23, "--batch-tokens", 24, "--device", "cpu"]
    more = ["-e", data[0], "-m", "reap", "-k", 0.5, "--budget", "sensitivity", "-o", tmp_path / "c", "-q"]
    done = torchrun(tmp_path, [f"broken {place}", verb, pruned[0], *shape, *(more if verb == "compare" else ())])
    assert done.returncode != 0
    # without the end of the line: the ranks share stderr, and another may write before it
    assert done.stderr.count("error: the cooling failed; open a window") == 1, done.stderr[-3000:]
    assert done.stderr.count("error: ") == 1
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert done.stdout == ""


# ---- what a rank does, worked by hand


def two(*theirs: object) -> Ranks:
    """Rank 0 of 2, with what the other rank gives each time."""
    given = iter(theirs)

    class Two(Ranks):
        def gather(self, mine):
            return [mine, next(given)]

    return Two(0, 2)


def test_items_are_dealt_in_turns_and_their_results_put_back_in_order():
    assert [Ranks(rank, 3).share(range(7)) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert Ranks(2, 3).share([5]) == []
    assert two(["b"]).joined(["a", "c"]) == ["a", "b", "c"]
    assert two([]).joined(["a"]) == ["a"]
    assert ALONE.joined(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("sizes", "ranks", "shares"),
    [
        ([4, 4, 4, 4], 2, [[0, 1], [2, 3]]),
        ([10, 1, 1, 1, 1], 2, [[0], [1, 2, 3, 4]]),  # the middle of 10 is at 5 of 14, that of the next at 10.5
        ([1, 1, 1, 11], 2, [[0, 1, 2], [3]]),  # the middle of 11 is at 8.5 of 14
        ([8], 3, [[], [0], []]),  # 4 of 8: the second third
        ([0, 0], 2, [[0, 1], []]),
        ([3, 0, 3], 2, [[0], [1, 2]]),  # the middle of nothing at 3 of 6
        ([], 2, [[], []]),
    ],
)
def test_neighbours_are_shared_by_their_sizes(sizes, ranks, shares):
    assert [list(Ranks(rank, ranks).share_by_size(sizes)) for rank in range(ranks)] == shares


def test_every_byte_is_compared_by_one_rank(pruned, monkeypatch):
    from expertsmith.calibration.opening import inventory_of
    from expertsmith.planning.plan import load_plan
    from expertsmith.surgery import verify

    source, out = pruned
    plan, inventory, output = load_plan(out.with_name("plan.json")), inventory_of(source), open_checkpoint(out)
    same, seen = verify._same_bytes, []
    monkeypatch.setattr(verify, "_same_bytes", lambda tensor, *rest: seen.append(tensor) or same(tensor, *rest))
    shares = []
    for rank in range(3):
        monkeypatch.setattr(Ranks, "gather", lambda self, mine: [["b"], mine, ["a"]])
        assert verify.compare_bytes(plan, inventory, output, ranks=Ranks(rank, 3)) == (len(output.tensors), ["a", "b"])
        shares.append([tensor.nbytes for tensor in seen])
        seen.clear()
    assert sum(map(len, shares)) == len(output.tensors)
    third, largest = sum(map(sum, shares)) / 3, max(map(max, shares))
    assert all(abs(sum(share) - third) <= largest for share in shares)


def test_a_verdict_has_the_largest_differences_and_the_sums_of_counts():
    from expertsmith.surgery.verify import Outputs, Verdict, _add_up

    first = Outputs(
        layers={0: {"difference": 1.0, "scale": 8.0}, 1: {"difference": 4.0, "scale": 9.0}},
        skipping={1: {"difference": 0.0, "scale": 2.0}},
        counters={1: (10, 9)},
        logits={"difference": 0.5, "scale": 3.0},
        same=3,
        tokens=4,
    )
    second = Outputs(
        layers={0: {"difference": 2.0, "scale": 7.0}, 1: {"difference": 3.0, "scale": 9.5}},
        skipping={1: {"difference": 0.25, "scale": 1.0}},
        counters={1: (10, 6)},
        logits={"difference": 0.25, "scale": 4.0},
        same=1,
        tokens=4,
    )
    verdict = Verdict(False, 1e-4, 1)
    _add_up(verdict, [first, second, Outputs()])  # the third had no batches
    assert verdict.layers == [{"layer": 0, "difference": 2.0, "scale": 8.0}, {"layer": 1, "difference": 4.0, "scale": 9.5}]
    assert verdict.skipping == [{"layer": 1, "difference": 0.25, "scale": 2.0, "skipped": 0.25}]  # 15 of 20 slots ran
    assert (verdict.logits_difference, verdict.logits_scale, verdict.top1_agreement) == (0.5, 4.0, 0.5)
    assert verdict.largest == 4.0 / 9.5


def test_values_that_are_nan_in_both_models_are_no_proof():
    from expertsmith.surgery.verify import Verdict

    rows = [{"layer": 0, "difference": 1e-7, "scale": 1.0}, {"layer": 1, "difference": math.inf, "scale": math.inf}]
    assert Verdict(False, 1e-4, 1, layers=rows).largest == math.inf


def test_losses_are_added_by_domain_and_sequence():
    from expertsmith.evaluation.quality import DomainQuality

    whole = DomainQuality(3, 6.0, 14.0, 3.0, 0.5, 2, 2.5, {0: (3, 3.0)})
    whole.add(DomainQuality(1, 4.0, 16.0, 2.0, 0.25, 1, 0.5, {4: (1, 2.0)}))
    assert whole == DomainQuality(4, 10.0, 30.0, 5.0, 0.75, 3, 3.0, {0: (3, 3.0), 4: (1, 2.0)})
    assert whole.rise == 5.0 / 4  # (10 - 5) / 4
    assert whole.rise_se == pytest.approx(math.sqrt(2 * ((3 - 3.75) ** 2 + (2 - 1.25) ** 2)) / 4)


def test_all_ranks_choose_one_memory_mode_and_share_the_main_memory(pruned, monkeypatch):
    import torch

    opened, cpu = [open_checkpoint(pruned[0])], torch.device("cpu")
    assert choose_memory("auto", opened, cpu) == "resident"
    assert choose_memory("auto", opened, cpu, ranks=two(True)) == "resident"
    assert choose_memory("auto", opened, cpu, ranks=two(False)) == "stream"  # the other has too little memory
    monkeypatch.setattr("expertsmith.engine.devices._free_memory", lambda: 1001)
    assert free_memory(cpu) == 1001
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(cpu) == 500


def test_a_rank_that_was_killed_is_told_of(monkeypatch):
    import torch.distributed as dist

    def closed(*_, **__):
        raise RuntimeError("[/gloo/pair.cc:553] Connection closed by peer [1.2.3.4]:9600. This is typically caused by …\nmore")

    monkeypatch.setattr(dist, "all_gather_object", closed)
    monkeypatch.setattr(dist, "broadcast_object_list", closed)
    for exchange in (lambda: Ranks(0, 2).gather(1), lambda: Ranks(1, 2).leading(lambda: 1)):
        with pytest.raises(
            UserError, match=r"another rank no longer answers \(Connection closed by peer \[1.2.3.4\]:9600\); torchrun's"
        ):
            exchange()


def test_the_first_rank_decides_and_its_mistakes_are_those_of_all(monkeypatch):
    """What it returns or raises is sent to the others; within, it works alone."""
    import torch.distributed as dist

    sent = []
    monkeypatch.setattr(dist, "broadcast_object_list", lambda told, **_: sent.append(pickle.loads(pickle.dumps(told[0]))))
    monkeypatch.setattr(dist, "all_gather_object", lambda found, mine, **_: None)
    token = _NOW.set(Ranks(0, 2))
    try:
        assert Ranks(0, 2).leading(lambda: current().world) == 1
        assert current().world == 2
    finally:
        _NOW.reset(token)
    assert sent.pop() == (1, None)

    def refused():
        raise UserError("the folder is full", "empty it")

    with pytest.raises(UserError, match="the folder is full; empty it"):
        Ranks(0, 2).leading(refused)
    error = sent.pop()[1]
    assert (str(error), error.message, error.remedy) == ("the folder is full; empty it", "the folder is full", "empty it")
    monkeypatch.setattr(dist, "broadcast_object_list", lambda told, **_: told.__setitem__(0, (None, error)))
    with pytest.raises(UserError, match="the folder is full"):
        Ranks(1, 2).leading(lambda: pytest.fail("only the first rank works"))


def test_a_rank_that_fails_in_the_middle_is_noticed(monkeypatch):
    """Ranks that end a piece of work together share their mistakes; if one has ended it and another has not, none goes on."""
    import torch.distributed as dist

    other: list[object] = []

    def exchanged(found, mine, **_):
        found[:] = [pickle.loads(pickle.dumps(mine)), other[0]]

    monkeypatch.setattr(dist, "all_gather_object", exchanged)
    full, here = UserError("the disk is full", "empty it"), Ranks(0, 2)
    other[:] = [_Outcome(None)]
    here.refuse_together(None)
    with pytest.raises(UserError, match="the disk is full; empty it") as caught:
        here.refuse_together(full)
    assert not isinstance(caught.value, ApartError)
    other[:] = [_Outcome(full)]
    with pytest.raises(UserError, match="the disk is full; empty it") as caught:
        here.refuse_together(None)
    assert not isinstance(caught.value, ApartError)
    for call in (lambda: here.gather(3), lambda: here.total(1.0), lambda: here.leading(lambda: 1)):
        with pytest.raises(ApartError, match="the disk is full; empty it"):
            call()
    other[:] = [3]
    with pytest.raises(ApartError, match="the disk is full; empty it") as caught:
        here.refuse_together(full)
    with pytest.raises(ApartError, match="the disk is full; empty it"):
        here.refuse_together(caught.value)  # goes on up, without another exchange


def test_a_world_without_torchrun_is_refused(monkeypatch, capsys):
    """Clusters set WORLD_SIZE for programs of their own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    code, _, err = run_cli(capsys, "verify", "demo", "out")
    assert (code, err) == (
        2,
        "error: WORLD_SIZE is set, but LOCAL_RANK is not; start the command with torchrun, or unset WORLD_SIZE\n",
    )


def test_ranks_that_read_other_files_stop():
    two("x").agree("text", lambda: "x")
    with pytest.raises(UserError, match="rank 0 and rank 1 have read another text; every node needs the same files"):
        two("y").agree("text", lambda: "x")
    ALONE.agree("text", lambda: pytest.fail("one rank alone has nothing to compare"))


def test_what_runs_as_one_process_is_refused_on_several_ranks(pruned, data, tmp_path, monkeypatch, capsys):
    source, _ = pruned
    for module in ("expertsmith.ranks", "expertsmith.verbs.evaluate", "expertsmith.comparison.run"):
        monkeypatch.setattr(f"{module}.current", lambda: Ranks(0, 2))
    rule = "runs as one process, but torchrun started 2; run it without torchrun"
    with pytest.raises(UserError, match=f"evaluate --tasks {rule}"):
        api.evaluate(source, tasks=["hellaswag"])
    with pytest.raises(UserError, match=f"evaluate --generate {rule}"):
        api.evaluate(source, data, generate=4)
    with pytest.raises(UserError, match=f"compare --tasks {rule}"):
        api.compare(source, ["reap"], [0.5], data, data, tmp_path / "out", tasks=["hellaswag"])
    code, _, err = run_cli(capsys, "evaluate", source, "--speed")
    assert code == 2
    assert f"evaluate --speed {rule}" in err


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:1", 2, "--device cuda:1 names one GPU, but each rank has its own; use --device cuda"),
        ("auto", 1, "torchrun started 2 processes on this machine, but torch sees 1 GPUs; use --nproc-per-node 1"),
        ("cuda", 0, "torchrun started 2 processes on this machine, but torch sees 0 GPUs; use --device cpu"),
    ],
)
def test_every_rank_has_a_gpu_of_its_own(device, gpus, message, monkeypatch):
    import torch

    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=re.escape(message)):
        own_device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cuda") == "cuda:1"
    assert own_device("cpu") == "cpu"
    assert chosen == [1]
