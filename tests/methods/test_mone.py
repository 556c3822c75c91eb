"""MoNE: the score and the constants by hand and by brute force, the plan, the written checkpoint against the original with constants in place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from conftest import CALIBRATION, SUPPORTED, run_cli
from expertsmith import api
from expertsmith.arch import families
from expertsmith.calibration.stats import LayerStatistics, load_statistics
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import load_model
from expertsmith.engine.layout import experts_of, routing_of
from expertsmith.engine.uneven import SHIM
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.experts.rules import Rules
from expertsmith.methods import find
from expertsmith.methods.base import Facts
from expertsmith.planning.given import statistics_for
from expertsmith.planning.interchange import export
from expertsmith.planning.plan import constants_file, load_plan, parse_plan
from expertsmith.surgery.novices import check_novices, replaced
from mtp import save_with_mtp

IDS = torch.randint(3, 120, (2, 17), generator=torch.Generator().manual_seed(0))
NOT_SO = {  # family → part of the reason
    "gemma4_text": "position embeddings",
    "inkling_text": "classes that are not experts",
    "llama4_text": "scales the experts' inputs",
    "longcat_flash": "classes that are not experts",
    "zaya": "classes that are not experts",
}
POSSIBLE = [
    name
    for name in SUPPORTED
    if families()[name].uneven is None
    and families()[name].call != "dense_inputs"
    and not families()[name].unrouted_zero
    and not any(entry.extra for entry in families()[name].stacked)
]
ALONE = ("mixtral", "qwen3_moe", "gpt_oss", "dbrx", "deepseek_v3")


def by_hand() -> LayerStatistics:
    """Three experts with outputs in R²: expert 0 of two tokens, f = (1, 0) and (3, 4), g = 0.5 and 1; expert 1 of one; expert 2 of none. Four
    tokens in all."""
    sums = {
        "tokens": np.array(4),
        "selections": np.array([2, 1, 0]),
        "weight_sum": np.array([1.5, 0.25, 0.0]),
        "weight_sq_sum": np.array([1.25, 0.0625, 0.0]),
        "output_sum": np.array([[4.0, 4.0], [5.0, 6.0], [0.0, 0.0]]),
        "output_sq_sum": np.array([[10.0, 16.0], [25.0, 36.0], [0.0, 0.0]]),
        "weighted_sq_output_sum": np.array([[3.25, 4.0], [0.3125, 0.375], [0.0, 0.0]]),
    }
    return LayerStatistics(0, {"a": sums})


def test_score_by_hand():
    """Variances (1, 4), so ||std|| = sqrt(5); mean routing weight 0.75 over routed tokens, 0.375 over all."""
    method, facts = find("mone"), Facts(0, 3)
    assert method(by_hand(), facts, gate="routed") == pytest.approx([5**0.5 * 0.75, 0, 0])
    assert method(by_hand(), facts) == pytest.approx([5**0.5 * 0.375, 0, 0])


def test_constants_by_hand():
    """Mean (2, 2); weighted by g² = 0.25 and 1: (0.25 + 3, 4) / 1.25. An expert without tokens is zero."""
    constants = find("mone").constants
    assert constants(by_hand(), constant="mean").tolist() == [[2, 2], [5, 6], [0, 0]]
    assert constants(by_hand()) == pytest.approx(np.array([[2.6, 3.2], [5, 6], [0, 0]]))


def test_the_gated_constant_has_the_least_gated_error():
    f, g = np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([0.5, 1.0])
    best = find("mone").constants(by_hand())[0]

    def error(c):
        return float((g[:, None] ** 2 * (f - c) ** 2).sum())

    steps = [best + step for step in np.array([[0.01, 0], [-0.01, 0], [0, 0.01], [0, -0.01], [-0.6, -1.2]])]
    assert all(error(best) < error(other) for other in steps)


@pytest.fixture(scope="module")
def statistics(checkpoints, texts, tmp_path_factory):
    root = tmp_path_factory.mktemp("moments")

    @cache
    def get(model_type: str):
        api.calibrate(checkpoints(model_type), texts, root / model_type, output_moments=True, **SHAPE)
        return root / model_type

    return get


SHAPE = {**CALIBRATION, "overlong": "truncate"}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_statistics_against_brute_force(model_type, checkpoints, statistics, texts):
    """Every routed slot by itself: the experts' own forward with one token, one expert and weight 1, summed in float64."""
    inventory = take_inventory(open_checkpoint(checkpoints(model_type)))
    model = load_model(inventory.checkpoint, inventory.architecture)
    found = load_statistics(statistics(model_type))
    layer = inventory.layers[0]
    experts = experts_of(model.layers[layer], inventory.architecture)
    seen = []

    def forward(x, *args, **kwargs):
        seen.append((x.reshape(-1, x.shape[-1]), *(part.reshape(-1, part.shape[-1]) for part in routing_of(args, kwargs))))
        return type(experts).forward(experts, x, *args, **kwargs)

    experts.forward = forward
    with torch.no_grad():
        for text in texts:
            for line in Path(text.partition("=")[2]).read_text().splitlines():
                model.module(torch.tensor([json.loads(line)["input_ids"][: SHAPE["seq_len"]]]), use_cache=False)
        count, width = inventory.experts_in(layer), seen[0][0].shape[-1]
        wanted = {name: np.zeros((count, width)) for name in ("output_sum", "output_sq_sum", "weighted_sq_output_sum")}
        for x, selected, weights in seen:
            for t, row in enumerate(selected):
                for expert, g in zip(row.tolist(), weights[t].double().tolist(), strict=True):
                    one = torch.tensor([[expert]])
                    f = type(experts).forward(experts, x[t : t + 1], one, torch.ones(1, 1))[0].double().numpy()
                    wanted["output_sum"][expert] += f
                    wanted["output_sq_sum"][expert] += f**2
                    wanted["weighted_sq_output_sum"][expert] += g**2 * f
    for name, values in wanted.items():
        assert np.abs(found.layers[layer].total(name) - values).max() < 1e-5 * np.abs(values).max(), name


def test_resident_and_streamed_statistics_are_the_same(checkpoints, statistics, texts, tmp_path):
    streamed = api.calibrate(
        checkpoints("qwen3_moe"), texts, tmp_path / "s", output_moments=True, **{**SHAPE, "memory": "stream"}
    )
    resident = load_statistics(statistics("qwen3_moe"))
    for layer, entry in resident.layers.items():
        for domain, sums in entry.domains.items():
            for name in ("output_sum", "output_sq_sum", "weighted_sq_output_sum"):
                assert np.array_equal(sums[name], streamed.layers[layer].domains[domain][name])


@pytest.fixture(scope="module")
def written(checkpoints, statistics, tmp_path_factory):
    """model_type → (source, plan file, written checkpoint); plan and checkpoint through files."""
    root = tmp_path_factory.mktemp("novices")

    @cache
    def get(model_type: str):
        source, plan, out = checkpoints(model_type), root / f"{model_type}.json", root / model_type
        inventory = take_inventory(open_checkpoint(source))
        keep = max(inventory.rules.least, inventory.num_experts // 2)
        keep = min(keep, inventory.num_experts - 1)
        api.plan(source, "mone", keep, stats=statistics(model_type), out=plan)
        api.apply(source, plan, out)
        return source, plan, out

    return get


@torch.no_grad()
def logits(module):
    return module.eval()(IDS, use_cache=False).logits.float()


def difference(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def with_constants(source, plan_file):
    """Logits of the original with every dropped expert's output replaced, slot by slot, by its constant."""
    plan, inventory = load_plan(plan_file), take_inventory(open_checkpoint(source))
    model = load_model(inventory.checkpoint, inventory.architecture)
    with replaced(model, plan):
        inside = logits(model.module)
    assert difference(logits(model.module), inside) > 1e-4  # the constants matter, and the model is as before afterwards
    return inside


@pytest.mark.parametrize("model_type", POSSIBLE)
def test_every_family(model_type, written):
    """verify (bytes, layers, logits; streamed in test_families), the loader, sizes, and that only the kept experts are stored."""
    source, plan_file, out = written(model_type)
    wanted = with_constants(source, plan_file)
    assert difference(logits(api.load(out)), wanted) < 2e-5
    verdict = api.verify(source, out, tokens=128, device="cpu", memory="resident")
    assert verdict.passed, verdict
    assert verdict.largest < 2e-5
    plan = load_plan(plan_file)
    before = take_inventory(open_checkpoint(source))
    after = take_inventory(open_checkpoint(out), novices=True)
    assert after.counts == {layer: len(plan.kept[layer]) for layer in before.layers}
    assert plan.summary.parameters == (before.size()[0], after.size()[0])
    assert plan.summary.bytes == (before.size()[1], after.size()[1])
    assert after.size()[0] < before.size()[0]


@pytest.mark.parametrize("model_type", ALONE)
def test_plain_transformers_loads_it_with_remote_code(model_type, written, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    _, _, out = written(model_type)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    first = logits(model)
    assert torch.equal(first, logits(api.load(out)))
    assert model.generate(IDS[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 20)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / SHIM).read_bytes() == (out / SHIM).read_bytes()
    assert torch.equal(logits(api.load(tmp_path / "saved")), first)


def test_a_forward_by_hand(written):
    """One layer, slot by slot in float64: a kept expert's output or a constant, times the routing weight."""
    source, plan_file, out = written("mixtral")
    plan, model, original = load_plan(plan_file), api.load(out), api.load(source)
    layer = min(plan.novices)
    x = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    selected, weights = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [3, 0]]), torch.tensor([[0.75, 0.25]] * 5)
    theirs = original.model.layers[layer].mlp.experts
    wanted = torch.zeros(5, x.shape[1], dtype=torch.float64)
    gone = plan.novices[layer].experts
    with torch.no_grad():
        for t in range(5):
            for expert, g in zip(selected[t].tolist(), weights[t].tolist(), strict=True):
                one = theirs(x[t : t + 1], torch.tensor([[expert]]), torch.ones(1, 1))[0]
                f = torch.tensor(plan.constants(layer)[gone.index(expert)]) if expert in gone else one
                wanted[t] += g * f.double()
        found = model.model.layers[layer].mlp.experts(x, selected, weights)
    assert difference(found.double(), wanted) < 1e-6


def test_the_constants_are_proven(written, tmp_path):
    """A changed constant fails, although the constants are read from the output itself."""
    source, _, out = written("qwen3_moe")
    shutil.copytree(out, tmp_path / "changed")
    file = next((tmp_path / "changed").glob("*.safetensors"))
    held = load_file(file)
    name = next(name for name in held if name.endswith(".novices"))
    held[name][0, 0] += 1e-3
    save_file(held, file, metadata={"format": "pt"})
    verdict = api.verify(source, tmp_path / "changed", tokens=64, device="cpu")
    assert not verdict.passed
    assert verdict.wrong_tensors == [name]


def test_plan_file(written, tmp_path):
    """The plan is read back with its constants; without them apply says what is missing, and other values are refused."""
    source, file, _ = written("mixtral")
    plan = load_plan(file)
    assert plan == load_plan(file)
    assert plan.novices
    shutil.copy(file, tmp_path / "alone.json")
    with pytest.raises(UserError, match="their values are missing"):
        api.apply(source, tmp_path / "alone.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    held = load_file(constants_file(file))
    held["0"] = held["0"] + 1
    save_file(held, constants_file(tmp_path / "alone.json"))
    with pytest.raises(UserError, match="not those of the plan"):
        load_plan(tmp_path / "alone.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda layer, plan: layer["novices"].update(experts=[]), "the experts that are not kept"),
        (lambda layer, plan: layer["novices"].update(experts=layer["keep"]), "the experts that are not kept"),
        (lambda layer, plan: layer.pop("novices"), "removes experts, but other layers have novices"),
        (lambda layer, plan: plan.update(router_groups="flatten"), "the router stays unchanged"),
    ],
)
def test_bad_plans(change, said, written):
    raw = json.loads(written("mixtral")[1].read_text())
    change(raw["layers"][0], raw)
    with pytest.raises(UserError, match=said):
        parse_plan(raw, "plan.json")


@pytest.mark.parametrize("model_type", sorted(set(NOT_SO) & set(SUPPORTED)))
def test_refused_families(model_type, checkpoints):
    with pytest.raises(UserError, match=NOT_SO[model_type]):
        check_novices(take_inventory(open_checkpoint(checkpoints(model_type))))


def test_every_family_is_supported_or_refused_with_its_reason():
    assert {name for name in SUPPORTED if name not in POSSIBLE} == set(NOT_SO) & set(SUPPORTED)


@pytest.mark.parametrize(
    "model_type", ["mixtral", "gpt_oss"]
)  # also where a bias could hold the constant: there is no stock form
def test_lint_says_which_engines_cannot_load_it(model_type, written, capsys):
    _, _, out = written(model_type)
    found = {finding.rule.id: finding.level for finding in api.lint(out)}
    assert {f"{engine}-constants" for engine in ("vllm", "sglang", "llama.cpp")} <= {
        name for name, level in found.items() if level == "error"
    }
    assert found["transformers-constants"] == "warning"
    assert not {name for name in found if "uneven" in name or "count" in name}
    code, told, _ = run_cli(capsys, "lint", out, "--engine", "vllm")
    assert code == 1
    assert "experts are constants" in " ".join(told.split())


def test_what_reads_such_a_checkpoint_refuses_it(written, texts, tmp_path):
    source, plan, out = written("mixtral")
    for call in (
        lambda: api.calibrate(out, texts, tmp_path / "s", **SHAPE),
        lambda: api.plan(out, "aimer", 0.5),
    ):
        with pytest.raises(UserError, match="are constants"):
            call()
    assert "constants" in api.inspect(out)["notes"]
    with pytest.raises(UserError, match="makes experts constants"):
        export(load_plan(plan), "mask")
    with pytest.raises(UserError, match="cannot have skip thresholds"):
        api.skip(source, texts, tmp_path / "k", plan=plan)


def test_bad_requests(checkpoints, statistics, texts, tmp_path):
    source = checkpoints("mixtral")
    api.calibrate(source, texts, tmp_path / "plain", **SHAPE)
    with pytest.raises(UserError, match="needs the variance") as caught:
        api.plan(source, "mone", 0.5, stats=tmp_path / "plain")
    assert "--output-moments" in str(caught.value.remedy)
    with pytest.raises(UserError, match="unchanged"):
        api.plan(source, "mone", 0.5, stats=statistics("mixtral"), router_groups="flatten")
    with pytest.raises(UserError, match="constants it does not count"):
        api.plan(source, "mone", None, fit="340kB", stats=statistics("mixtral"))
    with pytest.raises(UserError, match="option constant"):
        api.plan(source, "mone", 0.5, stats=statistics("mixtral"), options={"constant": "median"})
    assert statistics_for(take_inventory(open_checkpoint(source)), find("mone"), statistics("mixtral"), ())


def test_groups_do_not_bind(written):
    """The router is unchanged, so the kept experts may lie anywhere in the expert_groups."""
    source, file, _ = written("deepseek_v3")
    assert take_inventory(open_checkpoint(source)).rules.groups > 1
    assert load_plan(file).router_groups == "keep"
    assert Rules(8, 2).groups == 1


def test_evaluate_and_keep_everything(written, texts, checkpoints, statistics, tmp_path):
    source, _, out = written("mixtral")
    found = api.evaluate(out, texts, reference=source, device="cpu", seq_len=24)
    assert found.domains["a"].rise != 0
    made = api.plan(source, "mone", 8, stats=statistics("mixtral"))
    assert not made.novices
    api.apply(source, made, tmp_path / "all")
    assert torch.equal(logits(api.load(tmp_path / "all")), logits(api.load(source)))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next"])
def test_multi_token_prediction_keeps_its_experts(model_type, texts, tmp_path):
    """The router of the layer stays as it is and so do its experts, which are compared by bytes; verify says so."""
    source, out = tmp_path / "m", tmp_path / "out"
    save_with_mtp(model_type, source)
    found = api.calibrate(source, texts, tmp_path / "s", output_moments=True, **SHAPE)
    plan = api.plan(source, "mone", 0.5, stats=found)
    ahead = plan.layers[-1]
    assert ahead.mtp
    assert ahead.layer in found.layers
    assert ahead.keep == list(range(ahead.num_experts))
    assert ahead.novices is None
    assert set(plan.novices) == set(take_inventory(open_checkpoint(source)).layers)
    api.apply(source, plan, out)
    verdict = api.verify(source, out, tokens=128, device="cpu")
    assert verdict.passed
    assert "constants" in verdict.mtp_not_compared
    before, after = (open_checkpoint(path) for path in (source, out))
    of_layer = [claim.info.name for claim in take_inventory(before).claims if claim.mtp]
    assert len(of_layer) > ahead.num_experts
    assert all(torch.equal(before.read(name), after.read(name)) for name in of_layer)
    api.apply(source, api.plan(source, "mone", 0.5, stats=found, mtp="drop"), tmp_path / "dropped")
    assert not set(of_layer) & set(open_checkpoint(tmp_path / "dropped").tensors)
    assert torch.equal(logits(api.load(tmp_path / "dropped")), logits(api.load(out)))


@pytest.mark.slow
def test_two_ranks_sum_the_same_moments(checkpoints, texts, statistics, tmp_path):
    """And make the same plan, with the same constants."""
    source = checkpoints("qwen3_moe")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(29500 + os.getpid() % 2000), "-m", "expertsmith", "calibrate", str(source), "-q"]
    command += ["-o", str(tmp_path / "s"), "--output-moments", "--seq-len", "24", "--no-pack", "--overlong", "truncate"]
    command += ["--batch-tokens", "72", "--device", "cpu", *(part for text in texts for part in ("-d", text))]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = load_statistics(statistics("qwen3_moe")), load_statistics(tmp_path / "s")
    assert two.header == one.header
    for layer, entry in one.layers.items():
        for domain, sums in entry.domains.items():
            for name in ("output_sum", "output_sq_sum", "weighted_sq_output_sum"):
                assert two.layers[layer].domains[domain][name] == pytest.approx(sums[name], rel=1e-6, abs=1e-9), name
    alone, both = (api.plan(source, "mone", 0.5, stats=held) for held in (one, two))
    assert alone.kept == both.kept
    for layer in alone.novices:
        assert both.constants(layer) == pytest.approx(alone.constants(layer), rel=1e-6, abs=1e-9)
