"""`expertsmith analyze`: every family, against plain forwards of the model; the command; what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import expertsmith
from conftest import CALIBRATION, DEVICE, SUPPORTED, run_cli, save_tiny
from expertsmith import api
from expertsmith.analysis.study import plain
from expertsmith.arch import families
from expertsmith.calibration.all_experts import sample_layers
from expertsmith.calibration.opening import open_model, token_data
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.experts.weights import Projections
from expertsmith.views.progress import Silent

OPTIONS = {**CALIBRATION, "memory": "resident", "dtype": "float32"}


def cos(a, b) -> float:
    return float(a.ravel() @ b.ravel() / np.sqrt((a.ravel() @ a.ravel()) * (b.ravel() @ b.ravel())))


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_every_family_has_both_kinds_of_measures(model_type, checkpoints, data, tmp_path):
    """The weighted outputs add up to the block's, shares to 1, counts to the tokens; a matrix cosine is that of the tensors."""
    source = checkpoints(model_type)
    found = api.analyze(source, tmp_path / "out", data=data, all_experts=12, **OPTIONS)
    inventory = take_inventory(open_checkpoint(source))
    assert [entry["layer"] for entry in found["layers"]] == inventory.layers
    for entry in found["layers"]:
        assert entry["sample"]["recombined_error"] < 1e-5
        assert entry["sample"]["tokens"] == 24
        counts = np.array(entry["sample"]["rank_counts"])
        assert (counts.sum(0) == 24).all()
        assert (counts.sum(1) == 24).all()
        assert sum(entry["usage"]["all"]["usage"]) == pytest.approx(1, abs=1e-4)
        for name in ("output_angular", "activation_cosine"):
            matrix = np.array(entry["sample"][name])
            assert (np.diagonal(matrix) == 1).all()
            assert matrix == pytest.approx(matrix.T, abs=1e-5)
            assert 0.001 < np.abs(matrix[np.tril_indices(len(matrix), -1)]).mean() < 1
        first, second = list(Projections(inventory, entry["layer"]).of("down"))[:2]
        cosine = entry["static"]["projections"]["down"]["matrix_cosine"][1][0]
        assert cosine == pytest.approx(cos(first, second), abs=1e-5)
    record = families()[model_type]
    shared = "shared" in found["layers"][0]["sample"]["output_members"]
    assert shared == (bool(record.shared) and model_type != "nemotron_h")  # whose experts work in another space
    page = (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "measures.json").read_text()) == found
    assert page.count("<script") == 3


@pytest.fixture(scope="module")
def mixtral_sample(checkpoints, data):
    """(model, samples by layer, tokens) of the tiny Mixtral."""
    inventory = take_inventory(open_checkpoint(checkpoints("mixtral")))
    model = open_model(inventory, Silent(), device=DEVICE, dtype="float32", memory="resident")
    tokens = token_data(inventory.checkpoint.path, inventory.checkpoint.config, data, Silent(), seq_len=24, pack=False)
    samples = list(
        sample_layers(model, tokens, rules={n: inventory.rules_of(n) for n in inventory.layers}, max_tokens=0, batch_tokens=72)
    )
    return model, {sample.layer: sample for sample in samples}, tokens


def test_all_experts_pass_is_that_of_a_plain_loop(mixtral_sample):
    """Layer 1 of Mixtral with hooks of our own: norms, scores, similarities of outputs and activations, token counts."""
    model, samples, tokens = mixtral_sample
    sample, layer = samples[1], model.layers[1]
    inputs = []
    handle = layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
    rows = [row for domain in sorted(tokens.sequences) for row in tokens.sequences[domain]]
    with torch.no_grad():
        for row in rows:
            model.module(input_ids=torch.tensor([row]))
    handle.remove()
    x = torch.cat(inputs)
    experts, gate_up, down = layer.mlp.experts, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
    half = gate_up.shape[1] // 2
    with torch.no_grad():
        hidden = [torch.nn.functional.silu(x @ gate_up[e, :half].T) * (x @ gate_up[e, half:].T) for e in range(8)]
        outputs = [hidden[e] @ down[e].T for e in range(8)]
        scores = (x @ layer.mlp.gate.weight.T).softmax(-1)
    assert type(experts).__name__ == "MixtralExperts"
    assert sample.norms == pytest.approx(torch.stack([o.norm(dim=1) for o in outputs], 1).numpy(), rel=1e-4)
    assert sample.scores == pytest.approx(scores.numpy(), abs=1e-5)
    assert (np.sort(sample.selected) == np.sort(scores.topk(2).indices.numpy())).all()
    for a, b in ((0, 1), (3, 6)):
        c = torch.nn.functional.cosine_similarity(outputs[a], outputs[b], dim=1)
        assert sample.output_cosine[a, b] == pytest.approx(float(c.mean()), abs=1e-5)
        assert sample.output_angular[a, b] == pytest.approx(float((1 - c.acos() / torch.pi).mean()), abs=1e-5)
        h = torch.nn.functional.cosine_similarity(hidden[a], hidden[b], dim=1)
        assert sample.activation_cosine[a, b] == pytest.approx(float(h.mean()), abs=1e-5)
    flat = [token for row in rows for token in row]
    place = sample.token_ids.tolist().index(flat[0])
    chosen = [set(ids) for ids, token in zip(sample.selected.tolist(), flat, strict=True) if token == flat[0]]
    assert sample.token_counts[place] == len(chosen)
    assert sample.routed_counts[place].tolist() == [sum(e in ids for ids in chosen) for e in range(8)]
    assert sample.domain.count("a") == tokens.tokens["a"]


def test_the_sample_does_not_depend_on_batches_or_memory(checkpoints, data, mixtral_sample):
    _, whole, tokens = mixtral_sample
    inventory = take_inventory(open_checkpoint(checkpoints("mixtral")))
    streamed = open_model(inventory, Silent(), device=DEVICE, dtype="float32", memory="stream")
    rules = {n: inventory.rules_of(n) for n in inventory.layers}
    other = {s.layer: s for s in sample_layers(streamed, tokens, rules=rules, max_tokens=0, batch_tokens=24)}
    for layer, sample in whole.items():
        assert other[layer].norms == pytest.approx(sample.norms, rel=1e-4)
        assert other[layer].output_angular == pytest.approx(sample.output_angular, abs=1e-5)
        assert (other[layer].routed_counts == sample.routed_counts).all()


@pytest.mark.parametrize("model_type", ["dbrx", "llama4_text", "longcat_flash"])
def test_activations_of_experts_of_unknown_layout_lead_to_their_outputs(model_type, checkpoints):
    """What was caught before the last product, times the down matrices on disk, is the output."""
    from expertsmith.calibration.all_experts import _hidden
    from expertsmith.calibration.replay import RoutedBlock, router_extras
    from expertsmith.engine.experts import run_all

    inventory = take_inventory(open_checkpoint(checkpoints(model_type)))
    model = open_model(inventory, Silent(), device=DEVICE, dtype="float32", memory="resident")
    layer, arch = inventory.layers[0], inventory.architecture
    block = RoutedBlock(model.layers[layer], arch, inventory.rules_of(layer), router_extras(arch, inventory.config))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    dims = 3 if model_type == "dbrx" else 2
    with torch.no_grad():
        hidden, outputs = _hidden(block.experts, x, 8, block, dims), run_all(block.experts, x, 8, arch, dims)
    for expert, down in enumerate(Projections(inventory, layer).of("down")):
        assert (hidden[expert] @ torch.from_numpy(down).T) == pytest.approx(outputs[expert].numpy(), abs=1e-5)


def test_mixed_precision_passes_its_own_check(checkpoints, data, tmp_path):
    found = api.analyze(checkpoints("qwen2_moe"), tmp_path / "o", data=data, all_experts=10, **{**OPTIONS, "dtype": "bfloat16"})
    assert 0 < max(entry["sample"]["recombined_error"] for entry in found["layers"]) < 0.02


def test_without_text_the_static_part_comes(checkpoints, tmp_path, capsys):
    code, out, _ = run_cli(capsys, "analyze", checkpoints("mixtral"), "-o", tmp_path / "o")
    assert code == 0
    assert "from the weights alone" in out
    assert "not testable" in out
    assert "No text was given" in out
    found = json.loads((tmp_path / "o" / "measures.json").read_text())
    assert "static" in found["layers"][0]
    assert "usage" not in found["layers"][0]
    assert "before_cut" not in found


def test_json_on_stdout_is_the_file(checkpoints, data, tmp_path, capsys):
    options = [item for spec in data for item in ("-d", spec)]
    code, out, _ = run_cli(
        capsys, "analyze", checkpoints("mixtral"), "-o", tmp_path / "o", *options, "--seq-len", 24, "--no-pack", "--device", DEVICE, "--json", "-q"
    )  # fmt: skip
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "o" / "measures.json").read_text())


def test_terminal_shows_summary_verdicts_and_files(checkpoints, data, tmp_path, capsys):
    options = [item for spec in data for item in ("-d", spec)]
    code, out, _ = run_cli(
        capsys, "analyze", checkpoints("qwen2_moe"), "-o", tmp_path / "o", *options, "--seq-len", 24, "--no-pack", "--all-experts", 16, "--device", DEVICE
    )  # fmt: skip
    assert code == 0
    assert "3 layers of 8 routed experts" in out
    assert "1. Neurons act like fine-grained experts" in out
    assert "Rank correlation of output norm and router score" in out
    assert str(tmp_path / "o" / "report.html") in out
    assert "Fewer than 1000 tokens of a, b" in out


def test_the_same_seed_gives_the_same_file(checkpoints, data, tmp_path):
    files = []
    for name in ("one", "two"):
        api.analyze(checkpoints("mixtral"), tmp_path / name, data=data, all_experts=10, **OPTIONS)
        files.append((tmp_path / name / "measures.json").read_bytes())
    assert files[0] == files[1]


def test_again_into_the_same_folder_takes_the_statistics_over(checkpoints, data, tmp_path, monkeypatch):
    api.analyze(checkpoints("mixtral"), tmp_path / "o", data=data, **OPTIONS)
    stamp = (tmp_path / "o" / "stats" / "layer_000.safetensors").stat().st_mtime_ns
    api.analyze(checkpoints("mixtral"), tmp_path / "o", data=data, **OPTIONS)
    assert (tmp_path / "o" / "stats" / "layer_000.safetensors").stat().st_mtime_ns == stamp


def test_statistics_are_enough_without_text(checkpoints, data, tmp_path):
    api.calibrate(checkpoints("mixtral"), data, tmp_path / "s", **OPTIONS)
    found = api.analyze(checkpoints("mixtral"), tmp_path / "o", stats=tmp_path / "s")
    assert found["before_cut"]["domains"] == ["a", "b"]
    assert found["layers"][0]["usage"]["specialisation"]["domains"] == ["a", "b"]


def test_weights_stay_in_the_dtype_they_are_stored_in(checkpoints, tmp_path):
    """A bfloat16 checkpoint is measured in bfloat16's values, exactly."""
    from expertsmith.analysis.sources import LayerWeights

    model = tmp_path / "half"
    shutil.copytree(checkpoints("mixtral"), model)
    tensors = {name: value.bfloat16() for name, value in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    inventory = take_inventory(open_checkpoint(model))
    assert LayerWeights(inventory, 0).dtype == torch.bfloat16
    assert LayerWeights(take_inventory(open_checkpoint(checkpoints("mixtral"))), 0).dtype == torch.float32
    found = api.analyze(model, tmp_path / "o")["layers"][1]["static"]["projections"]["up"]
    held = list(Projections(inventory, 1).of("up"))
    for i, j in ((1, 0), (7, 4)):
        assert found["matrix_cosine"][i][j] == pytest.approx(cos(held[i], held[j]), abs=1e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tiny random dense Llama of the tiny models' hidden size."""
    import transformers

    folder = tmp_path_factory.mktemp("dense") / "llama"
    torch.manual_seed(5)
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=128)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_dense_model_beside_the_experts(llama, checkpoints, tmp_path):
    found = api.analyze(checkpoints("mixtral"), tmp_path / "o", dense=llama)
    first = found["layers"][0]["static"]["projections"]["gate"]
    assert first["neuron_members"] == [*map(str, range(8)), "dense"]
    assert len(first["dense_match"]) == 8
    tensors = load_file(llama / "model.safetensors")
    dense = tensors["model.layers.0.mlp.gate_proj.weight"].numpy()
    experts = list(Projections(take_inventory(open_checkpoint(checkpoints("mixtral"))), 0).of("gate"))
    assert first["neuron_cosine"][8][3] == pytest.approx(cos(experts[3].mean(0), dense.mean(0)), abs=1e-5)
    assert found["layers"][2]["static"]["projections"]["gate"]["neuron_members"] == [*map(str, range(8))]
    assert any("nothing of the same size to compare in layers 2" in note for note in found["notes"])


def test_experts_that_were_cut_out_of_the_dense_model_are_recognised(llama, checkpoints, tmp_path):
    """A Mixtral whose experts are rows of the Llama: nearest neurons are at cosine 1, and the summary says so."""
    model = tmp_path / "converted"
    shutil.copytree(checkpoints("mixtral"), model)
    dense, tensors = load_file(llama / "model.safetensors"), load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for layer in range(3):
        for expert in range(8):
            for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{ours}.weight"
                full = dense[f"model.layers.{min(layer, 1)}.mlp.{theirs}.weight"]
                full = full.T if ours == "w2" else full
                rows = torch.randperm(len(full), generator=generator)[
                    : min(len(full), tensors[name].shape[1 if ours == "w2" else 0])
                ]
                tensors[name] = (full[rows].T if ours == "w2" else full[rows]).contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = api.analyze(model, tmp_path / "o", dense=llama)
    assert found["layers"][0]["static"]["projections"]["up"]["dense_match"] == pytest.approx([1.0] * 8, abs=1e-5)
    assert any("dense model is 1.000" in sentence for sentence in found["summary"])


@pytest.mark.parametrize(("experts", "shared"), [(4, 0), (4, 1)])
def test_a_converted_model_is_its_dense_model_cut_up(experts, shared, tmp_path):
    """`convert`, then `analyze --dense`: every neuron of every routed expert is one of the dense FFN's."""
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=16 * (experts + shared), num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=128)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"input_ids": list(range(i, i + 24))}) + "\n" for i in range(20)))
    data = [f"a={tmp_path / 'd.jsonl'}"]
    api.convert(
        tmp_path / "dense",
        "random",
        tmp_path / "moe",
        experts=experts,
        shared=shared,
        top_k=1,
        measure=False,
        seq_len=24,
        device=DEVICE,
    )
    found = api.analyze(tmp_path / "moe", tmp_path / "o", dense=tmp_path / "dense", data=data, all_experts=8, **OPTIONS)
    for entry in found["layers"]:
        for role in ("gate", "up"):
            assert entry["static"]["projections"][role]["dense_match"] == pytest.approx([1.0] * experts, abs=1e-4)
    assert any("(1: copied)" in sentence for sentence in found["summary"])


@pytest.fixture(scope="module")
def cut(checkpoints, data, tmp_path_factory):
    """(original, half of it) of the tiny Qwen2-MoE."""
    folder = tmp_path_factory.mktemp("cut")
    source = checkpoints("qwen2_moe")
    stats = api.calibrate(source, data, folder / "stats", **OPTIONS)
    made = api.plan(source, "easy_ep", 0.5, stats=stats, out=folder / "plan.json")
    api.apply(source, made, folder / "half")
    return source, folder


def test_after_a_cut(cut, data, tmp_path):
    source, folder = cut
    found = api.analyze(folder / "half", tmp_path / "o", data=data, reference=source, plan=folder / "plan.json", **OPTIONS)
    made = json.loads((folder / "plan.json").read_text())
    for row, entry in zip(found["after_cut"]["layers"], made["layers"], strict=True):
        assert row["kept"] == entry["keep"]
        assert sorted(row["kept"] + row["dropped"]) == list(range(8))
        for name in ("a", "b"):
            assert 0 < row["lost"][name]["mass"] < 1
            assert 0 <= row["routing"][name]["moved"] <= 1
            assert sum(row["routing"][name]["after"]) == pytest.approx(1, abs=1e-4)
    assert any("removed 12 of 24 experts" in sentence for sentence in found["summary"])
    again = api.analyze(
        folder / "half", tmp_path / "p", data=data, reference=source, reference_stats=folder / "stats", **OPTIONS
    )
    assert again["after_cut"] == found["after_cut"]  # the plan inside the checkpoint, and statistics that were there


def test_after_a_cut_without_text_says_what_went(cut, tmp_path):
    source, folder = cut
    found = api.analyze(folder / "half", tmp_path / "o", reference=source)
    assert all("lost" not in row for row in found["after_cut"]["layers"])


# --- what it refuses ---


def refused(capsys, *arguments) -> str:
    code, out, err = run_cli(capsys, "analyze", *arguments, "-q")
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) <= 2
    return err


def test_a_dense_model_is_sent_to_convert(llama, tmp_path, capsys):
    err = refused(capsys, llama, "-o", tmp_path / "o")
    assert "is a dense model" in err
    assert "expertsmith convert" in err
    assert not (tmp_path / "o").exists()


def test_one_expert(tmp_path, capsys):
    model = save_tiny("mixtral", tmp_path / "one", num_local_experts=1, num_experts_per_tok=1)
    assert "one routed expert per layer: there is nothing to compare" in refused(capsys, model, "-o", tmp_path / "o")


def test_one_layer_and_few_experts_have_what_can_be_had(data, tmp_path):
    model = save_tiny("mixtral", tmp_path / "small", num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=2)
    found = api.analyze(model, tmp_path / "o", data=data, all_experts=8, **OPTIONS)
    assert [row["verdict"] for row in found["observations"]][::2] == ["not testable", "not testable"]
    assert any("one layer with experts" in note for note in found["notes"])
    assert found["before_cut"]["ratios"] == []
    assert (tmp_path / "o" / "report.html").stat().st_size > 10**6


@pytest.mark.parametrize("name", ["block_sparse_moe.experts.3.w2.weight", "block_sparse_moe.gate.weight"])
def test_nan_leaves_no_half_page(name, checkpoints, tmp_path, capsys):
    model = tmp_path / "broken"
    shutil.copytree(checkpoints("mixtral"), model)
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.layers.1.{name}"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    err = refused(capsys, model, "-o", tmp_path / "o")
    assert f"model.layers.1.{name} has NaN or inf" in err
    assert not (tmp_path / "o").exists()


def test_statistics_of_another_model(checkpoints, data, tmp_path, capsys):
    api.calibrate(checkpoints("olmoe"), data, tmp_path / "s", **OPTIONS)
    err = refused(capsys, checkpoints("mixtral"), "-o", tmp_path / "o", "--stats", tmp_path / "s")
    assert "the statistics are from another model" in err


def test_a_folder_with_other_things_in_it(checkpoints, tmp_path, capsys):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").write_text("years")
    assert "contains files that are not an analysis (thesis.tex)" in refused(
        capsys, checkpoints("mixtral"), "-o", tmp_path / "o"
    )
    assert "is a file" in refused(capsys, checkpoints("mixtral"), "-o", tmp_path / "o" / "thesis.tex")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--all-experts", "64"], "--all-experts runs the model on text; pass --data FILE"),
        (["--plan", "plan.json"], "without --reference; pass --reference MODEL"),
        (["-d", "nowhere.jsonl"], "data file not found: nowhere.jsonl"),
        (["--dense", "nowhere"], "directory not found: nowhere"),
        (["--stats", "nowhere"], "no statistics found in nowhere"),
        (["--overlong", "shorten"], "--overlong is 'shorten'"),
    ],
)
def test_arguments_that_make_no_sense(arguments, said, checkpoints, tmp_path, capsys):
    assert said in refused(capsys, checkpoints("mixtral"), "-o", tmp_path / "o", *arguments)


def test_a_dense_model_of_another_size_or_none(checkpoints, tmp_path, capsys):
    import transformers

    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=128)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    assert "a different hidden size" in refused(
        capsys, checkpoints("mixtral"), "-o", tmp_path / "o", "--dense", tmp_path / "wide"
    )
    err = refused(capsys, checkpoints("mixtral"), "-o", tmp_path / "o", "--dense", checkpoints("mixtral"))
    assert "has no dense FFN" in err


def test_a_reference_that_the_plan_is_not_for(cut, checkpoints, tmp_path, capsys):
    _, folder = cut
    err = refused(capsys, folder / "half", "-o", tmp_path / "o", "-r", checkpoints("mixtral"))
    assert "the plan was made for another model than" in err
    assert "no plan found at" in refused(capsys, checkpoints("mixtral"), "-o", tmp_path / "o", "-r", checkpoints("mixtral"))


def test_reference_statistics_of_other_text(cut, data, tmp_path):
    source, folder = cut
    with pytest.raises(UserError, match="from other text"):
        api.analyze(
            folder / "half", tmp_path / "o", data=data[:1], reference=source, reference_stats=folder / "stats", **OPTIONS
        )


def test_plain_numbers_are_json():
    made = plain(
        {"a": np.array([1.0, np.nan, np.inf]), "b": np.float32(0.1234567), "c": (np.int64(3), True), "null_values": [1]}
    )
    assert made == {"a": [1.0, None, None], "b": 0.123457, "c": [3, True]}
    json.dumps(made, allow_nan=False)


def test_importing_is_quick():
    """Neither the package, the command line nor the pure parts of the analysis bring torch in."""
    code = "import sys, expertsmith, expertsmith.cli, expertsmith.views.pages.analysis; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(expertsmith.analyze)


def test_router_scores_that_are_all_but_equal_are_said_to_say_nothing(checkpoints, data, tmp_path):
    """Converted models have flattened routers: their order counts, their entropy does not."""
    flat = tmp_path / "flat"
    shutil.copytree(checkpoints("mixtral"), flat)
    for file in flat.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t * 2.0**-10 if n.endswith("gate.weight") else t for n, t in tensors.items()}, file, {"format": "pt"})
    found = api.analyze(flat, tmp_path / "flat-look", data=data, **OPTIONS)
    assert any("all but equal" in note for note in found["notes"])
    assert not any("undecided" in sentence for sentence in found["summary"])
    found = api.analyze(checkpoints("mixtral"), tmp_path / "look", data=data, **OPTIONS)
    assert not any("all but equal" in note for note in found["notes"])
