"""Dense → MoE: what is asked for, groups, routers, and checkpoints that are the dense model with neurons left out."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from conftest import logits, run_cli
from expertsmith import api
from expertsmith.arch.dense import DENSE
from expertsmith.conversion import groups, routers
from expertsmith.conversion.settings import WAYS, ask
from expertsmith.conversion.split import Split
from expertsmith.errors import UserError
from gguf_file import write_gguf
from tiny import TINY_DENSE

FREE = [name for name in WAYS if name != "tomoe"]
EXACT = 1e-5  # of the largest logit, where routing weights are exactly one
FLAT = 1e-2  # where they are one up to the flattening


# ---- what is asked for


CONFIG = {**TINY_DENSE["llama"], "model_type": "llama"}


@pytest.mark.parametrize(
    ("options", "experts", "top_k", "width", "shared", "active"),
    [
        ({"active": 0.5}, 8, 4, 16, 0, 0.5),
        ({"active": 0.75}, 8, 6, 16, 0, 0.75),
        ({"experts": 4, "top_k": 1}, 4, 1, 32, 0, 0.25),
        ({"experts": 6, "shared": 2, "active": 0.5}, 6, 2, 16, 32, 0.5),
        (
            {"experts": 5, "shared": 1, "active": 0.5},
            5,
            1,
            16,
            48,
            0.5,
        ),  # 128 = 5 * 16 + 48: experts in steps of 8, the rest is shared
        (
            {"active": 0.6, "active_of": "block"},
            8,
            4,
            16,
            0,
            0.5,
        ),  # attention is 3072 of 15360: (0.6 * 15360 - 3072) / 12288 = 0.5
    ],
)
def test_numbers_follow_from_what_is_asked(options, experts, top_k, width, shared, active):
    asked = ask(CONFIG, "here", "moefication", **options)
    assert (asked.experts, asked.top_k, asked.width, asked.shared) == (experts, top_k, width, shared)
    assert asked.active == pytest.approx(active)
    assert asked.experts * asked.width + asked.shared == 128  # no neuron is lost


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "moefication",
            {"experts": 7},
            r"128 neurons do not divide into 7 experts \(2 would be left\).*--experts 4 or 8.*--shared 1",
        ),
        ("cmoe", {"experts": 6, "shared": 2, "active": 0.1}, r"always-on part and one expert alone are 0.375"),
        (
            "moefication",
            {"active": 0.2, "active_of": "block"},
            r"impossible if attention is kept, which alone is 0.200 of them",
        ),
        ("moefication", {"active": 1.5}, "between 0 and 1"),
        ("moefication", {"top_k": 9}, "there are 8 routed experts"),
        ("moefication", {"top_k": 2, "active": 0.75}, "remove one of the two"),
        ("moefication", {"router": "gate_maen"}, "did you mean gate_mean"),
        ("moefication", {"target": "qwen3_moe"}, "choose mixtral or granitemoeshared"),
        ("moefication", {"experts": 1}, "at least two routed experts"),
        ("moefication", {"attention": "static"}, "learned, but method moefication is not"),
        ("tomoe", {"top_k": 2}, "selects one expert"),
        ("tomoe", {"shared": 1}, "--export core"),
        ("tomoe", {"attention": "static"}, "--active-of block"),
        ("tomeo", {}, "did you mean tomoe"),
    ],
)
def test_what_does_not_go_together_is_refused(method, options, message):
    with pytest.raises(UserError, match=message):
        ask(CONFIG, "here", method, **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtral"}, "is already a Mixture of Experts.*compress"),
        ({"model_type": "phi"}, "attention and MLP run in parallel"),
        ({"model_type": "mamba"}, "there is no convertible dense family 'mamba'"),
        ({**CONFIG, "mlp_bias": True}, "mlp_bias"),
        ({**CONFIG, "attention_bias": True}, "use --target granitemoeshared"),
        ({**CONFIG, **TINY_DENSE["qwen3"], "model_type": "qwen3", "use_sliding_window": True}, "sliding-window"),
    ],
)
def test_models_that_cannot_be_converted(config, message):
    with pytest.raises(UserError, match=message):
        ask(config, "here", "random")


def test_several_experts_go_where_the_router_takes_logits():
    """GraniteMoeShared's top_k has no ties; Mixtral is for one expert a token, or on request."""
    assert ask(CONFIG, "here", "moefication").target.model_type == "granitemoeshared"
    assert ask(CONFIG, "here", "moefication", target="mixtral").target.model_type == "mixtral"
    assert ask(CONFIG, "here", "moefication", top_k=1).target.model_type == "mixtral"
    assert ask(CONFIG, "here", "moefication", top_k=8).target.model_type == "mixtral"
    assert ask(CONFIG, "here", "tomoe").target.model_type == "mixtral"
    assert ask(CONFIG, "here", "tomoe", core=True).target.model_type == "granitemoeshared"


def test_mistral_slides_in_mixtral_only():
    config = {**CONFIG, "model_type": "mistral", "sliding_window": 16}
    assert ask(config, "here", "random").target.model_type == "mixtral"
    with pytest.raises(UserError, match="slides over 16 tokens"):
        ask(config, "here", "cmoe", experts=6, shared=2)


# ---- groups


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(1, 7), st.integers(0, 2**31), st.booleans())
def test_balanced_assignment_is_optimal(columns, size, seed, ties):
    """Against scipy's linear assignment with every column repeated; also with many equal costs."""
    draw = np.random.default_rng(seed)
    cost = draw.integers(0, 4, (columns * size, columns)).astype(float) if ties else draw.normal(size=(columns * size, columns))
    labels = groups.balanced(cost)
    assert (np.bincount(labels, minlength=columns) == size).all()
    rows, slots = linear_sum_assignment(np.repeat(cost, size, axis=1))
    best = np.repeat(cost, size, axis=1)[rows, slots].sum()
    got = cost[np.arange(len(cost)), labels].sum()
    assert got == pytest.approx(best, abs=1e-9)
    start = groups.greedy(cost)
    assert got <= cost[np.arange(len(cost)), start].sum() + 1e-9


def test_kmeans_finds_planted_clusters():
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(4, 6)) * 10
    truth = np.repeat(np.arange(4), 8)
    labels = groups.balanced_kmeans(centres[truth] + draw.normal(size=(32, 6)) * 0.1, 4, seed=1)
    assert len({(a, b) for a, b in zip(truth, labels, strict=True)}) == 4
    assert (groups.balanced_kmeans(centres[truth], 4, seed=1) == groups.balanced_kmeans(centres[truth], 4, seed=1)).all()


def test_markers_by_hand(dense):
    """Every token marks exactly K neurons (so the rates sum to K), those with the largest |silu(g^x^) u^x^|."""
    from transformers import AutoModelForCausalLM

    mlp = AutoModelForCausalLM.from_pretrained(dense("llama")).model.layers[0].mlp
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(0))
    marked = groups.markers(mlp, x, 10, rows=7)
    assert (marked.sum(1) == 10).all()
    assert float(marked.float().mean(0).sum()) == pytest.approx(10)
    unit = x / x.norm(dim=1, keepdim=True)
    gate = mlp.gate_proj.weight / mlp.gate_proj.weight.norm(dim=1, keepdim=True)
    up = mlp.up_proj.weight / mlp.up_proj.weight.norm(dim=1, keepdim=True)
    h = (torch.nn.functional.silu(unit @ gate.T) * (unit @ up.T)).abs().detach()
    for row, flags in zip(h, marked, strict=True):
        assert set(row.topk(10).indices.tolist()) == set(flags.nonzero().flatten().tolist())


def test_activation_groups_by_hand():
    """Six neurons, four tokens; 2 experts of 2, the other two are shared.

    Rates: n0 4, n1 3 → shared. Of the rest n2 = 1100 and n3 = 0011 have rate 2, n4 = 1000 and n5 = 0010 rate 1. Centroids n2 and n3;
    L1: n4 to n2 1, to n3 3; n5 to n2 3, to n3 1. So {n2, n4} and {n3, n5}; both members are 1/2 from the new centroid (1 .5 0 0): the
    first, n2 (and n3), represents.
    """
    columns = ["1111", "1110", "1100", "0011", "1000", "0010"]
    marked = torch.tensor([[int(c[t]) for c in columns] for t in range(4)], dtype=torch.uint8)
    experts, shared, representatives = groups.activation_groups(marked, 2, 2)
    assert shared.tolist() == [0, 1]
    assert [e.tolist() for e in experts] == [[2, 4], [3, 5]]
    assert representatives == [2, 3]


# ---- routers


def test_router_recovers_a_planted_linear_map():
    draw = torch.Generator().manual_seed(0)
    x, truth = torch.randn(500, 12, generator=draw), torch.randn(4, 12, generator=draw)
    fitted = routers.fit_linear(x, x @ truth.T, ridge=1e-12)
    assert (fitted - truth).abs().max() < 1e-5


def test_captured_energy_against_brute_force(dense):
    from transformers import AutoModelForCausalLM

    mlp = AutoModelForCausalLM.from_pretrained(dense("llama")).model.layers[0].mlp
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    experts, shared = groups.random_groups(128, 6, 16, seed=0)
    split = Split(experts, shared, routers.make_router("ridge", mlp, x, experts), 2)
    found = routers.measure(mlp, x, split, seed=0)
    with torch.no_grad():
        a = (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).abs() * mlp.down_proj.weight.norm(dim=0)
    got = best = 0.0
    count = [0] * 6
    for t in range(60):
        energies = [float(a[t, ids].sum()) for ids in experts]
        scores = (split.router @ x[t]).tolist()
        picked = sorted(range(6), key=lambda e: -scores[e])[:2]
        for e in picked:
            count[e] += 1
        got += float(a[t, shared].sum()) + sum(energies[e] for e in picked)
        best += float(a[t, shared].sum()) + sum(sorted(energies)[-2:])
    assert found["captured"]["router"] == pytest.approx(got / float(a.sum()), rel=1e-4)
    assert found["captured"]["oracle"] == pytest.approx(best / float(a.sum()), rel=1e-4)
    assert found["share"] == pytest.approx([c / 120 for c in count])
    assert found["captured"]["oracle"] >= found["captured"]["router"] > found["captured"]["random"]


# ---- whole conversions


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("method", FREE)
def test_conversion_is_the_dense_model_with_neurons_left_out(method, family, dense, texts, tmp_path):
    """Labels partition the neurons, and plain transformers runs what the masked dense model computes."""
    options = {"experts": 6, "shared": 2} if method in ("cmoe", "expertweaver") else {"experts": 8}
    data = () if method == "random" else texts
    result = api.convert(
        dense(family), method, tmp_path / "out", data=data, active=0.5, seq_len=40, measure=False, max_growth=4, **options
    )
    assert result["export"]["relative"] <= FLAT
    assert result["export"]["same_choice"] >= 0.99
    record = json.loads((tmp_path / "out/expertsmith/splits.json").read_text())
    for row in record["layers"]:
        ids = sorted(sum(row["experts"], list(row["shared"])))
        assert ids == list(range(128))
        assert {len(e) for e in row["experts"]} == {16}
    for row in result["layers"]:
        assert row["captured"]["oracle"] >= row["captured"]["router"] - 1e-9
    assert result["sizes"]["mlp_ratio_useful"] == pytest.approx(0.5)
    # counted parameters are those of the tensors that a token's forward reads
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == result["sizes"]["total"]
    idle = sum(
        t.numel()
        for name, t in tensors.items()
        if ".experts." in name or "sparse_moe.input_linear" in name or "sparse_moe.output_linear" in name
    )
    share = result["sizes"]["top_k"] / result["sizes"]["experts"]
    assert result["sizes"]["total"] - idle * (1 - share) == pytest.approx(result["sizes"]["active"]["total"], rel=1e-9)


@pytest.mark.parametrize("family", DENSE)
def test_all_experts_are_the_dense_model(family, dense, texts, tmp_path):
    api.convert(dense(family), "moefication", tmp_path / "out", data=texts, experts=8, top_k=8, seq_len=40, measure=False)
    reference = logits(dense(family))
    assert (logits(tmp_path / "out") - reference).abs().max() <= EXACT * reference.abs().max()


def test_quality_rises_with_top_k(dense, texts, tmp_path):
    """KL to the dense model falls as more experts run, to nothing at all of them."""
    kl = []
    for k in (2, 4, 6, 8):
        result = api.convert(
            dense("llama"), "cmoe", tmp_path / str(k), data=texts, eval_data=texts, experts=8, top_k=k, seq_len=40
        )
        kl.append(result["quality"]["mean"]["kl"])
    assert kl == sorted(kl, reverse=True)
    assert kl[-1] < 1e-6


def test_same_seed_same_bytes(dense, texts, tmp_path):
    for name in ("one", "two"):
        api.convert(dense("qwen3"), "moefication", tmp_path / name, data=texts, seq_len=40, measure=False, seed=3)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_flattening_keeps_the_choices():
    """Card MoEfication, check 4: a softmax of flattened logits chooses the same sets for 99.99 % of tokens, with weights near 1/k."""
    from expertsmith.arch.dense import TARGETS
    from expertsmith.conversion.export import Shape, scales_of

    draw = torch.Generator().manual_seed(0)
    x = 8 * torch.randn(200_000, 8, generator=draw)
    factor = scales_of(TARGETS["mixtral"], Shape(8, 4, 64, 0), float(x.std())).router
    assert np.log2(factor) == round(np.log2(factor))  # a power of two: lossless
    probabilities = (x * factor).softmax(-1)
    picked = probabilities.topk(4, -1)
    ours = torch.zeros_like(x, dtype=torch.bool).scatter_(1, picked.indices, True)
    truth = torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(4, -1).indices, True)
    assert float((ours == truth).all(1).float().mean()) >= 0.9999
    weights = picked.values / picked.values.sum(-1, keepdim=True)
    assert float((4 * weights - 1).abs().max()) < 1e-2


def test_choices_survive_bfloat16(dense, texts, tmp_path):
    """Check 4, second half: a bfloat16 model with the router kept in float32 chooses as in float32 for 99.5 % of tokens and layers."""
    result = api.convert(
        dense("llama", torch.bfloat16), "cmoe", tmp_path / "out", data=texts, experts=6, shared=2, seq_len=40, measure=False
    )
    assert result["export"]["same_choice"] >= 0.995
    tensors = load_file(tmp_path / "out/model.safetensors")
    kinds = {t.dtype for name, t in tensors.items() if "router" in name}
    assert kinds == {torch.float32}
    assert tensors["model.layers.0.block_sparse_moe.output_linear.weight"].dtype == torch.bfloat16


def test_padding_counts_apart(dense, texts, tmp_path):
    """Qwen2-MoE cannot be without an always-on part: eight zero neurons are padding, not active neurons."""
    result = api.convert(dense("qwen2"), "moefication", tmp_path / "out", data=texts, seq_len=40, measure=False)
    assert result["sizes"]["shared_width"] == 8
    assert result["sizes"]["active"]["padding"] == 3 * 32 * 8 * 3
    assert result["sizes"]["mlp_ratio_useful"] == pytest.approx(0.5)


@pytest.mark.parametrize("family", DENSE)
def test_other_commands_work_on_the_result(family, dense, texts, tmp_path):
    out = tmp_path / "moe"
    options = {"experts": 6, "shared": 2} if family != "qwen3" else {}
    api.convert(dense(family), "cmoe", out, data=texts, active=0.5, seq_len=40, measure=False, **options)
    facts = api.inspect(out)
    assert facts["num_experts"] == options.get("experts", 8)
    assert api.evaluate(out, texts, reference=dense(family), seq_len=40).has_reference
    done = api.compress(out, "reap", 4, out=tmp_path / "pruned", data=texts, seq_len=40, pack=False)
    assert done["verify"].passed
    assert not [f for f in api.lint(out, engine="transformers") if f.level == "error"]
    seen = api.analyze(out, tmp_path / "look", data=texts, all_experts=8, dense=dense(family), seq_len=40, pack=False)
    for found in seen["layers"][0]["static"][
        "projections"
    ].values():  # experts were cut out of the dense FFN: each neuron finds itself
        assert min(found["dense_match"]) == pytest.approx(1, abs=1e-5)


# ---- the command line


def test_command_line(dense, texts, tmp_path, capsys):
    data = [part for text in texts for part in ("-d", text)]
    code, out, _ = run_cli(capsys, "convert", dense("llama"), "-m", "cmoe", "--experts", 6, "--shared", 2, "-a", 0.5, "--seq-len", 40, *data, "-o", tmp_path / "out", "-q")  # fmt: skip
    assert code == 0
    assert "each token uses" in out
    assert "captured energy" in out
    code, out, _ = run_cli(
        capsys, "convert", dense("llama"), "-m", "random", "--seq-len", 40, "-o", tmp_path / "json", "-q", "--json"
    )
    assert code == 0
    assert json.loads(out)["sizes"]["top_k"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "cmoe"], "method cmoe needs calibration text; pass --data FILE"),
        (["-m", "cmoe", "--active-of", "mpl"], "--active-of is 'mpl'; choose mlp or block"),
        (["-m", "moefication", "--experts", "7"], "128 neurons do not divide into 7 experts"),
        (["-m", "random", "--gguf-file", "no.gguf"], "there is no GGUF file"),
        (["-m", "tomoe", "--experts", "8"], "the checkpoint would have .* --max-growth"),
    ],
)
def test_bad_input(arguments, message, dense, texts, tmp_path, capsys):
    if "tomoe" in arguments:
        arguments = [*arguments, "-d", texts[0], "--max-growth", "1.5"]
    code, _, err = run_cli(capsys, "convert", dense("llama"), *arguments, "-o", tmp_path / "out", "-q")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err)
    assert not (tmp_path / "out").exists()


def test_an_moe_model_is_sent_to_compress(checkpoints, tmp_path, capsys):
    code, _, err = run_cli(capsys, "convert", checkpoints("mixtral"), "-m", "random", "-o", tmp_path / "out", "-q")
    assert code == 2
    assert "is already a Mixture of Experts" in err


def test_a_model_of_the_hub(dense, tmp_path, monkeypatch):
    """owner/name is fetched as a whole, weights too; what cannot be fetched is said in one line."""
    import huggingface_hub

    def fetch(name, **_):
        if name != "owner/small":
            raise OSError("401 Client Error")
        return str(dense("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    result = api.convert("owner/small", "random", "out", top_k=8, measure=False)
    assert result["export"]["relative"] <= EXACT
    assert "`owner/small`" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(UserError, match="could not be downloaded from the hub: 401 Client Error"):
        api.convert("owner/other", "random", "elsewhere")


def test_damaged_mlps_are_named(dense, tmp_path):
    from safetensors.torch import save_file

    source, broken = dense("llama"), tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        api.convert(broken, "random", tmp_path / "out")


# ---- GGUF


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, dense):
    """A folder with the tiny Llama as a GGUF file, whole, without one tensor, and cut."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", dense("llama"))
    write_gguf(folder / "lacking.gguf", dense("llama"), leave_out="blk.1.ffn_up.weight")
    whole = (folder / "tiny.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    return folder


def test_gguf_is_converted(gguf_file, dense, tmp_path):
    """The dequantised copy computes what the safetensors original does, and the conversion starts from it."""
    result = api.convert(gguf_file, "random", tmp_path / "out", gguf_file="tiny.gguf", top_k=8, measure=False)
    assert result["export"]["relative"] <= EXACT
    assert (logits(tmp_path / "out.dense") - logits(dense("llama"))).abs().max() < 1e-4
    assert (logits(tmp_path / "out") - logits(dense("llama"))).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["lacking.gguf", "cut.gguf"])
def test_damaged_gguf_files_are_refused(name, gguf_file, tmp_path):
    with pytest.raises(UserError, match=rf"{name}|lacks"):
        api.convert(gguf_file, "random", tmp_path / "out", gguf_file=name)
    assert not (tmp_path / "out.dense").exists()


@pytest.mark.parametrize(("pack", "sequences"), [(False, 16), (True, 16 * 40 // 50 + 1)])
def test_text_is_packed_as_calibrate_does(pack, sequences, dense, tmp_path):
    """16 records of 40 tokens: a sequence each, or windows of 50."""
    from expertsmith.views.progress import Silent

    file = tmp_path / "a.jsonl"
    rows = [{"input_ids": [3 + (7 * i + j) % 90 for j in range(40)]} for i in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    progress = Silent()
    progress.note = said.append
    api.convert(
        dense("llama"), "cmoe", tmp_path / "out", experts=4, top_k=2, data=[str(file)], seq_len=50, pack=pack, measure=False, progress=progress
    )  # fmt: skip
    assert any(f"in {sequences} sequences" in line for line in said)
