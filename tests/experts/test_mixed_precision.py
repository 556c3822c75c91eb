"""Experts of different precision: the names in a quantisation config follow the experts, in config.json and beside it."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import DEVICE, run_cli, save_tiny
from expertsmith import api
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory, take_inventory
from expertsmith.lint import ENGINES
from expertsmith.surgery.apply import output_config, renumbering_of
from expertsmith.surgery.quantisation import renumbered

KEEP = {1: [0, 5, 6, 7], 2: [1, 2, 3, 5]}  # layer 0 of the tiny model has no experts


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("mixed") / "source")


@pytest.fixture(scope="module")
def inventory(source: Path) -> Inventory:
    return take_inventory(open_checkpoint(source))


def choice(inventory: Inventory, keep: dict[int, list[int]] = KEEP) -> Any:
    plan = api.plan(inventory, "random", 4)
    return plan.model_copy(update={"layers": [e.model_copy(update={"keep": keep[e.layer]}) for e in plan.layers]})


def rename(inventory: Inventory, value: Any, pad: bool = False, keep: dict[int, list[int]] = KEEP) -> Any:
    return renumbered(value, renumbering_of(choice(inventory, keep), inventory, pad))


def expert(layer: int, number: int, leaf: str = "down_proj") -> str:
    return f"model.layers.{layer}.mlp.experts.{number}.{leaf}"


MODULES = [(layer, e, leaf) for layer in KEEP for e in range(8) for leaf in ("gate_proj", "up_proj", "down_proj")]


def compressed_tensors(entries: Any, name: str) -> Any:
    return any(re.match(e[3:], name) if e.startswith("re:") else e == name for e in entries)


def modelopt(entries: Any, name: str) -> Any:
    return any(fnmatchcase(name, e) or name.startswith(f"{e}.") for e in entries)


def gptqmodel(entries: Any, name: str) -> Any:
    """As vLLM's get_dynamic_override: the first match counts."""
    for pattern, settings in entries.items():
        if pattern.startswith("-:"):
            if re.match(pattern[2:], name):
                return False
        elif re.match(pattern.removeprefix("+:"), name):
            return settings
    return None


def autoround(entries: Any, name: str) -> Any:
    if name in entries:
        return entries[name]
    return next((v for k, v in entries.items() if set("*+?^$()[]{}|\\") & set(k) and re.search(k, name)), None)


LISTS = {  # where it stands → (what surrounds it, how it is read, entries)
    "ignore": ("compressed-tensors", compressed_tensors, [
        ["lm_head", expert(1, 5), expert(1, 4), expert(2, 5, "up_proj")],
        [r"re:.*mlp\.experts\.5\..*", "re:.*lm_head"],
        [r"re:.*\.experts\.(1|6|7)\.down_proj$", "re:.*mlp.gate$"],
        [r"re:model\.layers\.1\..*", expert(2, 1)],
        [r"re:.*layers\.2\..*[57].*"],
    ]),
    "exclude_modules": ("modelopt", modelopt, [
        ["model.layers.1.mlp.experts.5*", "lm_head", "model.layers.0*"],
        ["*experts.[05].up_proj", "*self_attn*"],
        ["model.layers.2.mlp.experts.3", "model.layers.1.mlp.experts.2"],
        ["model.layers.2*"],
    ]),
    "dynamic": ("gptq", gptqmodel, [
        {r"-:.*experts\.5\..*": {}, r"+:.*experts\..*": {"bits": 8}},
        {r"+:.*\.experts\.[0-3]\.down_proj": {"bits": 8}, r"-:.*\.experts\.[2-6]\..*": {}, r".*layers\.2.*": {"bits": 2}},
        {"+:" + re.escape(expert(2, 3)): {"bits": 8, "group_size": 32}},
        {r"-:model\.layers\.0\..*": {}, r".*\.1\..*": {"bits": 8}},
    ]),
    "extra_config": ("auto-round", autoround, [
        {expert(1, 6): {"bits": 16}, "model.layers.1.mlp.gate": {"bits": 16}, expert(1, 1): {"bits": 8}},
        {r".*experts\.(2|5).*": {"bits": 8}, expert(2, 5): {"bits": 16}, r"experts\.[5-7]\.up_proj": {"bits": 3}},
    ]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "number"), [(key, number) for key, (_, _, several) in LISTS.items() for number in range(len(several))]
)
def test_the_output_reads_as_the_source_did(key: str, number: int, inventory: Inventory) -> None:
    """Every module of a kept expert, and every other one, is matched as the module was that it came from."""
    method, read, several = LISTS[key]
    entries = several[number]
    after = rename(inventory, {"quant_method": method, key: entries})[key]
    assert type(after) is type(entries)
    for layer, old, leaf in MODULES:
        if old in KEEP[layer]:
            was, now = expert(layer, old, leaf), expert(layer, KEEP[layer].index(old), leaf)
            assert read(after, now) == read(entries, was), (was, now, after)
    for name in ("lm_head", "model.layers.1.mlp.gate", "model.layers.0.mlp.down_proj", "model.layers.2.self_attn.q_proj"):
        assert read(after, name) == read(entries, name), (name, after)
    assert not any(f"experts.{old}" in entry for entry in after for old in range(4, 8)), after  # four are left


def test_golden(inventory: Inventory) -> None:
    held = {
        "quant_method": "compressed-tensors",
        "ignore": ["lm_head", expert(1, 5), expert(1, 4), expert(2, 5), "model.layers.1.mlp.experts.7"],
        "config_groups": {
            "group_0": {"targets": ["Linear"]},
            "group_1": {"targets": [expert(2, 2), r"re:.*experts\.6\..*up.*"]},
        },
    }
    after = rename(inventory, held)
    assert after["ignore"] == ["lm_head", expert(1, 1), expert(2, 3), "model.layers.1.mlp.experts.3"]
    assert after["config_groups"]["group_0"] == {"targets": ["Linear"]}
    assert after["config_groups"]["group_1"] == {"targets": [expert(2, 1), expert(1, 2, "up_proj")]}
    layers = {
        "quantization": {"quantized_layers": {expert(1, 0): {"quant_algo": "FP8"}, expert(1, 1): {"quant_algo": "NVFP4"}}}
    }
    assert rename(inventory, layers) == {"quantization": {"quantized_layers": {expert(1, 0): {"quant_algo": "FP8"}}}}


def test_entries_without_numbers_stay(inventory: Inventory) -> None:
    held = {
        "quant_method": "fp8",
        "modules_to_not_convert": ["gate", "lm_head", "model.layers.1.mlp.gate", r".*mlp\.experts.*", "model.layers.2"],
        "llm_int8_skip_modules": None,
        "weight_block_size": [128, 128],
    }
    assert rename(inventory, held) == held


def test_a_part_of_a_name_speaks_of_every_layer(inventory: Inventory) -> None:
    after = rename(inventory, {"quant_method": "awq", "modules_to_not_convert": ["experts.5.down_proj", "experts.4"]})
    assert after["modules_to_not_convert"] == [expert(1, 1), expert(2, 3)]


def test_dead_copies_are_as_the_first_kept_expert(inventory: Inventory) -> None:
    keep = {1: [5, 6], 2: [1, 2, 3, 5]}
    after = rename(inventory, {"quant_method": "compressed-tensors", "ignore": [expert(1, 5)]}, pad=True, keep=keep)
    assert after["ignore"] == [expert(1, 0), expert(1, 2), expert(1, 3)]


def test_what_can_be_read_in_two_ways_is_refused(inventory: Inventory) -> None:
    with pytest.raises(
        UserError, match=r"'model\.layers\.1\.mlp\.experts\.5\*' in modules_to_not_convert matches experts by number"
    ):
        rename(inventory, {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.1.mlp.experts.5*"]})
    with pytest.raises(UserError, match="is not a regular expression"):
        rename(inventory, {"quant_method": "gptq", "dynamic": {"-:*experts": {}}})


def fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


@pytest.fixture
def mixed(source: Path, tmp_path: Path) -> Path:
    """compressed-tensors FP8 by channel; two experts stay in float."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    ignore = ["lm_head", *(expert(1, 5, leaf) for leaf in ("gate_proj", "up_proj", "down_proj")), expert(2, 1)]
    state: dict[str, torch.Tensor] = {}
    for name, value in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        parts = fp8(value) if ".experts." in name and module not in ignore else {"weight": value}
        state |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ignore,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    config = {**json.loads((source / "config.json").read_text()), "quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": ignore}}))
    (folder / "quantize_config.json").write_text('{"bits": 8}')
    return folder


def test_an_applied_plan(mixed: Path, tmp_path: Path) -> None:
    """What the lists name is what stands in float; files that need no change are copied as they are; verify covers all of it."""
    inventory = take_inventory(open_checkpoint(mixed))
    plan, out = choice(inventory), tmp_path / "out"
    api.apply(inventory, plan, out)
    written = open_checkpoint(out)
    ignore = written.config["quantization_config"]["ignore"]
    assert ignore == ["lm_head", *(expert(1, 1, leaf) for leaf in ("gate_proj", "up_proj", "down_proj")), expert(2, 0)]
    for layer, keep in KEEP.items():
        for number in range(len(keep)):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                module = expert(layer, number, leaf)
                assert (written.tensors[f"{module}.weight"].dtype == "F32") == (module in ignore)
    assert json.loads((out / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"] == ignore
    assert (out / "quantize_config.json").read_text() == '{"bits": 8}'
    assert output_config(plan, inventory) == written.config

    whole = (out / "hf_quant_config.json").read_text()
    (out / "hf_quant_config.json").write_text(whole.replace("experts.1.", "experts.2."))
    verdict = api.verify(inventory, out, plan=plan, tokens=64, device=DEVICE)
    assert (verdict.passed, verdict.config_differs) == (False, ["hf_quant_config.json"])
    (out / "hf_quant_config.json").unlink()
    assert api.verify(inventory, out, plan=plan, tokens=64, device=DEVICE).config_differs == ["hf_quant_config.json"]
    (out / "hf_quant_config.json").write_text(whole)
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace("experts.0.down_proj", "experts.1.down_proj"))
    assert api.verify(inventory, out, plan=plan, tokens=64, device=DEVICE).config_differs == ["quantization_config"]
    (out / "config.json").write_text(text)
    assert api.verify(inventory, out, plan=plan, tokens=64, device=DEVICE).passed


def test_completeness_is_judged_on_the_float_weights(mixed: Path) -> None:
    inventory = take_inventory(open_checkpoint(mixed))
    floats = inventory.floats
    assert {claim.info.name for claim in floats.claims if claim.routed} == {f"{expert(*m)}.weight" for m in MODULES}
    assert floats.routed_parameters == len(MODULES) * 32 * floats.config["moe_intermediate_size"]
    state = load_file(mixed / "model.safetensors")
    del state[f"{expert(1, 5)}.weight"]
    save_file(state, mixed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"decoder layer 1 lacks down_proj\.weight of expert 5"):
        take_inventory(open_checkpoint(mixed))


def test_lint_names_what_engines_cannot_mix(mixed: Path) -> None:
    found = {finding.rule.id: finding for finding in api.lint(mixed)}
    for engine in ("transformers", "vllm", "sglang"):
        assert found[f"{engine}-mixed"].level == "error"
        assert "experts.5." in found[f"{engine}-mixed"].message
    assert not {f"{engine}-quant-method" for engine in ENGINES} & set(found)


def test_inspect_counts_weights_and_names_the_format(source: Path, mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters are those of the float model, bytes those on disk."""
    plain, facts = api.inspect(source), api.inspect(mixed)
    assert facts["parameters"] == plain["parameters"]
    assert [row["parameters"] for row in facts["keep_ratios"]] == [row["parameters"] for row in plain["keep_ratios"]]
    assert facts["bytes"] == open_checkpoint(mixed).nbytes < plain["bytes"]
    assert plain["quantisation"] is None
    assert "FP8" in facts["quantisation"]["formats"]
    assert facts["quantisation"]["cannot_be_decoded"] is None
    code, out, _ = run_cli(capsys, "inspect", mixed)
    assert (code, "FP8" in out, "cannot be decoded" in out) == (0, True, False)


def test_inspect_shows_what_cannot_be_decoded(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Looking is allowed, and says so; working on it is not."""
    config = json.loads((mixed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "novel"}
    (mixed / "config.json").write_text(json.dumps(config))
    state = {
        name.replace("weight_scale", "weight_codebook"): value for name, value in load_file(mixed / "model.safetensors").items()
    }
    save_file(state, mixed / "model.safetensors", metadata={"format": "pt"})
    facts = api.inspect(mixed)
    assert facts["quantisation"]["formats"] == "quant_method novel"
    assert facts["quantisation"]["cannot_be_decoded"]
    code, out, _ = run_cli(capsys, "inspect", mixed)
    assert (code, "cannot be decoded:" in out) == (0, True)
    code, out, _ = run_cli(capsys, "inspect", mixed, "--json")
    assert json.loads(out)["quantisation"] == facts["quantisation"]
    assert run_cli(capsys, "plan", mixed, "-m", "random", "-k", "4", "-o", tmp_path / "plan.json")[0] == 2


def test_a_side_file_that_is_not_json_is_named(mixed: Path, tmp_path: Path) -> None:
    (mixed / "hf_quant_config.json").write_text("{")
    inventory = take_inventory(open_checkpoint(mixed))
    with pytest.raises(UserError, match=r"hf_quant_config\.json is not JSON"):
        api.apply(inventory, choice(inventory), tmp_path / "out")
    assert not (tmp_path / "out").exists()
