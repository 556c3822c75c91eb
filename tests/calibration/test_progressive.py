"""Progressive statistics: those of a layer are taken on a model whose earlier layers are compressed as the method chose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_observers import brute_force
from test_resume import same

from conftest import CALIBRATION, DEVICE, RUN, kinds_first, random_model, run_cli
from expertsmith import api
from expertsmith.arch import families
from expertsmith.calibration import spill, stats
from expertsmith.calibration.observers import Extras
from expertsmith.calibration.opening import token_data
from expertsmith.calibration.runner import _arrays, _Run
from expertsmith.calibration.spill import Spill
from expertsmith.calibration.stats import Statistics, load_statistics
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import LoadedModel, load_model
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.methods import find
from expertsmith.surgery.apply import written
from expertsmith.surgery.enforced import enforced
from expertsmith.views.progress import Silent
from mtp import save_with_mtp
from quantise import quantise_checkpoint

MERGING = ["hc_smoe", "m_smoe", "ream", "merge_moe"]


def half(source) -> int:
    """As few experts as the router allows, at least half."""
    rules = take_inventory(open_checkpoint(source)).rules
    return max(rules.least, rules.num_experts // 2)


def followed(source, data, out, method="reap", keep=None, **more) -> Statistics:
    options = {**CALIBRATION, **more}
    return api.calibrate(source, data, out, progressive=True, method=method, keep=keep or half(source), **options)


def equal(mine: Statistics, theirs: Statistics, layer: int) -> bool:
    """Whether two statistics of a layer have the same bits; a number may be an array of one number."""
    pairs = [(mine.layers[layer].domains[name], held) for name, held in theirs.layers[layer].domains.items()]
    return all(a.keys() == b.keys() and all(np.array_equal(a[name].ravel(), b[name].ravel()) for name in a) for a, b in pairs)


def compressed_by_hand(model, record, entry) -> None:
    """Average and slice the experts of a layer, and slice its router."""
    block = model.get_submodule(record.layers)[entry.layer].get_submodule(record.block)
    experts, router = getattr(block, record.experts), getattr(block, record.router)
    for parameter in experts.parameters():
        held = parameter.data.clone()
        for merge in entry.merge:
            held[merge.into] = sum(w * parameter.data[e] for w, e in zip(merge.weights, merge.sources, strict=True))
        parameter.data = held[entry.keep]
    router.weight.data = router.weight.data[entry.keep]
    for module in (experts, router, block):
        for name in ("num_experts", "n_routed_experts"):
            if hasattr(module, name):
                setattr(module, name, len(entry.keep))


@pytest.mark.parametrize("method", ["reap", "hc_smoe"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "olmoe"])
def test_brute_force_in_float64(model_type, method, checkpoints, token_file, tmp_path):
    """Earlier layers are sliced (and merged) by hand, and the statistics of the next one summed token by token."""
    source, record = checkpoints(model_type), families()[model_type]
    text = token_file / "a.jsonl"
    rows = [json.loads(line)["input_ids"] for line in text.read_text().splitlines()]
    found = followed(source, [f"a={text}"], tmp_path / "s", method)
    plan = api.plan(source, method, half(source), stats=found)
    before = brute_force(model_type, source, rows)
    for place in range(1, len(plan.layers)):

        def change(model, entries=plan.layers[:place]):
            model.double()
            for entry in entries:
                compressed_by_hand(model, record, entry)

        layer = plan.layers[place].layer
        expected = brute_force(model_type, source, rows, change)[layer]
        for name, values in expected.items():
            held = found.layers[layer].total(name).reshape(values.shape)
            if name == "ratio_histogram":  # a ratio at a bin's edge may fall on either side
                assert abs(held - values).sum() <= 2
            else:
                assert held == pytest.approx(values, rel=5e-5, abs=1e-7), name
        assert not np.allclose(expected["norm_sum"], before[layer]["norm_sum"], rtol=1e-3)  # of the whole model: other numbers


def beside(source, data, plan, layer, extras=None) -> Statistics:
    """One-shot statistics of one layer of a model on which a plan of earlier layers is in force."""
    inventory = take_inventory(open_checkpoint(source))
    model = load_model(inventory.checkpoint, inventory.architecture, mtp=True)
    tokens = token_data(source, inventory.config, data, Silent(), seq_len=24, pack=False)
    found = {}

    def take(number, sums):
        found[number] = stats.LayerStatistics(number, _arrays(sums))

    batches = tokens.batches(CALIBRATION["batch_tokens"])
    nothing = Spill(source, enabled=False)
    with enforced(model, plan, written(plan, inventory, requantise=False)):
        _Run(model, tokens, batches, [], {layer}, extras or Extras(), nothing, 0, lambda _: None, take, None).observe()
    return Statistics({}, found)


def first_layers(plan, count):
    return plan.model_copy(update={"layers": plan.layers[:count]})


@pytest.mark.parametrize("model_type", kinds_first(RUN))
def test_every_family(model_type, checkpoints, data, tmp_path):
    """The same bits as from a model with the plan of the earlier layers in force; streamed too."""
    source = checkpoints(model_type)
    found = followed(source, data, tmp_path / "s")
    plan = api.plan(source, "reap", half(source), stats=tmp_path / "s")
    numbers = [entry.layer for entry in plan.layers]
    for place, layer in enumerate(numbers[1:], 1):
        assert equal(found, beside(source, data, first_layers(plan, place), layer), layer), layer
    streamed = followed(source, data, tmp_path / "t", memory="stream")
    assert all(equal(found, streamed, layer) for layer in numbers)
    whole = api.calibrate(source, data, tmp_path / "w", **CALIBRATION)
    assert equal(found, whole, numbers[0])
    assert len(numbers) == 1 or not equal(found, whole, numbers[1])


@pytest.mark.parametrize("method", [*MERGING, "mone", "easy_ep"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_merged_experts_and_constants(model_type, method, checkpoints, data, tmp_path):
    source, chosen = checkpoints(model_type), find(method)
    extras = Extras(all_outputs=chosen.all_outputs, output_moments=chosen.output_moments)
    found = followed(source, data, tmp_path / "s", method)
    plan = api.plan(source, method, half(source), stats=tmp_path / "s")
    assert bool(plan.merges) == (method in MERGING)
    assert bool(plan.novices) == (method == "mone")
    for place, entry in enumerate(plan.layers[1:], 1):
        assert equal(found, beside(source, data, first_layers(plan, place), entry.layer, extras), entry.layer)
    followed(source, data, tmp_path / "t", method, memory="stream")
    assert same(tmp_path / "s", tmp_path / "t")


def test_a_streamed_layer_is_read_once(checkpoints, data, tmp_path, monkeypatch):
    read, load = [], LoadedModel._load
    monkeypatch.setattr(LoadedModel, "_load", lambda self, group: (read.append(group), load(self, group))[1])
    followed(checkpoints("mixtral"), data, tmp_path / "s", "ream", memory="stream")
    assert read == [None, 0, 1, 2]


def test_keeping_everything_is_one_shot(checkpoints, data, tmp_path):
    source = checkpoints("mixtral")
    found = followed(source, data, tmp_path / "s", keep=8)
    whole = api.calibrate(source, data, tmp_path / "w", **CALIBRATION)
    assert all(equal(found, whole, layer) for layer in whole.layers)
    assert found.header.pop("progressive") == {"method": "reap", "options": {}, "keep": 8}
    assert found.header == whole.header


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next"])
def test_multi_token_prediction(model_type, data, tmp_path):
    """Its layer is the last: it sees the compressed trunk, and the plan chooses in it."""
    source = tmp_path / "m"
    save_with_mtp(model_type, source)
    found = followed(source, data, tmp_path / "s")
    plan = api.plan(source, "reap", half(source), stats=tmp_path / "s")
    ahead = plan.layers[-1]
    assert ahead.mtp
    assert ahead.layer in found.layers
    assert equal(found, beside(source, data, plan.of_decoder_layers(), ahead.layer), ahead.layer)
    followed(source, data, tmp_path / "t", memory="stream")
    assert same(tmp_path / "s", tmp_path / "t")


@pytest.mark.parametrize("spilled", [True, False])
@pytest.mark.parametrize(
    ("method", "memory"), [("reap", "resident"), ("hc_smoe", "resident"), ("hc_smoe", "stream"), ("mone", "stream")]
)
def test_resumed_statistics_have_the_same_bytes(method, memory, spilled, checkpoints, data, tmp_path, monkeypatch):
    source, saved = checkpoints("mixtral"), stats.save_layer
    followed(source, data, tmp_path / "whole", method, memory=memory)
    if spilled:
        monkeypatch.setattr(spill, "EVERY_SECONDS", 0.0)
    for last in (0, 1):

        def killed(folder, layer, domains, last=last):
            saved(folder, layer, domains)
            if layer == last:
                raise KeyboardInterrupt

        monkeypatch.setattr(stats, "save_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            followed(source, data, tmp_path / "parts", method, memory=memory)
        assert spill.newest(tmp_path / "parts") == (0 if spilled and last else None)
    monkeypatch.setattr(stats, "save_layer", saved)
    followed(source, data, tmp_path / "parts", method, memory=memory)
    assert same(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(UserError, match="progressive differs"):
        followed(source, data, tmp_path / "parts", method, keep=6, memory=memory)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_follow_the_same_choice(ranks, checkpoints, data, tmp_path):
    """With more ranks than batches of a domain, and resumed: the plan of one process."""
    source = checkpoints("qwen2_moe")
    one = followed(source, data, tmp_path / "one", "ream", batch_tokens=10**6)  # two batches
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", str(29500 + os.getpid() % 2000 + ranks), "-m", "expertsmith", "calibrate", str(source)]
    command += ["--progressive", "-m", "ream", "-k", str(half(source)), "-o", str(tmp_path / "many"), "--seq-len", "24"]
    command += [
        "--no-pack",
        "--batch-tokens",
        "1000000",
        "--device",
        DEVICE,
        "-q",
        *(part for spec in data for part in ("-d", spec)),
    ]
    for first in (True, False):
        if not first:  # resume
            stats.layer_path(tmp_path / "many", max(one.layers)).unlink()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert run.returncode == 0, run.stderr[-3000:]
        many = load_statistics(tmp_path / "many")
        assert many.header == one.header
        for layer, entry in one.layers.items():
            for domain in "ab":
                for name, value in entry.domains[domain].items():
                    held = many.layers[layer].domains[domain][name]
                    assert held == pytest.approx(value, rel=1e-6, abs=1e-9), name
        plans = [api.plan(source, "ream", half(source), stats=held) for held in (one, many)]
        assert plans[0].kept == plans[1].kept


@pytest.fixture(scope="module")
def progressive(checkpoints, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("progressive") / "stats"
    followed(checkpoints("mixtral"), data, folder, "ean", 0.5, options={"weighted": "true"})
    return folder


@pytest.mark.parametrize(
    ("method", "keep", "more", "said"),
    [
        ("reap", 0.5, {}, "method reap is asked for"),
        ("ean", 0.5, {}, "options {'weighted': False} is asked for"),
        ("ean", 6, {"options": {"weighted": True}}, "keep 6 is asked for"),
        ("ean", 0.5, {"options": {"weighted": True}, "budget": "global"}, "budget global is asked for"),
        ("ean", 0.5, {"options": {"weighted": True}, "domains": ["a"]}, "no part by domain"),
        ("ean", None, {"options": {"weighted": True}, "fit": "300kB", "context": 0}, "keep"),
    ],
)
def test_another_choice_is_refused(method, keep, more, said, checkpoints, progressive):
    with pytest.raises(UserError, match="the statistics are progressive") as caught:
        api.plan(checkpoints("mixtral"), method, keep, stats=progressive, **more)
    assert said in caught.value.message
    assert "calibrate" in str(caught.value.remedy)


def test_the_same_choice_in_other_words(checkpoints, progressive, data, tmp_path):
    """A count for a ratio; and the plan that calibrates for itself."""
    source, options = checkpoints("mixtral"), {"weighted": True}
    made = [api.plan(source, "ean", keep, stats=progressive, options=options, mtp="drop") for keep in (0.5, "50%", 4)]
    made.append(
        api.plan(source, "ean", 0.5, progressive=True, data=data, options=options, out=tmp_path / "p.json", **CALIBRATION)
    )
    assert all(plan.kept == made[0].kept for plan in made)
    one_shot = api.plan(source, "ean", 0.5, data=data, options=options, out=tmp_path / "q.json", **CALIBRATION)
    assert one_shot.kept != made[0].kept


def test_flattened_groups_are_refused(checkpoints, data, tmp_path):
    source = checkpoints("deepseek_v3")
    followed(source, data, tmp_path / "s", keep=4)
    with pytest.raises(UserError, match="router groups flatten"):
        api.plan(source, "reap", 4, stats=tmp_path / "s", router_groups="flatten")
    with pytest.raises(UserError, match="expert_groups"):
        api.plan(source, "reap", 4, progressive=True, data=data, router_groups="flatten")


def test_what_wants_the_whole_model_refuses_them(checkpoints, progressive, data, tmp_path):
    with pytest.raises(UserError, match="not those of the whole model"):
        api.analyze(checkpoints("mixtral"), out=tmp_path / "a", stats=progressive)
    held = load_statistics(progressive)
    for add in (lambda: held + held, lambda: held + replace(held, header={**held.header})):
        with pytest.raises(UserError, match="cannot be added"):
            add()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--progressive", "-m", "random", "-k", "0.5"], "does not depend on text"),
        (["--progressive", "-m", "moeits", "-k", "0.5"], "does not depend on text"),
        (["--progressive", "-m", "aimer", "-k", "0.5"], "does not depend on text"),
        (["--progressive", "-m", "expert_sparsity", "-k", "0.5"], "-O progressive=true"),
        (["--progressive", "-m", "reap"], "--keep"),
        (["--progressive", "-k", "0.5"], "--progressive needs a method"),
        (["--progressive", "-m", "rep", "-k", "0.5"], "reap"),
        (["--progressive", "-m", "reap", "-k", "1"], "top_k"),
        (["--progressive", "-m", "ean", "-k", "0.5", "-O", "weight=true"], "weighted"),
        (["-m", "reap"], "--method has no effect without --progressive"),
        (["-k", "0.5"], "--keep has no effect without --progressive"),
        (["-O", "weighted=true"], "--option has no effect without --progressive"),
    ],
)
def test_refused_by_calibrate(arguments, said, checkpoints, data, tmp_path, capsys):
    code, _, told = run_cli(capsys, "calibrate", checkpoints("mixtral"), "-d", data[0], "-o", tmp_path / "s", *arguments)
    assert code == 2
    assert said in " ".join(told.split())
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("plan", ["-m", "reap", "-k", "0.5", "--budget", "global"], "budget global needs all layers"),
        ("plan", ["-m", "reap", "-k", "0.5", "--budget", "esap"], "budget esap needs all layers"),
        ("plan", ["-m", "moeits"], "does not depend on text"),
        ("compress", ["-m", "reap", "-k", "0.5", "--budget", "sensitivity"], "budget sensitivity needs all layers"),
        ("compress", ["-m", "expert_sparsity", "-k", "0.5"], "-O progressive=true"),
    ],
)
def test_refused_by_plan_and_compress(verb, arguments, said, checkpoints, data, tmp_path, capsys):
    places = ["-d", data[0], "-o", tmp_path / "o.json"]
    code, _, told = run_cli(capsys, verb, checkpoints("mixtral"), *places, "--progressive", *arguments)
    assert code == 2
    assert said in " ".join(told.split())


def test_statistics_and_file_do_not_go_with_it(checkpoints, progressive, data, tmp_path, capsys):
    for arguments, said in (
        (["-m", "reap", "-k", "0.5", "-s", progressive], "no effect with --stats"),
        (["--from", tmp_path / "x.json"], "--from reads none"),
    ):
        code, _, told = run_cli(capsys, "plan", checkpoints("mixtral"), "-o", tmp_path / "p.json", "--progressive", *arguments)
        assert code == 2
        assert said in " ".join(told.replace("│", " ").split())


def test_a_damaged_record_is_named(progressive, tmp_path):
    shutil.copytree(progressive, tmp_path / "s")
    header = json.loads((progressive / "stats.json").read_text())
    for value in ("reap", {}, {"method": "reap", "options": {}, "keep": None}):
        (tmp_path / "s" / "stats.json").write_text(json.dumps({**header, "progressive": value}))
        with pytest.raises(UserError, match="progressive is not what it has to be"):
            load_statistics(tmp_path / "s")


def test_compress_and_compare(checkpoints, data, tmp_path):
    source = checkpoints("mixtral")
    shape = {key: value for key, value in CALIBRATION.items() if key != "pack"}
    made = api.compress(source, "ream", 0.5, out=tmp_path / "out", data=data, progressive=True, eval_data=data, **CALIBRATION)
    assert made["verify"].passed
    assert made["plan"].method.options["progressive"] is True
    followed(source, data, tmp_path / "s", "ream", 0.5)
    assert made["plan"].kept == api.plan(source, "ream", 0.5, stats=tmp_path / "s").kept
    found = api.compare(
        source, ["ean", "mone", "aimer"], [0.5], data, data, tmp_path / "c", progressive=True, **{**shape, "pack": False}
    )
    rows = {row["name"]: row for row in found["groups"][0]["rows"]}
    assert {"ean", "ean progressive", "mone", "mone progressive", "aimer"} < set(rows)
    assert "aimer progressive" not in rows
    row, other = rows["ean progressive"], rows["ean"]
    assert row["to_one_shot"][0] == pytest.approx(row["rise"]["mean"][0] - other["rise"]["mean"][0], abs=1e-9)
    assert "to_one_shot" not in other
    kept = [json.loads((tmp_path / "c" / held["plan"]).read_text())["layers"] for held in (row, other)]
    assert kept[0] != kept[1]
    assert "progressive" in (tmp_path / "c" / "comparison.md").read_text()
    with pytest.raises(UserError, match="needs a method that reads statistics"):
        api.compare(source, ["aimer"], [0.5], data, data, tmp_path / "d", progressive=True, **CALIBRATION)


def test_recipe(checkpoints, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {checkpoints('mixtral')}\ncalibrate: {{data: [{data[0]}], out: {tmp_path / 's'}, progressive: true, method: ream, keep: 0.5, seq_len: 24}}\n"
        f"plan: {{method: ream, keep: 0.5, out: {tmp_path / 'p.json'}}}\n"
    )
    api.run(recipe)
    assert load_statistics(tmp_path / "s").header["progressive"]["method"] == "ream"
    text = recipe.read_text()
    for old, new, said in (
        ("method: ream, keep: 0.5, out", "method: ream, keep: 6, out", "keep"),
        ("plan: {method: ream", "plan: {method: reap", "method"),
    ):
        recipe.write_text(text.replace(old, new))
        with pytest.raises(
            UserError, match=f"plan: the statistics of calibrate are progressive and follow its own {said} only"
        ):
            api.run(recipe)


def test_half_precision(tmp_path, data):
    random_model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    found = followed(tmp_path / "m", data, tmp_path / "s", "hc_smoe")
    plan = api.plan(tmp_path / "m", "hc_smoe", 4, stats=tmp_path / "s")
    assert equal(found, beside(tmp_path / "m", data, first_layers(plan, 1), 1, Extras(all_outputs=True)), 1)


def test_quantised_experts_are_merged_as_apply_writes_them(checkpoints, tmp_path, data):
    source = tmp_path / "fp8"
    quantise_checkpoint(checkpoints("mixtral"), source, "fp8_block")
    found = followed(source, data, tmp_path / "s", "hc_smoe")
    plan = api.plan(source, "hc_smoe", 4, stats=tmp_path / "s")
    assert equal(found, beside(source, data, first_layers(plan, 1), 1, Extras(all_outputs=True)), 1)
    followed(source, data, tmp_path / "t", "hc_smoe", memory="stream")
    assert same(tmp_path / "s", tmp_path / "t")
