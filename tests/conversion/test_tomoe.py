"""ToMoE: masks, losses, training that can be interrupted, and what is written of it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from conftest import logits, run_cli
from expertsmith import api
from expertsmith.arch.dense import DENSE, TARGETS
from expertsmith.checkpoint import open_checkpoint
from expertsmith.conversion import export, flow, sampling, tomoe
from expertsmith.conversion.attention import Heads
from expertsmith.conversion.split import Split
from expertsmith.conversion.start import start_layer
from expertsmith.conversion.training import Recipe, Student, batch_of, outcome, padded, train
from expertsmith.engine.loading import load_model
from expertsmith.errors import UserError
from expertsmith.views.progress import Silent

EXACT = 1e-5  # of the largest logit
TRAIN = {"seq_len": 20, "measure": False, "max_growth": 9}


def small_net(**options) -> tomoe.MaskNet:
    return tomoe.MaskNet(3, options.pop("experts", 4), 32, 128, seed=0, **options)


# ---- masks


def test_frequency_of_a_kept_neuron():
    """Card, check 8: P(m = 1) = 1 - exp(-exp(q + b)), within 1 %."""
    generator = torch.Generator().manual_seed(0)
    for q in (-5.0, -3.367, -3.0, -2.0):
        logits_ = torch.full((200_000,), q)
        kept = sampling.sample_mask(logits_, sampling.gumbel(logits_.shape, generator, logits_.device), 1.0)
        assert float(kept.mean()) == pytest.approx(1 - math.exp(-math.exp(q + 3)), abs=0.01)
        assert float(sampling.keep_probability(logits_[:1])) == pytest.approx(1 - math.exp(-math.exp(q + 3)), rel=1e-5)
    assert float(sampling.keep_probability(torch.tensor(sampling.EVEN))) == pytest.approx(0.5)
    assert 1 - float(sampling.keep_probability(torch.tensor(0.0, dtype=torch.float64))) < 2e-9  # training begins dense


def test_without_noise_the_edge_is_at_minus_b():
    q = torch.tensor([-3.01, -2.99])
    assert sampling.sample_mask(q, torch.zeros(2), 0.0).tolist() == [0.0, 1.0]


def test_dropped_neurons_keep_a_gradient():
    """Check 9: with one multiplication by the mask, a dropped neuron is told what it would bring."""
    q = torch.tensor([-3.2, -2.0], requires_grad=True)
    m = sampling.sample_mask(q, torch.zeros(2), 0.0)
    assert m.tolist() == [0.0, 1.0]
    (m * torch.tensor([2.0, 3.0])).sum().backward()
    assert (q.grad != 0).all()


def test_straight_through_router():
    x = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    y, p = tomoe.route(x, None, 0.0)
    assert y.tolist() == [[1.0, 0.0, 0.0]]
    assert torch.allclose(p, x.softmax(-1))
    y[0, 1].backward()
    soft = (x.detach() / 0.4).softmax(-1)[0]
    assert torch.allclose(x.grad[0], soft[1] * (torch.tensor([0.0, 1.0, 0.0]) - soft) / 0.4, atol=1e-6)


def test_start_sets_any_logits():
    net = small_net()
    targets = [torch.randn(4, 128, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    net.start_from(targets, [torch.full((4, 32), float(i)) for i in range(3)])
    for got, want in zip(net.logits(), targets, strict=True):
        assert (got - want).abs().max() < 1e-3
    assert float(net.routers[2].weight.mean()) == 2.0


def test_noise_of_the_hypernetwork_is_fixed():
    assert "z" not in dict(small_net().named_parameters())
    assert torch.equal(small_net().z, small_net().z)


# ---- losses, by hand


def test_losses_by_hand():
    # |log((.5 + .001) / (.25 + .001))| = log(501 / 251)
    assert float(tomoe.budget_loss(torch.tensor([0.5]), 0.25)) == pytest.approx(math.log(501 / 251))
    # two experts over four neurons: 1100 and 0100 → coverage 2/4; -log(.501 / 1.001)
    loss, coverage = tomoe.union_loss([torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 0]])])
    assert coverage.tolist() == [0.5]
    assert float(loss) == pytest.approx(-math.log(0.501 / 1.001))
    # f = (3/4, 1/4), P = (.6, .4): 2 (.45 + .1) = 1.1; balanced: 1
    hard = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    assert float(tomoe.balance_loss(hard, torch.tensor([[0.6, 0.4]] * 4))) == pytest.approx(1.1)
    assert float(tomoe.balance_loss(torch.eye(2), torch.eye(2))) == pytest.approx(1.0)


@pytest.mark.parametrize("rows", [3, 100])
def test_chunked_kl_against_torch(rows):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(10, 6, generator=generator).requires_grad_()
    teacher, weight = torch.randn(10, 6, generator=generator), torch.randn(20, 6, generator=generator)
    ours = tomoe.ChunkedKL.apply(student, teacher, weight, rows)
    mine = torch.autograd.grad(3 * ours, student)[0]
    p, q = (teacher @ weight.T).log_softmax(-1), (student @ weight.T).log_softmax(-1)
    theirs = nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    assert torch.allclose(mine, torch.autograd.grad(3 * theirs, student)[0], atol=1e-5)
    assert float(tomoe.ChunkedKL.apply(teacher, teacher, weight, rows)) == pytest.approx(0, abs=1e-5)


# ---- widths


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1, 512), min_size=2, max_size=8), st.floats(0.2, 0.95), st.sampled_from([8, 16, 64]))
def test_widths_meet_the_budget(expected, ratio, align):
    """Check 4: within half a percent of p, or half a step a layer; bounded; whole steps."""
    widths = tomoe.layer_widths(expected, 512, ratio, equal=False, align=align)
    assert all(w % align == 0 and 0 < w <= 512 for w in widths)
    off = abs(sum(widths) - ratio * 512 * len(widths))
    assert off <= max(0.005 * 512 * len(widths), align * (len(widths) / 2 + 1))
    equal = tomoe.layer_widths(expected, 512, ratio, equal=True, align=align)
    assert len(set(equal)) == 1
    assert abs(equal[0] - ratio * 512) <= align


def test_ranking_takes_the_highest_and_breaks_ties_by_id():
    q = torch.tensor([[0.0, 3, 1, 1], [5, 0, 0, 0]])
    assert [ids.tolist() for ids in tomoe.rank_masks([q], [2])[0]] == [[1, 2], [0, 1]]


def test_overlap():
    a, b, c = torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([0, 1])
    assert tomoe.mean_jaccard([a, b, c]) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert tomoe.mean_jaccard([a]) == 1.0


def test_core_and_whole_are_the_same_function():
    split = Split([torch.tensor([0, 1, 4]), torch.tensor([1, 2, 4])], torch.zeros(0, dtype=torch.long), torch.eye(2), 1)
    core = split.core()
    assert core.shared.tolist() == [1, 4]
    assert [e.tolist() for e in core.experts] == [[0], [2]]
    assert [e.tolist() for e in core.whole().experts] == [e.tolist() for e in split.experts]


# ---- training


@pytest.fixture(scope="module")
def loaded(dense):
    return load_model(open_checkpoint(dense("llama")), None)


SEQUENCES = [torch.randint(3, 120, (20,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(6)]


class _Accelerator:
    """One process, without mixed precision: what the loop asks of accelerate."""

    device, process_index, num_processes, is_main_process = torch.device("cpu"), 0, 1, True

    def prepare(self, *things):
        return things

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, limit):
        torch.nn.utils.clip_grad_norm_(parameters, limit)


def run_training(loaded, folder, recipe, progress=None, **options):
    net = small_net(experts=recipe.experts, attention=recipe.attention, head=8)
    kept = {"fingerprint": "f", "resume": True, "accelerator": _Accelerator(), **options}
    train(loaded.module, loaded.layers, net, recipe, SEQUENCES, [padded(SEQUENCES[:2])], folder, align=8, progress=progress or Silent(), **kept)  # fmt: skip
    return net


class _Stops(Silent):
    """Interrupts a training after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def task(self, *_):
        from contextlib import nullcontext

        def advance(tokens: float, earlier: bool = False) -> None:
            if tokens:
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt

        return nullcontext(advance)


@pytest.mark.parametrize("attention", ["none", "dynamic"])
def test_an_interrupted_training_gives_the_same_result(attention, loaded, tmp_path):
    recipe = Recipe(ratio=0.5, steps=6, experts=3, batch=2, save_every=2, watch_every=3, attention=attention, attention_share=0.2 if attention != "none" else 0.0)  # fmt: skip
    straight = run_training(loaded, tmp_path / "a", recipe).state_dict()
    with pytest.raises(KeyboardInterrupt):
        run_training(loaded, tmp_path / "b", recipe, _Stops(5))
    resumed = run_training(loaded, tmp_path / "b", recipe).state_dict()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    steps = [json.loads(line)["step"] for line in (tmp_path / "b/training.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_state_of_another_training_is_refused(loaded, tmp_path):
    recipe = Recipe(ratio=0.5, steps=2, experts=3, save_every=1)
    run_training(loaded, tmp_path, recipe)
    with pytest.raises(UserError, match=r"other settings \(lr\).*--fresh"):
        run_training(loaded, tmp_path, Recipe(ratio=0.5, steps=2, experts=3, save_every=1, lr=1e-4))
    with pytest.raises(UserError, match="another model or other data"):
        run_training(loaded, tmp_path, recipe, fingerprint="g")
    (tmp_path / "state.pt").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        run_training(loaded, tmp_path, recipe)
    run_training(loaded, tmp_path, recipe, resume=False)


def test_loss_falls_and_only_masks_are_trained(loaded, tmp_path):
    before = {name: value.clone() for name, value in loaded.module.state_dict().items()}
    recipe = Recipe(ratio=0.5, steps=120, experts=2, batch=2, lr=1e-2, router_lr=1e-2, save_every=200, watch_every=60)
    net = run_training(loaded, tmp_path, recipe)
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert rows[0]["ratio"] > 0.99  # begins dense
    assert rows[-1]["ratio"] == pytest.approx(0.5, abs=0.06)
    assert rows[-1]["budget"] < 0.2
    assert all(torch.equal(before[name], value) for name, value in loaded.module.state_dict().items())
    splits, heads = outcome(net, recipe, 8)
    assert not heads
    assert {len(ids) for split in splits for ids in split.experts} == {64}
    assert outcome(net, recipe, 8)[0][0].experts[0].tolist() == splits[0].experts[0].tolist()


def test_any_batch_size(loaded):
    """Noise-free, the KL of two padded rows is the token-weighted mean of theirs."""
    recipe, net = Recipe(ratio=0.5, steps=1, experts=3, noise=0.0), small_net(experts=3)
    with torch.no_grad():
        for decoder in net.decoders:
            decoder.weight.mul_(30)  # some neurons below the edge
    student = Student(loaded.module, loaded.layers, net)
    rows = [SEQUENCES[0], SEQUENCES[1][:11]]
    each = [float(student(*padded([row]), recipe, 0, 0)[1]["kl"]) for row in rows]
    both = float(student(*padded(rows), recipe, 0, 0)[1]["kl"])
    assert each[0] > 1e-4
    assert both == pytest.approx((20 * each[0] + 11 * each[1]) / 31, rel=1e-4)


def test_an_epoch_sees_every_sequence_once_and_ranks_share_a_batch():
    recipe = Recipe(ratio=0.5, batch=2)
    seen = [tuple(row.tolist()) for step in range(3) for row in batch_of(SEQUENCES, recipe, step)[0]]
    assert sorted(seen) == sorted(map(tuple, SEQUENCES))
    whole = batch_of(SEQUENCES, recipe, 1)[0]
    parts = [batch_of(SEQUENCES, recipe, 1, rank, 2)[0] for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_schedule():
    recipe = Recipe(ratio=0.5, steps=100, warmup=10)
    assert [recipe.at(step)[1] for step in (0, 60, 75, 90, 99)] == pytest.approx([1, 1, 0.5, 0, 0])
    assert [recipe.at(step)[2] for step in (0, 15, 30, 99)] == pytest.approx([1, 0.75, 0.5, 0.5])
    assert recipe.at(0)[0] == pytest.approx(0.1)
    assert recipe.at(100)[0] == pytest.approx(0.1)


def test_the_start_beats_random_experts(loaded):
    """It captures more of the layer's output than experts and router drawn at random."""
    from expertsmith.conversion import routers

    mlp = loaded.layers[1].mlp
    x = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    begun = start_layer(mlp, x, 4, 64, seed=0)
    experts = [row.topk(64).indices.sort().values for row in begun.logits]
    none = torch.zeros(0, dtype=torch.long)
    ours = routers.measure(mlp, x, Split(experts, none, begun.router, 1), 0)["captured"]
    drawn = [torch.randperm(128, generator=torch.Generator().manual_seed(i))[:64].sort().values for i in range(4)]
    theirs = routers.measure(mlp, x, Split(drawn, none, torch.randn(4, 32), 1), 0)["captured"]
    assert ours["router"] > theirs["oracle"]
    assert ours["oracle"] >= ours["router"] > ours["random"]


# ---- what is written


@pytest.mark.parametrize(("family", "form"), [*((f, "plain") for f in DENSE), *((f, "core") for f in DENSE if f != "qwen3")])
def test_written_checkpoint_is_the_trained_model(family, form, dense, texts, tmp_path):
    """Checks 2 and 10: stock classes, no remote code, 1e-5 of the largest logit; both forms are one function."""
    options = {"active": 0.75} if form == "core" else {}
    result = api.convert(
        dense(family), "tomoe", tmp_path / "out", data=texts, experts=3, steps=2, export=form, **options, **TRAIN
    )
    assert result["export"]["relative"] <= EXACT
    assert result["export"]["same_choice"] == 1.0
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())
    assert logits(tmp_path / "out").isfinite().all()
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == result["sizes"]["total"]
    assert result["sizes"]["mlp_ratio_useful"] == pytest.approx(options.get("active", 0.5), abs=0.005)
    if form == "core":
        assert result["target"] in ("granitemoeshared", "qwen2_moe")
        assert result["sizes"]["shared_width"] > 8
        api.convert(dense(family), "tomoe", tmp_path / "plain", data=texts, experts=3, steps=2, **options, **TRAIN)
        assert (logits(tmp_path / "out") - logits(tmp_path / "plain")).abs().max() < 1e-4
        assert sum(t.numel() for t in load_file(tmp_path / "plain/model.safetensors").values()) > result["sizes"]["total"]


def test_core_needs_an_always_on_part(dense, texts, tmp_path):
    with pytest.raises(UserError, match="which a qwen3_moe model does not have; use --export plain"):
        api.convert(dense("qwen3"), "tomoe", tmp_path / "out", data=texts, export="core")


@pytest.mark.parametrize("family", DENSE)
def test_all_neurons_are_the_dense_model(family, dense, texts, tmp_path):
    """Check 1: p = 1."""
    api.convert(dense(family), "tomoe", tmp_path / "out", data=texts, experts=2, active=1.0, steps=0, **TRAIN)
    reference = logits(dense(family))
    assert (logits(tmp_path / "out") - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_two_conversions_are_the_same_bytes(dense, texts, tmp_path):
    """Check 3: with one seed; and two forwards of the result are the same."""
    for name in ("one", "two"):
        api.convert(dense("llama"), "tomoe", tmp_path / name, data=texts, experts=2, steps=2, **TRAIN)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "one"))


def test_layers_may_have_widths_of_their_own(dense, texts, tmp_path):
    result = api.convert(dense("llama"), "tomoe", tmp_path / "out", data=texts, experts=2, steps=2, widths="per_layer", **TRAIN)
    widths = [row["widths"][0] for row in result["layers"]]
    assert sum(widths) == pytest.approx(0.5 * 128 * 3, abs=8)
    assert result["sizes"]["expert_width"] >= max(widths)
    assert result["sizes"]["active"]["padding"] == 3 * 32 * sum(result["sizes"]["expert_width"] - w for w in widths)
    assert result["export"]["relative"] <= EXACT


def test_growth_is_refused_before_training(dense, texts, tmp_path):
    with pytest.raises(UserError, match=r"times the dense model's.*--export core.*--max-growth"):
        api.convert(dense("llama"), "tomoe", tmp_path / "out", data=texts, experts=8, active=0.9)
    assert not (tmp_path / "out.work").exists()


def test_useless_routing_is_said():
    asked = flow.Asked(flow.WAYS["tomoe"], DENSE["llama"], TARGETS["mixtral"], 2, 1, 64, 0, "learned", 0.5)
    rows = [{"layer": 0, "overlap": 0.95, "share": [0.95, 0.05]}]
    notes = flow.warnings_of(flow.Converted([], [], rows), asked)
    assert "static prune" in notes[0]
    assert "layers (first: 0)" in notes[1]


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_pruned_attention(family, mode, dense, texts, tmp_path):
    """Check 7: fewer query-key dimensions with the scale of the full head equal the masked model; also through remote code and a cache."""
    from transformers import AutoModelForCausalLM

    import expertsmith

    source = open_checkpoint(dense(family))
    model = load_model(source, None)
    generator = torch.Generator().manual_seed(0)
    heads = []
    for _ in model.layers:
        first = torch.randperm(4, generator=generator)[:2].sort().values
        shapes = {"vo_router.weight": (128, 32), "vo_router.bias": (128,), "vo_norm.weight": (128,), "vo_norm.bias": (128,), "vo_decoder.weight": (8, 128)}  # fmt: skip
        parts = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        heads.append(
            Heads(torch.cat([first, first + 4]), 5, parts) if mode == "dynamic" else Heads(torch.cat([first, first + 4]))
        )
    everything = [torch.arange(128)]
    splits = [
        Split(everything * 2, torch.zeros(0, dtype=torch.long), torch.randn(2, 32, generator=generator), 1) for _ in heads
    ]
    target = TARGETS[DENSE[family].targets[0]]
    export.write(tmp_path / "out", source, target, splits, [1.0] * 3, {}, heads=heads)
    found = flow.export_difference(model, splits, heads, tmp_path / "out", flow.as_batches(SEQUENCES[:3]))
    assert found["relative"] <= EXACT
    assert (
        logits(tmp_path / "out", trust_remote_code=True) - logits(dense(family))
    ).abs().max() > 0.05  # the masks do something
    sizes = export.sizes(source, splits, target, heads)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert sum(t.numel() for name, t in tensors.items() if ".self_attn." in name) == sizes["attention"]["written"]
    assert "smaller in parameters" in sizes["attention"]["note"]
    assert ("save neither" in sizes["attention"]["note"]) == (mode == "dynamic")
    ours = expertsmith.load(tmp_path / "out")
    ids = torch.tensor([SEQUENCES[0]])
    kept = ours.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = ids
    with torch.no_grad():
        for _ in range(kept.shape[1] - ids.shape[1]):
            plain = torch.cat([plain, ours(plain, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        remote = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, attn_implementation="eager")
        assert (remote(ids).logits - ours(ids).logits).abs().max() < 1e-4
    assert torch.equal(kept, plain)
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again", trust_remote_code=True), logits(tmp_path / "out", trust_remote_code=True))


def test_experts_of_a_model_with_pruned_attention_can_be_pruned(dense, texts, tmp_path):
    """The result loads with the code that `apply` writes anew; lint says which engines do not take it."""
    options = {"steps": 30, "lr": 3e-2, "attention": "static", "active": 0.6, "active_of": "block"}
    result = api.convert(dense("llama"), "tomoe", tmp_path / "out", data=texts, experts=4, **options, **TRAIN)
    assert result["sizes"]["block_ratio_useful"] == pytest.approx(0.6, abs=0.05)
    done = api.compress(tmp_path / "out", "reap", 2, out=tmp_path / "half", data=texts, seq_len=20, measure=False)
    assert done["verify"].passed
    assert logits(tmp_path / "half", trust_remote_code=True).isfinite().all()
    findings = {f.rule.id: f.level for f in api.lint(tmp_path / "half")}
    assert findings["vllm-attention"] == "error"
    assert findings["transformers-attention"] == "warning"


def test_command_line_trains_and_goes_on(dense, texts, tmp_path, capsys):
    data = [part for text in texts for part in ("-d", text)]
    arguments = [
        "convert",
        dense("llama"),
        "-m",
        "tomoe",
        "--experts",
        2,
        "--steps",
        2,
        "--seq-len",
        20,
        *data,
        "-o",
        tmp_path / "out",
    ]
    code, out, err = run_cli(capsys, *arguments)
    assert code == 0
    assert "as written" in err
    assert "core" in err  # both sizes, before anything is written
    assert "overlap" in out
    code, _, err = run_cli(capsys, *arguments, "--overwrite")
    assert code == 0
    assert "resuming at step 2 of 2" in err
    code, _, err = run_cli(capsys, *arguments, "--overwrite", "--lr", "0.01")
    assert code == 2
    assert "other settings (lr)" in err


# ---- several processes

RANKS = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]  # this file, and the helpers beside its folder
import test_tomoe as here
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine.loading import load_model

loaded, folder = load_model(open_checkpoint(sys.argv[2]), None, dtype="float32"), Path(sys.argv[3])
accelerator = Accelerator(cpu=True)
net = here.run_training(loaded, folder, here.SHARED, accelerator=accelerator)
if accelerator.is_main_process:
    torch.save(net.state_dict(), folder / "net.pt")
dist.barrier()
dist.destroy_process_group()
"""
# no noise, which every rank draws for itself, and no balance, which is of a rank's own tokens: then two ranks do what one process does
SHARED = Recipe(ratio=0.5, steps=4, experts=3, batch=2, lr=1e-2, warmup=1, noise=0.0, losses=tomoe.Losses(balance=0.0))


def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, "--standalone", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=240, check=False)


@pytest.mark.slow
def test_two_ranks_train_what_one_process_trains(loaded, dense, tmp_path):
    one = run_training(loaded, tmp_path / "one", SHARED).state_dict()
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = torchrun(2, script, Path(__file__).parent, dense("llama"), tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "two/net.pt")
    start = small_net(experts=3).state_dict()
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one)  # it learned something
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-5, name


@pytest.mark.slow
def test_conversion_on_two_ranks(dense, texts, tmp_path):
    """The command as the help says it; one rank writes."""
    line: list[object] = [
        "-m",
        "expertsmith",
        "convert",
        dense("llama"),
        "-m",
        "tomoe",
        "--experts",
        2,
        "--steps",
        2,
        "--seq-len",
        20,
    ]
    line += ["-d", texts[0], "--max-growth", 9, "--no-measure", "--device", "cpu", "-q"]
    done = torchrun(2, *line, "--batch", 2, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out/expertsmith/conversion.json").read_text())["method"]["recipe"]["batch"] == 2
    assert logits(tmp_path / "out").isfinite().all()


def test_a_batch_smaller_than_the_processes_is_refused(loaded, tmp_path):
    accelerator = _Accelerator()
    accelerator.num_processes = 2
    with pytest.raises(UserError, match="--batch is 1, but there are 2 processes; give --batch 2 or more"):
        run_training(loaded, tmp_path, Recipe(ratio=0.5, steps=2, experts=3), accelerator=accelerator)
