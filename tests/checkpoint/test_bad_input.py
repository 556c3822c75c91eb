"""What a user gets wrong: one clear line, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import run_cli as run
from conftest import save_tiny
from expertsmith.arch import families
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError, install_line

SMALL = ["--seq-len", "24", "--no-pack", "--device", "cpu", "-q"]


def refused(capsys, *arguments: object) -> str:
    """The message of a command that has to end with exit code 2 and at most two lines, without a traceback."""
    code, _, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2, (code, err)
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture
def mixtral(checkpoints, tmp_path) -> Path:
    """A copy that may be damaged, in two shards."""
    target = tmp_path / "mixtral"
    shutil.copytree(checkpoints("mixtral"), target)
    tensors = load_file(target / "model.safetensors")
    names = sorted(tensors)
    half = len(names) // 2
    files = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, target / file, metadata={"format": "pt"})
    (target / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensor(folder: Path, name: str, change) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index[name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


def flow(capsys, mixtral: Path, data: list[str], tmp_path: Path) -> str:
    """The message of a `compress` that must leave nothing behind."""
    message = refused(capsys, "compress", mixtral, "-m", "reap", "-k", "0.5", "-d", data[0], "-o", tmp_path / "out", *SMALL)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    return message


def test_dense_model(capsys, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    assert "dense model" in refused(capsys, "inspect", tmp_path / "dense")


def test_refused_family_gives_its_reason(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "jetmoe"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "attention" in refused(capsys, "inspect", tmp_path)


def test_remote_code(capsys, mixtral):
    edit_config(mixtral, model_type="my_own_moe", auto_map={"AutoConfig": "configuration_x.X"})
    assert "code of its own" in refused(capsys, "inspect", mixtral)


def test_unknown_family_with_experts_offers_matches(capsys, mixtral):
    edit_config(mixtral, model_type="mixtrall")
    assert "did you mean mixtral" in refused(capsys, "inspect", mixtral)


def test_not_a_directory(capsys, tmp_path):
    assert "directory not found" in refused(capsys, "inspect", tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "file").write_text("x")
    assert "not a checkpoint directory" in refused(capsys, "inspect", tmp_path / "file")
    assert "no config.json" in refused(capsys, "inspect", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in refused(capsys, "inspect", tmp_path)
    assert "not a local directory" in refused(capsys, "inspect", "nobody/nothing")


def test_missing_shard(capsys, mixtral, data, tmp_path):
    (mixtral / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in flow(capsys, mixtral, data, tmp_path)


def test_truncated_shard(capsys, mixtral, data, tmp_path):
    file = mixtral / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in flow(capsys, mixtral, data, tmp_path)


@pytest.mark.parametrize("change", ["length", "offsets", "gap", "json", "dtype"])
def test_header_that_lies(capsys, mixtral, data, tmp_path, change):
    file = mixtral / "model-00001-of-00002.safetensors"
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    body = raw[8 + size :]
    if change == "length":
        file.write_bytes(struct.pack("<Q", 2**40) + raw[8:])
    else:
        if change == "offsets":
            header[name]["shape"][0] += 1
        elif change == "gap":
            for key, entry in header.items():
                if key not in ("__metadata__", name):
                    entry["data_offsets"] = [entry["data_offsets"][0] + 8, entry["data_offsets"][1] + 8]
            body += bytes(8)
        elif change == "dtype":
            header[name]["dtype"] = "F99"
        text = json.dumps(header).encode() if change != "json" else b"{" * size
        file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    message = flow(capsys, mixtral, data, tmp_path)
    assert "model-00001-of-00002.safetensors" in message


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_index_naming_a_file_outside(capsys, mixtral, data, tmp_path, shard):
    path = mixtral / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][EXPERT] = shard
    path.write_text(json.dumps(index))
    assert "outside the checkpoint directory" in flow(capsys, mixtral, data, tmp_path)


def test_index_naming_a_tensor_that_is_not_there(capsys, mixtral, data, tmp_path):
    path = mixtral / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    assert "lacks tensor 'model.extra'" in flow(capsys, mixtral, data, tmp_path)


def test_wrong_shape_of_an_expert(capsys, mixtral, data, tmp_path):
    edit_tensor(mixtral, EXPERT, lambda t: t[:-1].contiguous())
    assert EXPERT in flow(capsys, mixtral, data, tmp_path)


def test_wrong_shape_of_a_router(capsys, mixtral, data, tmp_path):
    name = "model.layers.1.block_sparse_moe.gate.weight"
    edit_tensor(mixtral, name, lambda t: t[:-1].contiguous())
    assert name in flow(capsys, mixtral, data, tmp_path)


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_wrong_shape_elsewhere(capsys, mixtral, data, tmp_path, memory):
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensor(mixtral, name, lambda t: t[:-1].contiguous())
    message = refused(capsys, "calibrate", mixtral, "-d", data[0], "-o", tmp_path / "s", "--memory", memory, *SMALL)
    assert "q_proj" in message
    assert "shape" in message


def test_missing_expert(capsys, mixtral, data, tmp_path):
    path = mixtral / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][EXPERT]
    path.write_text(json.dumps(index))
    assert "lacks w1.weight of expert 3" in flow(capsys, mixtral, data, tmp_path)


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_named(capsys, mixtral, data, tmp_path, memory, value):
    edit_tensor(mixtral, EXPERT, lambda t: t.index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(value)))
    message = refused(capsys, "calibrate", mixtral, "-d", data[0], "-o", tmp_path / "s", "--memory", memory, *SMALL)
    assert "NaN or inf" in message
    assert "decoder layer 1" in message


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_nan_in_the_first_layer_leaves_no_folder(capsys, mixtral, data, tmp_path, memory):
    edit_tensor(mixtral, EXPERT.replace("layers.1", "layers.0"), lambda t: t.fill_(float("nan")))
    line = ["calibrate", mixtral, "-d", data[0], "-o", tmp_path / "s", "--memory", memory, *SMALL]
    assert "decoder layer 0" in refused(capsys, *line)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("method", ["random", "aimer"])
def test_nan_is_named_without_calibration(capsys, mixtral, tmp_path, method):
    edit_tensor(mixtral, EXPERT, lambda t: t.fill_(float("nan")))
    code, _, err = run(capsys, "plan", mixtral, "-m", method, "-k", "8", "-o", tmp_path / "p.json", "-q")
    if method == "random":  # chooses without looking; `apply` looks
        assert code == 0
        err = refused(capsys, "apply", mixtral, tmp_path / "p.json", "-o", tmp_path / "out", "-q")
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))
    assert f"{EXPERT} has NaN or inf" in err


def test_pickle_only(capsys, checkpoints, data, tmp_path):
    source = tmp_path / "pickled"
    shutil.copytree(checkpoints("mixtral"), source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert "only pickle files" in refused(capsys, "inspect", source)
    code, out, _ = run(capsys, "inspect", source, "--allow-pickle")
    assert code == 0
    assert "Mixtral" in out
    arguments = ["-m", "reap", "-k", "0.5", "-d", data[0], "-o", tmp_path / "out", "--allow-pickle", *SMALL]
    code, _, err = run(capsys, "compress", source, *arguments)
    assert code == 0, err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_floats_that_config_json_calls_quantised(capsys, mixtral, data, tmp_path):
    edit_config(mixtral, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    calibrate = ["calibrate", mixtral, "-d", data[0], "-o", tmp_path / "s", *SMALL]
    for memory in ("stream", "resident"):
        assert "says quant_method 'fp8', but no tensor is quantised" in refused(capsys, *calibrate, "--memory", memory)
    assert not (tmp_path / "s").exists()


def test_pickle_that_would_run_code_is_not_run(capsys, checkpoints, tmp_path):
    source = tmp_path / "evil"
    shutil.copytree(checkpoints("mixtral"), source)
    (source / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Evil()}, source / "pytorch_model.bin")
    assert "weights_only" in refused(capsys, "inspect", source, "--allow-pickle")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("keep", "says"),
    [("1", "needs top_k=2"), ("0.1", "needs top_k=2"), ("9", "has only 8"), ("0", "at least one"), ("-3", "at least one"),
     ("-0.5", "at least one"), ("1.5", "at most 1.0"), ("half", "neither a ratio nor a count"), ("nan", "neither"), ("", "neither")],
)  # fmt: skip
def test_keep(capsys, mixtral, tmp_path, keep, says):
    assert says in refused(capsys, "plan", mixtral, "-m", "random", f"--keep={keep}", "-o", tmp_path / "p.json", "-q")
    assert not (tmp_path / "p.json").exists()


def test_keep_with_expert_groups(capsys, checkpoints, tmp_path):
    source = checkpoints("deepseek_v3")
    assert "do not divide into 2 expert_groups" in refused(
        capsys, "plan", source, "-m", "random", "-k", "5", "-o", tmp_path / "p", "-q"
    )
    assert "expert_groups with at least 2 each" in refused(
        capsys, "plan", source, "-m", "random", "-k", "2", "-o", tmp_path / "p", "-q"
    )
    assert (
        run(capsys, "plan", source, "-m", "random", "-k", "5", "--router-groups", "flatten", "-o", tmp_path / "p", "-q")[0] == 0
    )


def test_unknown_names(capsys, mixtral, tmp_path):
    out = ["-o", tmp_path / "p.json", "-q"]
    assert "did you mean reap" in refused(capsys, "plan", mixtral, "-m", "raep", "-k", "0.5", *out)
    assert "did you mean seed" in refused(capsys, "plan", mixtral, "-m", "random", "-k", "0.5", "-O", "sead=1", *out)
    assert "has no options" in refused(capsys, "plan", mixtral, "-m", "aimer", "-k", "0.5", "-O", "x=1", *out)
    assert "KEY=VALUE" in refused(capsys, "plan", mixtral, "-m", "random", "-k", "0.5", "-O", "seed", *out)
    assert "not of type int" in refused(capsys, "plan", mixtral, "-m", "random", "-k", "0.5", "-O", "seed=x", *out)
    assert "choose one of all, random, longest" in refused(
        capsys, "plan", mixtral, "-m", "easy_ep", "-k", "0.5", "-O", "demonstrations=some", *out
    )
    assert "uniform or global" in refused(capsys, "plan", mixtral, "-m", "random", "-k", "0.5", "--budget", "fair", *out)
    assert "needs calibration" in refused(capsys, "plan", mixtral, "-m", "reap", "-k", "0.5", *out)


def test_unknown_devices_and_words(capsys, mixtral, data, tmp_path):
    calibrate = ["calibrate", mixtral, "-d", data[0], "-o", tmp_path / "s", "--seq-len", "24", "--no-pack", "-q"]
    assert "torch sees" in refused(capsys, *calibrate, "--device", "cuda:7")
    assert "auto, cpu, cuda" in refused(capsys, *calibrate, "--device", "tpu9")
    assert "auto, resident or stream" in refused(capsys, *calibrate, "--memory", "big")
    assert "auto, float32 or bfloat16" in refused(capsys, *calibrate, "--dtype", "float31")
    assert "refuse or truncate or drop" in refused(capsys, *calibrate, "--overlong", "cut")


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "has no text"), ('{"text": "   "}\n', "has no text"), ('{"body": "x"}\n', "has the fields body"), ("{\n", "is not JSON"),
     ('[1]\n', "is a list"), ('{"text": "hello"}\n', "has no tokenizer"), ('{"input_ids": ["a"]}\n', "not a list of integers"),
     ('{"input_ids": [1, 2, 999]}\n', "vocabulary has 128"), ('{"input_ids": [' + ", ".join(["5"] * 30) + "]}\n", "more than the window of 24")],
)  # fmt: skip
def test_data(capsys, mixtral, tmp_path, content, says):
    (tmp_path / "d.jsonl").write_text(content)
    message = refused(capsys, "calibrate", mixtral, "-d", tmp_path / "d.jsonl", "-o", tmp_path / "s", *SMALL)
    assert says in message
    assert not (tmp_path / "s").exists()


def test_data_sources(capsys, mixtral, tmp_path):
    calibrate = ["calibrate", mixtral, "-o", tmp_path / "s", *SMALL]
    assert "no data given" in refused(capsys, *calibrate)
    assert "data file not found" in refused(capsys, *calibrate, "-d", tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    assert "holds no .jsonl" in refused(capsys, *calibrate, "-d", tmp_path / "empty")
    (tmp_path / "x.tsv").write_text("a")
    assert "data files are" in refused(capsys, *calibrate, "-d", tmp_path / "x.tsv")
    assert "number after the colon is 0" in refused(capsys, *calibrate, "-d", "a=b.jsonl:0")
    assert "hub data set" in refused(capsys, *calibrate, "-d", "nobody/nothing")
    (tmp_path / "d.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    assert "window of 256 positions" in refused(
        capsys, "calibrate", mixtral, "-o", tmp_path / "s", "-d", tmp_path / "d.jsonl", "--seq-len", "300", "-q"
    )


@pytest.fixture
def plan_file(capsys, mixtral, tmp_path) -> Path:
    assert run(capsys, "plan", mixtral, "-m", "random", "-k", "4", "-o", tmp_path / "plan.json", "-q")[0] == 0
    return tmp_path / "plan.json"


def test_plan_of_another_model(capsys, plan_file, checkpoints, tmp_path):
    source = save_tiny("mixtral", tmp_path / "other", initializer_range=0.3)
    assert "another checkpoint" in refused(capsys, "apply", source, plan_file, "-o", tmp_path / "out", "-q")
    assert "is for a mixtral model" in refused(capsys, "apply", checkpoints("olmoe"), plan_file, "-o", tmp_path / "out", "-q")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p["layers"][1]["keep"].append(1) or p["layers"][1].update(keep=[1, 1, 2, 3]), "names expert 1 twice"),
        (lambda p: p["layers"][1].update(keep=[0, 1, 2, 8]), "ids run from 0 to 7"),
        (lambda p: p["layers"][1].update(keep=[3, 2, 1, 0]), "ascending"),
        (lambda p: p["layers"][1].update(keep=[]), "at least one expert"),
        (lambda p: [entry.update(keep=[0]) for entry in p["layers"]], "router needs 2"),
        (lambda p: p["layers"].pop(), "has experts in layers"),
        (lambda p: p["layers"][0].update(note="x"), "unknown key"),
        (lambda p: p["layers"][0].update(saliency=[1.0]), "1 numbers for 8 experts"),
        (lambda p: p.update(format="other"), "not an expertsmith plan"),
        (lambda p: p.update(version=7), "version"),
        (
            lambda p: p["layers"][0].update(num_experts=4, keep=[0, 1, 2, 3], saliency=None),
            "has 4 experts, but the checkpoint has 8 there",
        ),
        (lambda p: p["layers"][0].update(skip_threshold=0.5), "no skip rule"),
    ],
)
def test_plan_edited_into_nonsense(capsys, mixtral, plan_file, tmp_path, change, says):
    raw = json.loads(plan_file.read_text())
    change(raw)
    plan_file.write_text(json.dumps(raw))
    assert says in refused(capsys, "apply", mixtral, plan_file, "-o", tmp_path / "out", "-q")
    assert not (tmp_path / "out").exists()


def test_plan_files(capsys, mixtral, tmp_path):
    out = ["-o", tmp_path / "out", "-q"]
    assert "no plan found at" in refused(capsys, "apply", mixtral, tmp_path / "none.json", *out)
    assert "is a folder" in refused(capsys, "apply", mixtral, tmp_path, *out)
    (tmp_path / "p.json").write_text("{")
    assert "not JSON" in refused(capsys, "apply", mixtral, tmp_path / "p.json", *out)


def test_uneven_expert_groups_are_refused(capsys, checkpoints, tmp_path):
    source = checkpoints("deepseek_v3")
    assert run(capsys, "plan", source, "-m", "random", "-k", "4", "-o", tmp_path / "p.json", "-q")[0] == 0
    raw = json.loads((tmp_path / "p.json").read_text())
    for entry in raw["layers"]:
        entry["keep"] = [0, 1, 2, 4]
    (tmp_path / "p.json").write_text(json.dumps(raw))
    assert "keeps [3, 1] experts of the 2 expert_groups" in refused(
        capsys, "apply", source, tmp_path / "p.json", "-o", tmp_path / "o", "-q"
    )


def test_output_exists(capsys, mixtral, plan_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "exists already" in refused(capsys, "apply", mixtral, plan_file, "-o", out, "-q")
    assert (out / "precious.txt").read_text() == "mine"
    assert run(capsys, "apply", mixtral, plan_file, "-o", out, "--overwrite", "-q")[0] == 0
    assert not (out / "precious.txt").exists()
    assert "overlap" in refused(capsys, "apply", mixtral, plan_file, "-o", mixtral, "--overwrite", "-q")
    assert "overlap" in refused(capsys, "apply", mixtral, plan_file, "-o", mixtral / "inside", "-q")


def test_disk_full_half_way(capsys, mixtral, plan_file, tmp_path, monkeypatch):
    from expertsmith.checkpoint import writer

    written = 0

    def full(sink, data, position):
        nonlocal written
        written += len(data)
        if written > 40_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return position + os.pwrite(sink, data, position)

    monkeypatch.setattr(writer, "write_all", full)
    assert "is full" in refused(capsys, "apply", mixtral, plan_file, "-o", tmp_path / "out", "-q")
    assert written > 40_000
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_disk_too_small_is_seen_before_writing(capsys, mixtral, plan_file, tmp_path, monkeypatch):
    from expertsmith.checkpoint import writer

    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert "GB free" in refused(capsys, "apply", mixtral, plan_file, "-o", tmp_path / "out", "-q")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_real_full_disk(mixtral, plan_file, tmp_path):
    """A file-size limit of the system half way through a shard: exit code, message, nothing left."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "sys.argv = ['expertsmith', 'apply', *sys.argv[1:]]; from expertsmith.cli import main; main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, mixtral, plan_file, "-o", tmp_path / "out", "-q"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_verify_fails_on_a_changed_weight(capsys, mixtral, plan_file, tmp_path):
    out = tmp_path / "out"
    assert run(capsys, "apply", mixtral, plan_file, "-o", out, "-q")[0] == 0
    verify = ["verify", mixtral, out, "--tokens", "64", "--device", "cpu", "-q"]
    assert run(capsys, *verify)[0] == 0
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    tensors[name][0, 0] += 1e-3
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    code, text, _ = run(capsys, *verify)
    assert code == 1
    assert "FAILED" in text
    assert name in " ".join(text.split())
    assert json.loads((out / "expertsmith" / "verify.json").read_text())["passed"] is False


def test_verify_fails_on_a_changed_config(capsys, mixtral, plan_file, tmp_path):
    out = tmp_path / "out"
    assert run(capsys, "apply", mixtral, plan_file, "-o", out, "-q")[0] == 0
    edit_config(out, rms_norm_eps=0.1)
    code, text, _ = run(capsys, "verify", mixtral, out, "--tokens", "64", "--device", "cpu", "-q")
    assert code == 1
    assert "rms_norm_eps" in text


def test_debug_shows_the_traceback(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "expertsmith", "inspect", str(tmp_path), "--debug"], capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "Traceback" in run.stderr


def test_memory_limits_of_the_process_are_seen():
    """A model that the machine could hold, but the process may not, is streamed."""
    code = (
        "import resource, torch, psutil; from pathlib import Path; from types import SimpleNamespace; from expertsmith.engine.devices import choose_memory; from expertsmith.checkpoint.reader import TensorInfo\n"
        "limit = psutil.Process().memory_info().vms + 600 * 2**20; resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "for numel in (2**20, 2**28):\n"
        "    model = SimpleNamespace(converted=False, config={}, numel=numel, tensors={'w': TensorInfo('w', 'F32', (numel,), Path('w'), 0, 4 * numel)}, path=Path('.'), source='m', read=None)\n"
        "    print(choose_memory('auto', [model], torch.device('cpu'), 'float32'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["resident", "stream"]


def test_out_of_memory_of_any_kind_is_recognised():
    import torch

    from expertsmith.cli import _out_of_memory

    assert _out_of_memory(MemoryError())
    assert _out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not _out_of_memory(OSError(errno.EACCES, "Permission denied"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert _out_of_memory(caught.value)
    assert not _out_of_memory(RuntimeError("shapes do not match"))


def test_unknown_tensors_that_run_over_experts_are_named(capsys, mixtral):
    """Better no checkpoint than one with a tensor that still has a row for every dropped expert."""
    name = "model.layers.1.mlp.experts.zero_points"
    tensors = load_file(mixtral / "model-00001-of-00002.safetensors")
    save_file({**tensors, name: torch.zeros(8, 3)}, mixtral / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    path = mixtral / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    assert f"{name} seems to be stacked over the 8 experts" in refused(capsys, "inspect", mixtral)


def test_a_full_disk_is_said_wherever_it_happens(capsys, mixtral, tmp_path, monkeypatch):
    from expertsmith.planning.plan import Plan

    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Plan, "save", full)
    assert "disk is full" in refused(capsys, "plan", mixtral, "-m", "random", "-k", "4", "-o", tmp_path / "p.json", "-q")


# ---- packages that are not installed


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ImportError("Loading an AutoRound quantized model requires auto-round library (`pip install 'auto-round>=0.5'`)"), "pip install 'auto-round>=0.5'"),
        (ImportError("x requires gptqmodel. Please install it with `pip install gptqmodel`"), "pip install gptqmodel"),
        (ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`."), "pip install tiktoken"),
        (ImportError("\nLlamaTokenizer requires the SentencePiece library but it was not found in your environment. Check"), "pip install sentencepiece"),
        (ModuleNotFoundError("No module named 'mamba_ssm'", name="mamba_ssm.ops"), "pip install mamba-ssm"),
        (ModuleNotFoundError("No module named 'google'", name="google.protobuf"), "pip install protobuf"),
        (RuntimeError("size mismatch"), None),
        (ImportError("cannot import name 'x'"), None),
    ],
)  # fmt: skip
def test_the_package_behind_an_error(error: Exception, line: str | None) -> None:
    assert install_line(error) == line
    outer = RuntimeError("Failed to import x")
    outer.__cause__ = error
    assert install_line(outer) == line


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_a_model_that_needs_a_package(memory, checkpoints, monkeypatch):
    """Its name and how to get it, and no word of damage; a package without an install line is told as transformers tells it."""
    from expertsmith.engine import loading

    def fails(error):
        def build(*_, **__):
            raise error

        monkeypatch.setattr(
            loading, "causal_lm", lambda config: (SimpleNamespace(from_pretrained=build, from_config=build), config)
        )
        with pytest.raises(UserError) as refused:
            loading.load_model(open_checkpoint(checkpoints("mixtral")), families()["mixtral"], memory=memory)
        assert "needs a package that is not installed" in str(refused.value)
        assert "damaged" not in str(refused.value)
        return refused.value.remedy

    assert (
        fails(ImportError("MambaMixer requires the timm library but it was not found in your environment."))
        == "pip install timm"
    )
    assert fails(ImportError("Using FP8 on XPU requires kernels (`pip install kernels`)")) == "pip install kernels"
    assert fails(ImportError("flash_attn seems to be of an old version")) == "install the package in this message"


def test_a_tokenizer_that_needs_a_package(tmp_path, monkeypatch):
    import transformers

    from expertsmith.calibration import data

    def missing(*_, **__):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", missing)
    (tmp_path / "tiktoken.model").write_text("")
    with pytest.raises(UserError, match=r"needs a package that is not installed.*; pip install tiktoken$"):
        data.load_tokenizer(tmp_path)
    monkeypatch.setattr(data, "_is_installed", lambda module: module == "sentencepiece")
    (tmp_path / "tokenizer.model").write_text("")
    with pytest.raises(UserError, match=r"convert tokenizer\.model first; pip install protobuf tiktoken$"):
        data.load_tokenizer(tmp_path)
