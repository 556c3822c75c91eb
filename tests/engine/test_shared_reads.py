"""Several nodes with one disk: each rank reads its share of a layer, all get the same bytes, and a rank that fails leaves none waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import save_tiny
from expertsmith import api
from expertsmith.arch import families
from expertsmith.calibration.stats import load_statistics
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import load_model, shared_reads
from expertsmith.ranks import Ranks
from quantise import WIDE, quantise_checkpoint

SCRIPT = """
import os, sys
os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if each rank were on a node of its own
from expertsmith.checkpoint import ahead, reader
from expertsmith.engine import loading, shared_reads
rank, trouble, read = int(os.environ["RANK"]), sys.argv[1], []
fill = shared_reads.fill

def counted(view, info, start):
    read.append(len(view))
    if trouble == "disk" and rank == 1 and "layers.1." in info.name:
        raise shared_reads.UserError("the disk is gone", "fetch it")
    if trouble == "defect" and rank == 1 and "layers.1." in info.name:
        raise RuntimeError("a defect")
    fill(view, info, start)

from expertsmith.errors import UserError
shared_reads.UserError = UserError
shared_reads.fill = counted
if trouble == "killed" and rank == 1:
    own = loading.LoadedModel.release
    def release(self, index):
        if index == 1 and self.shared is not None:
            os._exit(9)
        own(self, index)
    loading.LoadedModel.release = release
sys.argv = ["expertsmith", *sys.argv[2:]]
from expertsmith.cli import main
try:
    main()
finally:
    os.write(2, f"bytes {rank} {sum(read)}\\n".encode())  # in one piece: the ranks share stderr
"""


def torchrun(folder: Path, trouble: str, *words: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return subprocess.run(
        [*command, str(folder / "script.py"), trouble, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("model") / "model", num_hidden_layers=4)


def shares_read(done: subprocess.CompletedProcess[str]) -> list[int]:
    lines = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("bytes ")]
    return [int(count) for _, count in sorted(lines)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_reads_its_share(ranks, model, data, tmp_path):
    """calibrate: the statistics of one process up to the order of sums, from 1 / ranks of the bytes each."""
    shape = ["--seq-len", 24, "--batch-tokens", 72, "--no-pack", "--device", "cpu", "--memory", "stream"]
    texts = [word for spec in data for word in ("-d", spec)]
    done = torchrun(tmp_path, "none", "calibrate", model, *texts, *shape, "-o", tmp_path / "many", ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    stored = sum(info.nbytes for name, info in open_checkpoint(model).tensors.items() if ".layers." in name)
    read = shares_read(done)
    assert len(read) == ranks
    assert sum(read) == stored
    assert all(abs(count - stored / ranks) < 0.05 * stored / ranks + 4 * 64 * ranks for count in read)
    one = api.calibrate(model, data, tmp_path / "one", seq_len=24, batch_tokens=72, pack=False, device="cpu", memory="stream")
    many = load_statistics(tmp_path / "many")
    for layer, entry in one.layers.items():
        for domain, values in entry.domains.items():
            for name, value in values.items():
                assert many.layers[layer].domains[domain][name] == pytest.approx(value, rel=1e-6, abs=1e-9), (layer, name)


@pytest.mark.slow
def test_ranks_without_batches_walk_along(model, data, tmp_path):
    """verify with one batch and evaluate with few, on four ranks; their results are those of one process."""
    plan = api.plan(model, "random", 0.5)
    api.apply(model, plan, tmp_path / "half")
    common = ["--device", "cpu", "--memory", "stream", "--json"]
    lines = {
        "verify": ["verify", model, tmp_path / "half", "--tokens", 64, *common],
        "evaluate": [
            "evaluate",
            tmp_path / "half",
            "-r",
            model,
            "-d",
            data[0],
            "--seq-len",
            23,
            "--batch-tokens",
            200,
            *common,
        ],
    }
    for name, line in lines.items():
        done = torchrun(tmp_path, "none", *line, ranks=4)
        assert done.returncode == 0, done.stderr[-3000:]
        assert all(count > 0 for count in shares_read(done))
        found = json.loads(done.stdout)
        if name == "verify":
            assert found["passed"]
        else:
            here = api.evaluate(tmp_path / "half", data[:1], reference=model, seq_len=23, batch_tokens=200, device="cpu")
            assert found["mean"]["loss"] == pytest.approx(here.to_json()["mean"]["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "message"),
    [("disk", "the disk is gone; fetch it"), ("defect", "a defect"), ("killed", "another rank no longer answers")],
)
def test_a_rank_that_fails_leaves_none_waiting(trouble, message, model, data, tmp_path):
    line = ["calibrate", model, "-d", data[0], "--seq-len", 24, "--batch-tokens", 48, "--device", "cpu", "--memory", "stream"]
    done = torchrun(tmp_path, trouble, *line, "-o", tmp_path / "out")
    assert done.returncode != 0
    assert message in done.stderr, done.stderr[-3000:]


# ---- without processes: what is gathered is what is on disk


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", [None, "fp8_block"])
def test_gathered_bytes_are_those_of_the_files(ranks, kind, tmp_path):
    source = save_tiny("mixtral", tmp_path / "plain", **(WIDE["mixtral"] if kind else {}))
    if kind:
        quantise_checkpoint(source, tmp_path / "model", kind)
        source = tmp_path / "model"
    loaded = load_model(open_checkpoint(source), families()["mixtral"], memory="stream", device="cpu")

    class Alone(Ranks):
        def side_by_side(self, mine):  # what the others read, too
            others = [shared_reads.SharedReads(loaded.weights, loaded.groups, Ranks(rank, ranks)) for rank in range(ranks)]
            parts = [torch.frombuffer(other._read_share(layer), dtype=torch.uint8) for other in others]
            assert torch.equal(parts[self.rank], mine)
            return torch.cat(parts)

        def gather(self, mine):
            return [mine]

    for rank in range(ranks):
        reads = shared_reads.SharedReads(loaded.weights, loaded.groups, Alone(rank, ranks))
        for layer in range(len(loaded.layers)):
            reads.begin(layer)
            reads.gather(layer)
            for name in loaded.groups[layer]:
                assert torch.equal(reads.take(name).float(), loaded.weights.read(name).float()), name
            reads.end()
        assert torch.equal(reads.take("model.norm.weight"), loaded.weights.read("model.norm.weight"))


def test_when_reads_are_shared(model, monkeypatch):
    """By a streamed model, on several nodes, whose files are the same by their inodes, if all have the memory."""
    loaded = load_model(open_checkpoint(model), families()["qwen2_moe"], memory="stream", device="cpu")

    def shared(*told: object, local: int = 1, memory: str = "stream") -> bool:
        given = iter(told)

        class Two(Ranks):
            def gather(self, mine):
                theirs = next(given)
                return [mine, mine if theirs == "same" else theirs]

        monkeypatch.setattr(shared_reads, "on_this_machine", lambda: local)
        with shared_reads.sharing(
            [loaded if memory == "stream" else SimpleNamespace(**vars(resident), reads_on_demand=False)], Two(0, 2)
        ) as yes:
            assert (loaded.shared is not None) == yes
            return yes

    resident = SimpleNamespace(memory="resident", weights=loaded.weights, groups=loaded.groups)
    assert shared("same", True)
    assert not shared(local=2)  # one node
    assert not shared((True, []))  # other files
    assert not shared("same", False)  # no memory on the other
    assert not shared("same", memory="resident")
    assert loaded.shared is None
