"""The flow from a model to a proven checkpoint: compress against the single commands, and what it chooses itself."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import CALIBRATION, passed, strict
from conftest import run_cli as run
from expertsmith import api
from expertsmith.planning.plan import load_plan

SMALL = ["--seq-len", "24", "--no-pack", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("wide")


def test_compress_is_the_single_commands_in_a_row(capsys, checkpoints, data, tmp_path):
    source = checkpoints("qwen3_moe")
    flags = [flag for spec in data for flag in ("-d", spec)]
    one = strict(
        passed(capsys, "compress", source, "-m", "easy_ep", "-k", "50%", *flags, "-o", tmp_path / "one", *SMALL, "-q", "--json")
    )
    passed(capsys, "calibrate", source, *flags, "-o", tmp_path / "stats", *SMALL, "-q")
    passed(capsys, "plan", source, "-m", "easy_ep", "-k", "50%", "-s", tmp_path / "stats", "-o", tmp_path / "plan.json", "-q")
    passed(capsys, "apply", source, tmp_path / "plan.json", "-o", tmp_path / "two", "-q")
    passed(capsys, "verify", source, tmp_path / "two", "--device", "cpu", "-q")
    held = ["--seq-len", "24", "--device", "cpu", "-q", "--json"]
    quality = strict(passed(capsys, "evaluate", tmp_path / "two", "-r", source, *flags, *held))

    assert load_plan(tmp_path / "plan.json").dumps() == (tmp_path / "one" / "expertsmith" / "plan.json").read_text()
    for name in ("model.safetensors", "config.json", "expertsmith/plan.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert one["verify"]["passed"] is True
    assert one["quality"]["domains"] == quality["domains"]
    assert one["quality"]["held_out"] is False
    card = (tmp_path / "one" / "README.md").read_text()
    for domain, row in quality["domains"].items():
        assert f"{domain} {row['perplexity']:.2f} (base {row['reference_perplexity']:.2f})" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "plan.json", "stats", "two"]


def test_what_compress_wrote_is_loaded_by_transformers_with_half_of_the_experts(capsys, checkpoints, data, tmp_path):
    import transformers

    source = checkpoints("qwen3_moe")
    line = ["compress", source, "-m", "reap", "-k", "4", "-d", data[0], "-e", data[1], "-o", tmp_path / "out", *SMALL, "-q"]
    text = passed(capsys, *line)
    assert "verify: passed" in text
    assert "held-out text" in text
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_experts == 4
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    assert f"{tmp_path / 'out.work'} is removed" in text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_method_without_data_needs_none(capsys, checkpoints, tmp_path):
    found = strict(
        passed(capsys, "compress", checkpoints("mixtral"), "-m", "aimer", "-k", "0.5", "-o", tmp_path / "out", "-q", "--json")
    )
    assert found["quality"] is None
    assert "calibrate" not in found["seconds"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_options_of_a_method_reach_it(capsys, checkpoints, tmp_path):
    source = checkpoints("mixtral")
    plans = []
    for seed in (1, 2):
        found = strict(
            passed(
                capsys,
                "plan",
                source,
                "-m",
                "random",
                "-k",
                "4",
                "-O",
                f"seed={seed}",
                "-o",
                tmp_path / f"p{seed}",
                "-q",
                "--json",
            )
        )
        assert found["method"]["options"] == {"budget": "uniform", "keep": 4, "seed": seed}
        plans.append([entry["keep"] for entry in found["layers"]])
    assert plans[0] != plans[1]


def test_a_pickle_checkpoint_is_compressed_and_measured(capsys, checkpoints, data, tmp_path):
    source = tmp_path / "pickled"
    shutil.copytree(checkpoints("mixtral"), source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    line = [
        "compress",
        source,
        "-m",
        "reap",
        "-k",
        "4",
        "-d",
        data[0],
        "-o",
        tmp_path / "out",
        "--allow-pickle",
        *SMALL,
        "-q",
        "--json",
    ]
    found = strict(passed(capsys, *line))
    assert found["verify"]["passed"]
    assert found["quality"]["domains"]["a"]["kl"] > 0


def test_a_checkpoint_in_the_work_folder_that_was_cut_off_blocks_no_run(capsys, checkpoints, data, tmp_path):
    """A run that is killed while it writes OUT.work/unhealed leaves OUT.work/unhealed.work."""
    left = tmp_path / "out.work" / "unhealed.work" / "writing"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    line = ["compress", checkpoints("mixtral"), "-m", "reap", "-k", "4", "--heal", "least_squares", "-d", data[0]]
    passed(capsys, *line, "-o", tmp_path / "out", "--seq-len", "24", "--device", "cpu", "--no-measure", "-q")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def rows(path, low, high, count=16):
    path.write_text(
        "".join(json.dumps({"input_ids": [low + (7 * i + j) % (high - low) for j in range(20)]}) + "\n" for i in range(count))
    )
    return path


def test_compress_needs_a_model_text_and_an_output_only(capsys, checkpoints, tmp_path):
    """One labelled domain: easy_ep, half of the experts, and every eighth record held out."""
    file = rows(tmp_path / "m.jsonl", 3, 60)
    found = strict(
        passed(capsys, "compress", checkpoints("mixtral"), "-d", f"math={file}", "-o", tmp_path / "out", *SMALL, "--json")
    )
    assert found["plan"]["method"]["name"] == "easy_ep"
    assert found["plan"]["summary"]["experts"] == [24, 12]
    assert found["quality"]["held_out"] is True
    assert found["quality"]["domains"]["math"]["tokens"] == 2 * 20 - 1  # two records of 16, packed
    assert any(f"math={file}#heldout" in note for note in found["notes"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "held-out" in card
    made = api.calibrate(checkpoints("mixtral"), [f"math={file}#calib"], tmp_path / "stats", **CALIBRATION)
    assert made.header["data"]["sequences"] == {"math": 14}
    kept = api.plan(checkpoints("mixtral"), "easy_ep", 0.5, stats=made).kept
    assert [entry["keep"] for entry in found["plan"]["layers"]] == list(kept.values())


@pytest.mark.parametrize(
    ("labels", "more", "method", "experts"),
    [
        ([""], [], "reap", 12),
        (["a=", "b="], [], "reap", 12),
        ([""], ["-m", "moeits"], "moeits", None),  # its own threshold
        ([""], ["-m", "moeits", "--budget", "uniform"], "moeits", 12),
        ([""], ["-k", "6"], "reap", 18),
        (["a="], ["-m", "reap"], "reap", 12),
    ],
)
def test_what_is_not_given_is_chosen_and_said(labels, more, method, experts, capsys, checkpoints, tmp_path):
    data = [f"--data={label}{rows(tmp_path / f'{i}.jsonl', 3 + 50 * i, 50 + 50 * i)}" for i, label in enumerate(labels)]
    line = ["compress", checkpoints("mixtral"), *data, *more, "-o", tmp_path / "out", *SMALL, "--no-measure", "--json"]
    found = strict(passed(capsys, *line))
    assert found["plan"]["method"]["name"] == method
    assert experts is None or found["plan"]["summary"]["experts"] == [24, experts]
    assert any(note.startswith(f"method {method}, because") for note in found["notes"]) == ("-m" not in more)
    assert any(note.startswith("keep 0.5, because") for note in found["notes"]) == ("-k" not in more and experts == 12)
    assert not any("held out" in note for note in found["notes"])  # nothing is measured


def test_a_source_of_few_records_measures_on_itself_and_says_so(capsys, checkpoints, tmp_path):
    file = rows(tmp_path / "few.jsonl", 3, 60, count=7)
    found = strict(passed(capsys, "compress", checkpoints("mixtral"), "-d", file, "-o", tmp_path / "out", *SMALL, "--json"))
    assert found["quality"]["held_out"] is False
    assert any("fewer than eight records" in note for note in found["notes"])


def test_a_method_without_calibration_measures_on_text_that_is_held_out(capsys, checkpoints, tmp_path):
    file = rows(tmp_path / "m.jsonl", 3, 60)
    line = ["compress", checkpoints("mixtral"), "-m", "aimer", "-d", file, "-o", tmp_path / "out", *SMALL, "--json"]
    found = strict(passed(capsys, *line))
    assert found["quality"]["held_out"] is True
    assert found["quality"]["domains"]["default"]["tokens"] == 16 * 20 - 1  # all records


def test_compress_without_text_says_what_it_needs(capsys, checkpoints, tmp_path):
    code, _, err = run(capsys, "compress", checkpoints("mixtral"), "-o", tmp_path / "out")
    assert code == 2
    assert "compress needs text; pass --data FILE" in err
