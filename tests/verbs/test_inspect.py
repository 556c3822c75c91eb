"""The numbers of inspect, against the loaded model and the pruned checkpoint."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from conftest import passed, strict
from expertsmith import api

SIZED = pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "dbrx"])
ROUTED = (".experts.", ".input_linear.", ".output_linear.")


pytestmark = pytest.mark.usefixtures("wide")


@SIZED
def test_inspect_counts_the_parameters_of_the_loaded_model(capsys, checkpoints, model_type):
    import transformers

    source = checkpoints(model_type)
    facts = strict(passed(capsys, "inspect", source, "--json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    stored = dict(model.named_parameters())  # tied parameters come once
    stored |= {name: value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")}
    total = sum(value.numel() for value in stored.values())
    routed = sum(
        value.numel() for name, value in stored.items() if any(part in name for part in ROUTED) and "shared" not in name
    )
    assert facts["parameters"]["total"] == total
    assert facts["parameters"]["routed_experts"] == routed
    assert facts["parameters"]["active"] == total - routed * (8 - 2) // 8
    assert facts["bytes"] == 4 * total
    assert (facts["num_experts"], facts["top_k"], facts["layers"]) == (8, 2, 3)
    assert facts["moe_layers"] == ([1, 2] if model_type == "deepseek_v3" else [0, 1, 2])
    assert facts["shared_experts"] == (1 if model_type == "deepseek_v3" else 0)


@SIZED
def test_inspect_foretells_the_size_of_the_pruned_checkpoint(capsys, checkpoints, model_type, tmp_path):
    source = checkpoints(model_type)
    facts = strict(passed(capsys, "inspect", source, "--json"))
    assert [row["experts"] for row in facts["keep_ratios"]] == ([6, 4] if model_type == "deepseek_v3" else [7, 6, 5, 4, 3, 2])
    for row in facts["keep_ratios"]:
        out = tmp_path / str(row["experts"])
        made = api.plan(source, "random", row["experts"])
        api.apply(source, made, out)
        parameters = nbytes = 0
        for file in out.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_tensor(name)
                    parameters += tensor.numel()
                    nbytes += tensor.nbytes
        assert (row["parameters"], row["bytes"]) == (parameters, nbytes)
        assert made.summary.parameters == (facts["parameters"]["total"], parameters)
        assert made.summary.bytes == (facts["bytes"], nbytes)
        assert strict(passed(capsys, "inspect", out, "--json"))["parameters"]["total"] == parameters


def test_inspect_says_the_same_to_people(capsys, checkpoints):
    facts = api.inspect(checkpoints("deepseek_v3"))
    text = passed(capsys, "inspect", checkpoints("deepseek_v3"))
    assert f"{facts['parameters']['total'] / 1e3:.2f} k total" in text
    assert f"{facts['bytes'] / 1e3:.2f} kB" in text
    assert "3, of which 2 with experts (1–2)" in text
    assert "sigmoid, selection bias, 1 of 2 expert_groups" in text
    assert f"{facts['least_experts']} experts per layer must be kept" in text
