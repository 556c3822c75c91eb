"""The command line of healing, bad input, and trained models."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import DEVICE, run_cli, save_tiny
from expertsmith import api
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.healing.pair import check_pair
from to_heal import SHAPE


def test_compress_heals(checkpoints, brief, tmp_path, capsys):
    arguments = [
        "compress",
        checkpoints("mixtral"),
        "-m",
        "frequency",
        "-k",
        4,
        *(part for text in brief for part in ("-d", text)),
        "-e",
        brief[0],
    ]
    code, out, err = run_cli(
        capsys, *arguments, "--heal", "least_squares", "-o", tmp_path / "out", "--device", DEVICE, "--json", "-q"
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["verify"]["passed"]
    assert result["heal"]["method"] == "least_squares"
    held = result["heal"]["held_out"]
    assert held["after"]["mean"]["kl"] < held["before"]["mean"]["kl"]
    assert "## Healed" in (tmp_path / "out" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    code, _, err = run_cli(capsys, *arguments, "--heal", "lora", "-o", tmp_path / "other")
    assert code == 2
    assert "layer by layer" in err


def test_the_command(half, checkpoints, brief, tmp_path, capsys):
    common = ["heal", half, "-t", checkpoints("mixtral"), "--seq-len", 24, "--no-pack", "--device", DEVICE]
    code, out, err = run_cli(capsys, *common, "-d", brief[0], "-o", tmp_path / "json", "--json")
    assert code == 0, err
    assert json.loads(out)["out"] == str(tmp_path / "json")
    code, out, err = run_cli(capsys, *common, "-d", brief[0], "-o", tmp_path / "text", "-O", "sweeps=1")
    assert code == 0, err
    assert "healed by least_squares" in out
    assert "KL before" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "least_square"], "did you mean least_squares"),
        (["-O", "sweep=3"], "did you mean sweeps"),
        (["-O", "sweeps=0"], "give 1 or more"),
        (["-m", "router", "-O", "temperature=0"], "give more than 0"),
        (["-m", "router", "-O", "kl=0"], "nothing to learn"),
        (["-m", "layer_local", "--dtype", "bfloat16"], "use --dtype float32"),
        (["-m", "router", "--memory", "stream"], "gradients through the whole model"),
        (["-m", "lora", "-O", "targets=attention,head"], "choose among attention"),
        (["-m", "lora", "-O", "targets=shared"], "has no shared"),
    ],
)
def test_bad_options(arguments, message, half, checkpoints, brief, tmp_path, capsys):
    common = ["heal", half, "-t", checkpoints("mixtral"), "-d", brief[0], "--seq-len", 24, "--no-pack", "--device", DEVICE]
    code, _, err = run_cli(capsys, *common, "-o", tmp_path / "out", *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()[-1]) > 0
    assert not (tmp_path / "out").exists()


def test_no_data(half, checkpoints, tmp_path, capsys):
    code, _, err = run_cli(capsys, "heal", half, "-t", checkpoints("mixtral"), "-o", tmp_path / "out")
    assert code == 2
    assert "no data" in err


def test_teacher_and_student_have_to_match(half, checkpoints, brief, tmp_path):
    save_tiny("mixtral", tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(UserError, match=r"decoder layers 4 of .* and 3 of"):
        api.heal(half, tmp_path / "deeper", brief, tmp_path / "out", **SHAPE)
    save_tiny("mixtral", tmp_path / "wider", hidden_size=64)
    with pytest.raises(UserError, match=r"hidden size 64 of .* and 32 of"):
        api.heal(half, tmp_path / "wider", brief, tmp_path / "out", **SHAPE)
    save_tiny("mixtral", tmp_path / "words", vocab_size=256)
    with pytest.raises(UserError, match=r"vocabulary 256 of .* and 128 of"):
        api.heal(half, tmp_path / "words", brief, tmp_path / "out", **SHAPE)
    assert not (tmp_path / "out").exists()


def test_only_the_original_is_a_teacher(half, checkpoints, brief, tmp_path):
    """A twin with one other tensor, and the compressed model itself; a start that failed leaves nothing that blocks the next."""
    shutil.copytree(checkpoints("mixtral"), tmp_path / "twin")
    tensors = load_file(tmp_path / "twin" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "twin" / "model.safetensors", metadata={"format": "pt"})
    for teacher in (tmp_path / "twin", half):
        with pytest.raises(UserError, match="is not the original of"):
            api.heal(half, teacher, brief, tmp_path / "out", **SHAPE)
        assert not list(tmp_path.glob("out*"))
    few = tmp_path / "few.jsonl"
    few.write_text('{"input_ids": [5, 6, 7]}\n')
    with pytest.raises(UserError):
        api.heal(half, checkpoints("mixtral"), [f"a={few}"], tmp_path / "out", **SHAPE)
    assert not list(tmp_path.glob("out*"))
    api.heal(half, checkpoints("mixtral"), brief, tmp_path / "out", **SHAPE)
    assert (tmp_path / "out" / "config.json").exists()


def test_the_original_of_the_original_is_a_teacher_too(checkpoints, half, brief, tmp_path):
    """A → B → healed B → C: what C's plans name may teach C; others may not, and without the earlier plans only its own source may."""
    first, healed, last = checkpoints("mixtral"), tmp_path / "healed", tmp_path / "last"
    api.heal(half, first, brief, healed, **SHAPE)
    api.apply(healed, api.plan(healed, "random", 3), last)
    (earlier,) = (last / "expertsmith" / "earlier").iterdir()
    assert earlier.stem == open_checkpoint(healed).fingerprint.removeprefix("sha256:")
    assert earlier.read_text() == (half / "expertsmith" / "plan.json").read_text()
    for name, teacher in (("a", first), ("b", healed)):
        report = api.heal(last, teacher, brief, tmp_path / name, **SHAPE)
        assert report["teacher"]["fingerprint"] == open_checkpoint(teacher).fingerprint
        assert (tmp_path / name / "expertsmith" / "earlier" / earlier.name).read_text() == earlier.read_text()
    for stranger in (half, last):  # half is not what C was made from: its healed twin is
        with pytest.raises(UserError, match=r"is not the original of .*names sha256:\w+, made from sha256:\w+"):
            api.heal(last, stranger, brief, tmp_path / "out", **SHAPE)
    api.apply(last, api.plan(last, "random", 2), tmp_path / "fourth")
    assert len(list((tmp_path / "fourth" / "expertsmith" / "earlier").iterdir())) == 2
    check_pair(open_checkpoint(tmp_path / "fourth"), open_checkpoint(first))
    earlier.unlink()
    with pytest.raises(UserError, match="is not the original of"):
        api.heal(last, first, brief, tmp_path / "out", **SHAPE)


def test_output_that_exists_or_is_a_model(half, checkpoints, brief, tmp_path):
    for out in (half, checkpoints("mixtral")):
        with pytest.raises(UserError):
            api.heal(half, checkpoints("mixtral"), brief, out, overwrite=True, **SHAPE)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        api.heal(half, checkpoints("mixtral"), brief, tmp_path / "out", **SHAPE)
    (tmp_path / "other.work").mkdir()
    (tmp_path / "other.work" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="contains files that are not"):
        api.heal(half, checkpoints("mixtral"), brief, tmp_path / "other", resume=False, **SHAPE)
    assert (tmp_path / "other.work" / "thesis.txt").exists()


def test_codes_without_scales_are_not_healed(checkpoints, brief, tmp_path):
    model = tmp_path / "fp8"
    shutil.copytree(checkpoints("mixtral"), model)
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "experts.0.w2" in name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is F8_E4M3, but it has no scales and no decoder"):
        api.heal(model, checkpoints("mixtral"), brief, tmp_path / "out", **SHAPE)


def test_peft_missing(half, checkpoints, brief, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'pip install "expertsmith\[heal\]"'):
        api.heal(half, checkpoints("mixtral"), brief, tmp_path / "out", method="lora", **SHAPE)


@pytest.mark.testbed
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_trained_models(model_type, testbed, tmp_path):
    """Half of the experts by REAP: least squares leaves at most half of the loss's rise on held-out text."""
    model, corpus = testbed / "models" / model_type, testbed / "data" / "corpus"
    names = ("math", "spanish")
    calib = [f"{name}={corpus / name / 'calib.jsonl'}" for name in names]
    shape = {"samples": 24, "seq_len": 128, "device": DEVICE}
    stats = api.calibrate(model, calib, tmp_path / "stats", dtype="float32", **shape)
    api.apply(model, api.plan(model, "reap", 0.5, stats=stats), tmp_path / "half")
    held = [f"{name}={corpus / name / 'heldout.jsonl'}" for name in names]
    quality = api.heal(tmp_path / "half", model, calib, tmp_path / "healed", eval_data=held, **shape)["quality"]
    rise = {when: quality[when]["mean"]["loss"] - quality[when]["mean"]["reference_loss"] for when in ("before", "after")}
    assert rise["after"] < 0.5 * rise["before"]


@pytest.mark.testbed
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_trained_models_in_fp8_keep_what_healing_gains(model_type, testbed, tmp_path):
    """Half of the experts of an FP8-block checkpoint by REAP: healed experts in FP8 again keep 0.9 of the gain that bfloat16 has."""
    from quantise import quantise_checkpoint

    corpus = testbed / "data" / "corpus"
    calib = [f"{name}={corpus / name / 'calib.jsonl'}" for name in ("math", "spanish")]
    held = [f"{name}={corpus / name / 'heldout.jsonl'}" for name in ("math", "spanish")]
    shape = {"samples": 24, "seq_len": 128, "device": DEVICE}
    model = tmp_path / "fp8"
    quantise_checkpoint(testbed / "models" / model_type, model, "fp8_block_128")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(testbed / "models" / model_type / file, model / file)
    stats = api.calibrate(model, calib, tmp_path / "stats", dtype="float32", **shape)
    api.apply(model, api.plan(model, "reap", 0.5, stats=stats), tmp_path / "half")
    rise = {}
    for requantise in (False, True):
        target = tmp_path / f"healed-{requantise}"
        found = api.heal(tmp_path / "half", model, calib, target, requantise=requantise, eval_data=held, **shape)["quality"]
        for when in ("before", "after"):
            rise[when, requantise] = found[when]["mean"]["loss"] - found[when]["mean"]["reference_loss"]
    plain, again = (rise["before", kind] - rise["after", kind] for kind in (False, True))
    assert plain > 0
    assert again >= 0.9 * plain


def test_a_measure_that_got_worse_is_said():
    from expertsmith.healing.run import _mixed

    def quality(loss: float, kl: float) -> dict:
        return {"domains": {"a": {"loss": loss, "kl": kl, "tokens": 10}}}

    assert _mixed(quality(2.0, 0.5), quality(1.9, 0.4), "kl") == ""
    said = _mixed(quality(2.0, 0.5), quality(2.1, 0.4), "kl")
    assert said.startswith(
        "KL divergence decides, and fell from 0.5000 to 0.4000 on the held-out tokens; but their loss rose from 2.0000 to 2.1000"
    )
    assert "but their KL divergence rose" in _mixed(quality(2.0, 0.5), quality(1.9, 0.6), "loss")
