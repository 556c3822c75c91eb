"""Multi-token prediction: what its layer is given, what is counted of it, and that it is pruned, kept, dropped and proved with the trunk."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CALIBRATION, DEVICE, auto_class, run_cli
from expertsmith import api
from expertsmith.arch import families, text_config
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import Batch, Walk, hidden_of, load_model
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.planning.plan import load_plan
from mtp import UNDER_MTP, WITH_EXPERTS, save_with_mtp
from quantise import quantise_checkpoint

DEPTH = 3
RUN = {"memory": "resident", "device": DEVICE}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """model_type → (checkpoint, the longer model that it was made from)."""
    root = tmp_path_factory.mktemp("mtp")
    made = {}

    def build(model_type: str):
        if model_type not in made:
            made[model_type] = (root / model_type, save_with_mtp(model_type, root / model_type))
        return made[model_type]

    return build


@pytest.fixture(scope="module")
def calibrated(sources, tmp_path_factory):
    """model_type → (checkpoint, plan at half of the experts, statistics, data)."""
    root = tmp_path_factory.mktemp("calibrated")
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 120, (length,), generator=generator).tolist() for length in (24, 17, 24, 9, 24, 24)]
    (root / "a.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    made = {}

    def build(model_type: str):
        if model_type not in made:
            source = sources(model_type)[0]
            # a row a batch: V3.2's indexer breaks ties between tokens by their place, which padding changes
            stats = api.calibrate(source, [f"a={root / 'a.jsonl'}"], root / model_type, **CALIBRATION | {"batch_tokens": 1})
            made[model_type] = (source, api.plan(source, "reap", 4, stats=stats), stats, rows)
        return made[model_type]

    return build


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double())


def decoder_of(model):
    return model.get_decoder() if hasattr(model, "get_decoder") else model.model


def played(model_type: str, model: torch.nn.Module, ids: torch.Tensor):
    """(input, output, routing of the experts) of the longer model's last layer, given by the formula in float64 what multi-token prediction
    gives it."""
    decoder, parts = decoder_of(model), model.parts
    layer, eps = decoder.layers[-1], model.config.get_text_config().rms_norm_eps
    offset = 1.0 if model_type in UNDER_MTP else 0.0  # Qwen3-Next's norms multiply by 1 + weight
    seen = {}

    def keep(module, args, kwargs):
        seen["args"], seen["kwargs"] = args, kwargs

    with torch.no_grad():
        handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
        model(ids, use_cache=False)
        handle.remove()
        hidden = seen["args"][0] if seen["args"] else seen["kwargs"].pop("hidden_states")
        following = parts["embedding"][torch.roll(ids, -1, 1)]
        trunk = rms(hidden, decoder.norm.weight, eps, offset)
        both = torch.cat(
            (rms(following, parts["embedding_norm"], eps, offset), rms(trunk, parts["hidden_norm"], eps, offset)), -1
        )
        given = (both @ parts["projection"].double().T).float()
        routed = {}
        experts = layer.mlp.experts
        handle = experts.register_forward_pre_hook(
            lambda module, args, kwargs: routed.update(args=args, kwargs=kwargs), with_kwargs=True
        )
        out = hidden_of(layer(given, *seen["args"][1:], **seen["kwargs"]))
        handle.remove()
    return given, out, routed["args"]


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_the_layer_is_given_the_formula(model_type, memory, sources):
    source, model = sources(model_type)
    ids = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(9))
    given, out, _ = played(model_type, model, ids)
    checkpoint = open_checkpoint(source)
    loaded = load_model(checkpoint, families()[model_type], memory=memory, dtype="float32", mtp=True)
    assert loaded.depth == DEPTH
    assert len(loaded.layers) == loaded.depth + 1
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), "a", [0, 1])
    found = {}
    with Walk(loaded, [batch], after=lambda layer, number, output: found.update({layer: hidden_of(output)})) as walk:
        for _ in walk.layers():
            pass
        (outputs,) = walk.outputs()
    scale = float(out.abs().max())
    assert float((found[loaded.depth] - out)[:, :-1].abs().max()) <= 1e-5 * scale  # the last token has no next one
    assert float(given.abs().max()) > 0.1
    with torch.no_grad():
        stock = auto_class(source).from_pretrained(source)(ids).logits  # the model's own outputs are those without it
    assert float((outputs.logits - stock).abs().max()) <= 1e-5 * float(stock.abs().max())


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_the_layer_gives_what_transformers_gives(model_type, sources):
    """`MtpModel`, which drafts tokens in transformers 5.23, on the same sequence."""
    import transformers
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    source, model = sources(model_type)
    main = transformers.AutoModelForCausalLM.from_pretrained(source)
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{DEPTH}\..*"]  # it knows the numbers of published models only
    drafts = MtpModel.from_pretrained(main).eval()
    ids = torch.randint(3, 120, (1, 12), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        hidden = main(ids[:, :-1], output_hidden_states=True, use_cache=False).hidden_states[-1]
        places = torch.arange(1, 12)[None]
        theirs = drafts.forward_layer(0, hidden, places, MtpCache(config=main.config.get_mtp_config()), input_ids=ids[:, 1:])
    mine = outputs_of(load_model(open_checkpoint(source), families()[model_type], dtype="float32", mtp=True), ids)[DEPTH]
    normed = rms(mine, model.parts["norm"], main.config.rms_norm_eps, 0.0)[:, :-1]
    assert float((normed - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def outputs_of(loaded, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Layer → what it returns."""
    found = {}
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), "a", list(range(len(ids))))
    with Walk(loaded, [batch], after=lambda layer, number, output: found.update({layer: hidden_of(output)})) as walk:
        for _ in walk.layers():
            pass
    return found


def test_an_embedding_of_its_own_is_used(tmp_path):
    model = save_with_mtp("deepseek_v3", tmp_path / "m", own_embedding=True)
    ids = torch.randint(3, 120, (1, 8), generator=torch.Generator().manual_seed(9))
    _, out, _ = played("deepseek_v3", model, ids)
    loaded = load_model(open_checkpoint(tmp_path / "m"), families()["deepseek_v3"], dtype="float32", mtp=True)
    found = outputs_of(loaded, ids)
    assert float((found[DEPTH] - out)[:, :-1].abs().max()) <= 1e-5 * float(out.abs().max())


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_statistics_are_those_of_every_token_that_has_a_next_one(model_type, calibrated, sources):
    source, _, stats, rows = calibrated(model_type)
    model = sources(model_type)[1]
    layer = take_inventory(open_checkpoint(source)).mtp_layers[0]
    experts = decoder_of(model).layers[-1].mlp.experts
    selections, norms = np.zeros(8), np.zeros(8)
    for row in rows:
        _, _, (x, selected, *_) = played(model_type, model, torch.tensor([row]))
        x, selected = x.reshape(len(row), -1)[:-1], selected.reshape(len(row), -1)[:-1]
        for e in range(8):
            inputs = x[(selected == e).any(-1)].double()
            gate, up = (inputs @ experts.gate_up_proj[e].double().T).chunk(2, -1)
            raw = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].double().T
            selections[e] += len(inputs)
            norms[e] += float(raw.detach().norm(dim=-1).sum())
    entry = stats.layers[layer]
    assert entry.total("selections").tolist() == selections.tolist()
    assert np.allclose(entry.total("norm_sum"), norms, rtol=1e-5)
    assert entry.total("tokens") == sum(len(row) - 1 for row in rows)
    assert stats.layers[layer - 1].total("tokens") == sum(map(len, rows))


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_it_is_pruned_kept_and_proved(model_type, calibrated, tmp_path):
    source, plan, _, _ = calibrated(model_type)
    inventory = take_inventory(open_checkpoint(source))
    (layer,) = inventory.mtp_layers
    assert plan.mtp == "keep"
    assert plan.layers[-1].layer == layer
    assert plan.layers[-1].mtp
    notes = api.apply(source, plan, tmp_path / "half")
    assert not any("multi-token" in note for note in notes)
    out = take_inventory(open_checkpoint(tmp_path / "half"))
    assert out.mtp_layers == [layer]
    assert out.num_experts == 4
    assert [len(held) > 0 for held in out.expert_claims(layer)] == [True] * 4
    assert out.size() == (plan.summary.parameters[1], plan.summary.bytes[1])
    verdict = api.verify(source, tmp_path / "half", tokens=256, **RUN)
    assert verdict.passed
    assert verdict.mtp_not_compared is None
    assert [row["layer"] for row in verdict.layers][-1] == layer
    assert verdict.layers[-1]["scale"] > 0
    again = api.calibrate(tmp_path / "half", [f"a={_data(tmp_path)}"], tmp_path / "again", **CALIBRATION)
    assert list(again.layers)[-1] == layer


def _data(folder):
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [5 + i, 9, 14, 22, 7 + i]}) + "\n" for i in range(20)))
    return path


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_stream_and_resident_agree_to_the_bit(model_type, sources, tmp_path):
    source, data = sources(model_type)[0], [f"a={_data(tmp_path)}"]
    one = api.calibrate(source, data, tmp_path / "r", memory="resident", **CALIBRATION)
    two = api.calibrate(source, data, tmp_path / "s", memory="stream", **CALIBRATION)
    for layer, entry in one.layers.items():
        for name, value in entry.domains["a"].items():
            assert np.array_equal(value, two.layers[layer].domains["a"][name]), (layer, name)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next"])
def test_a_changed_weight_of_it_is_found(model_type, calibrated, tmp_path):
    source, plan, _, _ = calibrated(model_type)
    api.apply(source, plan, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = next(
        n for n in tensors if "down_proj" in n and (".mlp.experts." in n) and (n.startswith("mtp.") or f"layers.{DEPTH}." in n)
    )
    tensors[name][0, 0] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    verdict = api.verify(source, tmp_path / "out", tokens=64, **RUN)
    assert not verdict.passed
    assert verdict.wrong_tensors == [name]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_5_moe_text"])
def test_drop_leaves_it_out(model_type, calibrated, tmp_path):
    source, _, stats, _ = calibrated(model_type)
    plan = api.plan(source, "reap", 4, stats=stats, mtp="drop")
    assert plan.mtp == "drop"
    assert not any(entry.mtp for entry in plan.layers)
    notes = api.apply(source, plan, tmp_path / "out")
    assert any("multi-token prediction were removed" in note for note in notes)
    out = take_inventory(open_checkpoint(tmp_path / "out"))
    assert not out.has_mtp
    config = text_config(out.checkpoint.config)
    assert config.get("num_nextn_predict_layers", config.get("mtp_num_hidden_layers")) == 0
    assert out.size() == (plan.summary.parameters[1], plan.summary.bytes[1])
    assert api.verify(source, tmp_path / "out", tokens=64, **RUN).passed


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("method", ["aimer", "moeits", "expert_sparsity", "hc_smoe", "merge_moe", "easy_ep"])
def test_methods(method, memory, sources, tmp_path):
    """Every kind of method chooses as many experts there as config.json will say."""
    source, data = sources("glm4_moe")[0], [f"a={_data(tmp_path)}"]
    options = {"memory": memory} | CALIBRATION
    given = {} if method in ("aimer", "moeits") else {"data": data, **options}
    plan = api.plan(source, method, 4, out=tmp_path / "plan.json", **given)
    assert [len(entry.keep) for entry in plan.layers if entry.mtp] == [4]
    assert any("chosen by their weights alone" in note for note in plan.notes) == (method == "expert_sparsity")
    api.apply(source, plan, tmp_path / "out")
    assert api.verify(source, tmp_path / "out", tokens=128, memory=memory, device=DEVICE).passed


def test_statistics_of_an_older_version(calibrated, tmp_path):
    """They lack the layer: then its experts are chosen by their weights, and the plan says so."""
    source, _, stats, _ = calibrated("deepseek_v3")
    older = type(stats)(stats.header, {layer: entry for layer, entry in stats.layers.items() if layer < DEPTH})
    plan = api.plan(source, "reap", 4, stats=older)
    by_weights = api.plan(source, "aimer", 4)
    assert plan.layers[-1].keep == by_weights.layers[-1].keep
    assert any("older version" in note for note in plan.notes)


def test_a_plan_of_an_older_version_drops_it(calibrated, tmp_path):
    source, plan, _, _ = calibrated("deepseek_v3")
    raw = plan.to_json()
    del raw["mtp"]
    raw["layers"] = [entry for entry in raw["layers"] if not entry.get("mtp")]
    (tmp_path / "old.json").write_text(json.dumps(raw))
    api.apply(source, tmp_path / "old.json", tmp_path / "out")
    assert not take_inventory(open_checkpoint(tmp_path / "out")).has_mtp
    assert api.verify(source, tmp_path / "out", tokens=64, **RUN).passed


def test_different_numbers_a_layer(calibrated, tmp_path):
    """It gets the number that config.json says, the largest; its outputs are not compared then, and the verdict says why."""
    source, _, stats, _ = calibrated("qwen3_next")
    plan = api.plan(source, "reap", 0.5, stats=stats, budget="global")
    if plan.uniform_count is not None:
        pytest.skip("the layers came out equal")
    assert len(plan.layers[-1].keep) == max(plan.counts)
    api.apply(source, plan, tmp_path / "out")
    verdict = api.verify(source, tmp_path / "out", tokens=64, **RUN)
    assert verdict.passed
    assert "numbers of experts by decoder layer" in verdict.mtp_not_compared


def test_plans_that_contradict_themselves(calibrated, tmp_path):
    source, plan, _, _ = calibrated("deepseek_v3")
    cases = [
        (lambda raw: raw["layers"][-1].update(keep=[0, 1, 2, 4, 5, 6]), "keeps 6 experts, but config.json will say 4"),
        (lambda raw: raw["layers"][-1].pop("mtp"), "multi-token.prediction"),
        (lambda raw: raw.pop("mtp"), "multi-token.prediction"),
        (lambda raw: raw["layers"].pop(), "has experts in layers"),
    ]
    for change, words in cases:
        raw = json.loads(plan.dumps())
        change(raw)
        (tmp_path / "p.json").write_text(json.dumps(raw))
        with pytest.raises(UserError, match=words):
            api.apply(source, load_plan(tmp_path / "p.json"), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_two_layers_of_it_are_chosen_by_weights_and_compared_by_bytes(sources, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(sources("deepseek_v3")[0], source)
    tensors = load_file(source / "model.safetensors")
    more = {
        name.replace(f"layers.{DEPTH}.", f"layers.{DEPTH + 1}."): t.clone()
        for name, t in tensors.items()
        if f"layers.{DEPTH}." in name
    }
    save_file({**tensors, **more}, source / "model.safetensors", {"format": "pt"})
    stats = api.calibrate(source, [f"a={_data(tmp_path)}"], tmp_path / "stats", **CALIBRATION)
    assert max(stats.layers) == DEPTH - 1
    plan = api.plan(source, "reap", 4, stats=stats)
    assert [entry.layer for entry in plan.layers if entry.mtp] == [DEPTH, DEPTH + 1]
    assert any("only one" in note for note in plan.notes)
    api.apply(source, plan, tmp_path / "out")
    verdict = api.verify(source, tmp_path / "out", tokens=64, **RUN)
    assert verdict.passed
    assert "only one" in verdict.mtp_not_compared


@pytest.mark.parametrize("model_type", ["ernie4_5_moe", "longcat_flash", "mimo_v2_flash"])
def test_without_experts_it_stays_as_it_is(model_type, checkpoints, tmp_path):
    names = {
        "ernie4_5_moe": "model.mtp_block.0.mlp.up_proj.weight",
        "longcat_flash": "model.mtp.layers.0.transformer_layer.mlp.up_proj.weight",
    }
    name = names.get(model_type, "model.mtp.layers.0.mlp.up_proj.weight")
    source = tmp_path / "source"
    shutil.copytree(checkpoints(model_type), source)
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, name: torch.randn(4, 4)}, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    api.apply(source, api.plan(source, "random", 4), tmp_path / "kept")
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert torch.equal(kept[name], load_file(source / "model.safetensors")[name])
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert api.verify(source, tmp_path / "kept", tokens=64, **RUN).passed
    api.apply(source, api.plan(source, "random", 4, mtp="drop"), tmp_path / "dropped")
    assert name not in open_checkpoint(tmp_path / "dropped").tensors
    assert api.verify(source, tmp_path / "dropped", tokens=64, **RUN).passed


@pytest.mark.parametrize("form", ["fp8_block", "int4"])
def test_quantised(form, sources, tmp_path):
    quantise_checkpoint(sources("deepseek_v3")[0], tmp_path / "q", form)
    stats = api.calibrate(tmp_path / "q", [f"a={_data(tmp_path)}"], tmp_path / "stats", **CALIBRATION)
    assert max(stats.layers) == DEPTH
    api.apply(tmp_path / "q", api.plan(tmp_path / "q", "reap", 4, stats=stats), tmp_path / "out")
    verdict = api.verify(tmp_path / "q", tmp_path / "out", tokens=64, **RUN)
    assert verdict.passed
    assert verdict.layers[-1]["layer"] == DEPTH


def test_other_tools_lists(calibrated, tmp_path):
    """Lists that do not speak of it leave it to the weights; those that do are taken; masks hold the decoder layers only."""
    source, plan, _, _ = calibrated("deepseek_v3")
    for form, speaks in (("retained", True), ("ordered", True), ("mask", False)):
        api.export(plan, form, tmp_path / form)
        back = api.plan_from(source, tmp_path / form, 4 if form == "ordered" else None)
        assert back.layers[-1].mtp
        assert (back.layers[-1].keep == plan.layers[-1].keep) or not speaks
        assert any("does not contain it" in note for note in back.notes) == (not speaks)
        assert [entry.keep for entry in back.layers[:-1]] == [entry.keep for entry in plan.layers[:-1]]
        assert not any(
            entry.mtp for entry in api.plan_from(source, tmp_path / form, 4 if form == "ordered" else None, mtp="drop").layers
        )


def test_healing_and_skipping_leave_it_as_it_was_pruned(calibrated, tmp_path):
    source, plan, _, _ = calibrated("deepseek_v3")
    api.apply(source, plan, tmp_path / "out")
    api.heal(
        tmp_path / "out",
        source,
        [f"a={_data(tmp_path)}"],
        tmp_path / "healed",
        method="least_squares",
        seq_len=5,
        device=DEVICE,
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "healed"))
    ahead = [name for name in before if f"layers.{DEPTH}." in name]
    assert ahead
    assert all(torch.equal(before[name], after[name]) for name in ahead)
    assert set(before) == set(after)
    api.skip(source, [f"a={_data(tmp_path)}"], tmp_path / "skips", plan=plan, device=DEVICE, seq_len=5, measure=False)
    made = load_plan(tmp_path / "skips" / "expertsmith" / "plan.json")
    assert [entry.skip_threshold is None for entry in made.layers] == [bool(entry.mtp) for entry in made.layers]
    assert api.verify(source, tmp_path / "skips", tokens=64, **RUN).passed


def test_analysis_and_comparison_look_at_the_decoder_layers(sources, calibrated, tmp_path):
    source, plan, _, _ = calibrated("deepseek_v3")
    data = [f"a={_data(tmp_path)}"]
    found = api.analyze(source, tmp_path / "look", data=data, seq_len=5, device=DEVICE)
    assert [row["layer"] for row in found["layers"]] == take_inventory(open_checkpoint(source)).layers
    api.apply(source, plan, tmp_path / "half")
    cut = api.analyze(tmp_path / "half", tmp_path / "cut", data=data, reference=source, seq_len=5, device=DEVICE)
    assert cut
    rows = api.compare(source, ["reap"], [4], data, data, tmp_path / "c", seq_len=5, samples=4, device=DEVICE)
    assert rows


def test_command_line(calibrated, tmp_path, capsys):
    source = calibrated("glm4_moe")[0]
    code, out, _ = run_cli(capsys, "inspect", source)
    assert code == 0
    assert "pruned with" in out
    code, _, err = run_cli(capsys, "plan", source, "-m", "aimer", "-k", "0.5", "--mtp", "maybe", "-o", tmp_path / "p.json")
    assert code == 2
    assert "keep or drop" in err
    code, out, _ = run_cli(
        capsys, "compress", source, "-m", "aimer", "-k", "0.5", "--mtp", "drop", "-o", tmp_path / "o", "--device", DEVICE, "-q"
    )
    assert code == 0
    assert "were removed" in out
