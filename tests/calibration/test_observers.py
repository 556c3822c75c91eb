"""Statistics against brute force, and the golden checks of the EASY-EP and REAP cards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CALIBRATION, DEVICE, SUPPORTED, random_model, save_tiny
from expertsmith import api
from expertsmith.arch import families
from expertsmith.calibration.observers import RATIO_BINS, LayerSums, _Watch, choose_sample
from expertsmith.engine import Batch
from expertsmith.engine.experts import Slots, flattened_forward, grouped_forward
from waits import Waits


def brute_force(model_type: str, folder, rows: list[list[int]], change=lambda model: None) -> dict[int, dict[str, np.ndarray]]:
    """Every statistic of every MoE layer in float64, token by token and expert by expert, one sequence at a time, no batching."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    change(model)
    record = families()[model_type]
    found: dict[int, dict[str, np.ndarray]] = {}
    for index, layer in enumerate(model.get_submodule(record.layers)):
        block = layer.get_submodule(record.block)
        experts = getattr(block, record.experts, None)
        if experts is None:
            continue
        n = experts.num_experts
        keys = (
            "selections",
            "weight_sum",
            "weight_sq_sum",
            "norm_sum",
            "norm_sq_sum",
            "norm_max",
            "weighted_norm_sum",
            "weighted_norm_sq_sum",
            "easy_ep",
            "score_sum",
        )
        sums = found[index] = {key: np.zeros(n) for key in keys}
        sums |= {
            "coselections": np.zeros((n, n)),
            "turn_sum": np.zeros(()),
            "entropy_sum": np.zeros(()),
            "ratio_histogram": np.zeros(RATIO_BINS),
            "tokens": np.zeros(()),
        }

        def router_hook(module, args, output, sums=sums):
            scores = (output[0].sigmoid() if record.score == "sigmoid" else output[0].softmax(-1)).double()
            sums["score_sum"] += scores.sum(0).numpy()
            p = scores / scores.sum(-1, keepdim=True)
            sums["entropy_sum"] += float(-(p * p.log()).sum())

        def experts_hook(module, args, output, sums=sums, layer=layer):
            x, selected, weights = args
            for t in range(x.shape[0]):
                sums["tokens"] += 1
                raw = [module._alone(x[t : t + 1], int(e))[0].double() for e in selected[t]]
                routed = sum(w.double() * f for w, f in zip(weights[t], raw, strict=True))
                residual = layer._residual[t].double()
                turn = max(0.0, 1 - float(torch.nn.functional.cosine_similarity(residual, residual + routed, dim=0)))
                sums["turn_sum"] += turn
                ordered = sorted((float(w) for w in weights[t]), reverse=True)
                sums["ratio_histogram"][
                    min(RATIO_BINS - 1, int(np.float32(ordered[1]) / np.float32(ordered[0]) * RATIO_BINS))
                ] += 1
                for e, w, f in zip(selected[t].tolist(), weights[t].tolist(), raw, strict=True):
                    norm = float(f.norm())
                    sums["selections"][e] += 1
                    sums["weight_sum"][e] += w
                    sums["weight_sq_sum"][e] += w * w
                    sums["norm_sum"][e] += norm
                    sums["norm_sq_sum"][e] += norm * norm
                    sums["norm_max"][e] = max(sums["norm_max"][e], norm)
                    sums["weighted_norm_sum"][e] += w * norm
                    sums["weighted_norm_sq_sum"][e] += (w * norm) ** 2
                    sums["easy_ep"][e] += w * norm * turn
                    for other in selected[t].tolist():
                        sums["coselections"][e, other] += 1

        def alone(x, e, experts=experts):
            one = torch.full((1, 1), e)
            return type(experts).forward(experts, x, one, torch.ones(1, 1))

        experts._alone = alone
        norm = layer.get_submodule(record.norm)
        norm.register_forward_pre_hook(lambda m, a, layer=layer: setattr(layer, "_residual", a[0].reshape(-1, a[0].shape[-1])))
        getattr(block, record.router).register_forward_hook(router_hook)
        experts.register_forward_hook(experts_hook)
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    return found


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "dots1"])
def test_statistics_equal_a_brute_force_loop(model_type, checkpoints, token_file, tmp_path):
    """EASY-EP golden check 7, REAP golden check 7: batches with padding against one sequence at a time, routed experts only."""
    rows = [json.loads(line)["input_ids"] for line in (token_file / "a.jsonl").read_text().splitlines()]
    stats = api.calibrate(checkpoints(model_type), [f"a={token_file / 'a.jsonl'}"], tmp_path / "s", **CALIBRATION)
    reference = brute_force(model_type, checkpoints(model_type), rows)
    assert set(reference) == set(stats.layers)
    for layer, expected in reference.items():
        for name, values in expected.items():
            found = stats.layers[layer].total(name).reshape(values.shape)
            if name == "ratio_histogram":  # a ratio at a bin's edge may fall on either side
                assert abs(found - values).sum() <= 2
            elif np.issubdtype(found.dtype, np.integer):
                assert (found == values).all(), name
            else:
                assert found == pytest.approx(values, rel=2e-5, abs=1e-8), name


def test_padding_and_order_do_not_matter(checkpoints, token_file, tmp_path):
    """EASY-EP golden check 8, REAP golden check 6: any split into batches gives the same sums."""
    data = [f"a={token_file / 'a.jsonl'}"]
    one = api.calibrate(checkpoints("mixtral"), data, tmp_path / "one", **{**CALIBRATION, "batch_tokens": 1})
    many = api.calibrate(checkpoints("mixtral"), data, tmp_path / "many", **{**CALIBRATION, "batch_tokens": 10**6})
    for layer in one.layers:
        for name, value in one.layers[layer].domains["a"].items():
            assert many.layers[layer].domains["a"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_statistics_of_parts_add_up_to_the_whole(checkpoints, data, tmp_path):
    """EASY-EP golden check 6: S(A + B) = S(A) + S(B)."""
    source = checkpoints("qwen2_moe")
    both = api.calibrate(source, data, tmp_path / "ab", **CALIBRATION)
    a = api.calibrate(source, data[:1], tmp_path / "a", **CALIBRATION)
    b = api.calibrate(source, data[1:], tmp_path / "b", **CALIBRATION)
    added = a + b
    assert added.tokens == both.tokens
    for layer in both.layers:
        for domain in "ab":
            for name, value in both.layers[layer].domains[domain].items():
                assert (added.layers[layer].domains[domain][name] == value).all(), name


class _Fake:
    """A watch on a hand-made layer: residual stream, routed output and slots are given."""

    def __init__(self, experts: int, x: torch.Tensor, mask: list[bool] | None = None) -> None:
        self.batch = Batch(torch.zeros(1, x.shape[0], dtype=torch.long), torch.tensor([mask or [True] * x.shape[0]]), "d", [0])
        self.sums = LayerSums(experts, {"d": 1}, torch.device("cpu"))
        self.watch = object.__new__(_Watch)
        self.watch.arch, self.watch.sums, self.watch.current = families()["mixtral"], self.sums, lambda: self.batch
        self.watch.block = self.watch.layer = torch.nn.Module()
        self.watch.residual = x
        self.watch.router_output = (torch.zeros(x.shape[0], experts),)

    def add(self, raw: torch.Tensor, expert: list[int], weight: list[float], token: list[int], routed: torch.Tensor):
        """The slots are sorted by expert, then by token."""
        slots = Slots(raw, torch.tensor(expert), torch.tensor(weight), torch.tensor(token))
        top_k = max(map(token.count, token))
        selected = torch.full((len(self.watch.residual), top_k), self.sums.num_experts)
        weights = torch.zeros(selected.shape)
        for place, (own, value, at) in enumerate(zip(expert, weight, token, strict=True)):
            slot = token[:place].count(at)
            selected[at, slot], weights[at, slot] = own, value
        self.watch._add(self.watch.residual, routed, slots, (selected, weights))
        return self.sums.by_domain["d"]


def test_reap_golden_example():
    """REAP golden check 5: norms 5 and 13 on the two tokens of expert 0, a masked third token, expert 1 unused."""
    raw = torch.tensor([[3.0, 4.0], [5.0, 12.0], [100.0, 100.0]])
    g = [0.7, 0.6, 0.9]
    fake = _Fake(2, torch.ones(3, 2), [True, True, False])
    sums = fake.add(raw, [0, 0, 0], g, [0, 1, 2], raw * torch.tensor(g)[:, None])
    from expertsmith.calibration.stats import LayerStatistics
    from expertsmith.methods import methods
    from expertsmith.methods.base import Facts

    layer = LayerStatistics(0, {"d": {name: value.numpy() for name, value in sums.items()}})
    facts = Facts(0, 2, {"d": [2]})
    score = {
        name: m.function(layer, facts)
        for name, m in methods().items()
        if m.reads == "statistics" and m.gives == "saliency" and not m.output_moments
    }
    assert score["frequency"].tolist() == [2, 0]
    assert score["ean"].tolist() == [18, 0]
    assert score["man"].tolist() == [9, 0]
    assert score["msan"].tolist() == [(25 + 169) / 2, 0]
    assert score["router_score"] == pytest.approx([1.3, 0])
    assert score["reap"] == pytest.approx([(5 * 0.7 + 13 * 0.6) / 2, 0])
    assert methods()["ean"].function(layer, facts, weighted=True) == pytest.approx([5 * 0.7 + 13 * 0.6, 0])
    assert int(sums["tokens"]) == 2
    assert sums["norm_max"].tolist() == [13, 0]


@pytest.mark.parametrize(("factor", "turn"), [(0.0, 0.0), (0.5, 0.0), (-0.5, 0.0), (-2.0, 2.0)])
def test_token_contribution_of_parallel_outputs(factor, turn):
    """EASY-EP golden check 3: r = 0 and r parallel to x turn nothing; r = -2 x turns the stream round."""
    x = torch.tensor([[1.0, 2.0, -2.0]])
    fake = _Fake(1, x)
    sums = fake.add(x * factor, [0], [1.0], [0], x * factor)
    assert float(sums["turn_sum"]) == pytest.approx(turn, abs=1e-6)
    assert float(sums["easy_ep"][0]) == pytest.approx(3 * abs(factor) * turn, abs=1e-5)


def test_token_contribution_of_an_orthogonal_output():
    """x = (3, 0), r = (0, 4): cos = 3/5, so s = 2/5 and S = g * 8 * s for one expert of weight 1/2 and raw output (0, 8)."""
    x, r = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    sums = _Fake(1, x).add(2 * r, [0], [0.5], [0], r)
    assert float(sums["turn_sum"]) == pytest.approx(0.4)
    assert float(sums["easy_ep"][0]) == pytest.approx(0.5 * 8 * 0.4)


@given(st.integers(0, 2**31), st.floats(1e-6, 1e3))
@settings(max_examples=60, deadline=None)
def test_token_contribution_is_accurate_for_small_outputs(seed, scale):
    """Against float64: relative error below 1e-3 even where 1 - cos is far below float32's resolution near 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 16, generator=generator)
    r = scale * torch.randn(4, 16, generator=generator)
    fake = _Fake(1, x)
    found = fake.watch._turn(r)
    a, b = x.double(), x.double() + r.double()
    u, v = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    exact = 0.5 * ((u - v) ** 2).sum(-1)
    assert found.tolist() == pytest.approx(exact.tolist(), rel=1e-3)


def test_token_contribution_without_a_residual_stream_is_zero():
    x = torch.zeros(1, 3)
    assert float(_Fake(1, x).watch._turn(torch.ones(1, 3))[0]) == 0.0


def test_shared_experts_do_not_count(checkpoints, data, tmp_path):
    """EASY-EP golden check 5: another shared expert leaves the sums of the first MoE layer as they are."""
    model = random_model("qwen2_moe")
    with torch.no_grad():
        model.model.layers[0].mlp.shared_expert.down_proj.weight.add_(1.0)
    model.save_pretrained(tmp_path / "changed")
    a = api.calibrate(checkpoints("qwen2_moe"), data, tmp_path / "a", **CALIBRATION)
    b = api.calibrate(tmp_path / "changed", data, tmp_path / "b", **CALIBRATION)
    for name, value in a.layers[0].domains["a"].items():
        assert b.layers[0].domains["a"][name] == pytest.approx(value, rel=1e-6), name
    assert not np.allclose(a.layers[1].domains["a"]["easy_ep"], b.layers[1].domains["a"]["easy_ep"])


def test_scaling_an_expert_scales_its_reap(checkpoints, data, tmp_path):
    """REAP golden check 8 and EASY-EP golden check 4, on the last layer, where nothing downstream moves."""
    model = random_model("mixtral")
    last = len(model.model.layers) - 1
    with torch.no_grad():
        model.model.layers[last].mlp.experts.down_proj[3] *= 2
    model.save_pretrained(tmp_path / "scaled")
    from expertsmith.methods import methods
    from expertsmith.methods.base import Facts

    a = api.calibrate(checkpoints("mixtral"), data, tmp_path / "a", **CALIBRATION)
    b = api.calibrate(tmp_path / "scaled", data, tmp_path / "b", **CALIBRATION)
    facts = Facts(last, 8, a.sequence_lengths)
    before, after = (methods()["reap"].function(s.layers[last], facts) for s in (a, b))
    assert after[3] == pytest.approx(2 * before[3])
    assert np.delete(after, 3) == pytest.approx(np.delete(before, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h", "granitemoe", "minimax_m3_vl_text", "inkling_text"])
def test_observed_forward_is_the_librarys_bit_for_bit(model_type, dtype, checkpoints):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    record = families()[model_type]
    model = random_model(model_type).to(dtype)
    layer = next(
        entry
        for entry in model.get_submodule(record.layers)
        if hasattr(entry.get_submodule(record.block), record.experts.split(".")[0])
    )
    experts = layer.get_submodule(f"{record.block}.{record.experts}" if record.block else record.experts)
    weight = experts.down_proj
    width = (experts.gate_up_proj if experts.has_gate else experts.up_proj).shape[1 if experts.is_transposed else 2]
    assert weight.shape[0] == experts.num_experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, width, generator=generator).to(dtype)
    scores = torch.rand(20, experts.num_experts, generator=generator)
    top, selected = scores.topk(2, dim=-1)
    for weights in (top, top.to(dtype)):
        expected = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, x, selected, weights)
        found, slots = grouped_forward(experts, x, selected, weights)
        assert torch.equal(found, expected)
        _, flat = flattened_forward(experts, x, selected, weights, pairs=False, shape=x.shape)
        assert torch.allclose(
            slots.raw.float(),
            flat.raw.float(),
            rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
            atol=1e-2 if dtype == torch.bfloat16 else 1e-6,
        )
        assert (slots.expert == flat.expert).all()
        assert (slots.token == flat.token).all()
    if dtype == torch.float32:  # gradients take another way (`engine.experts._Rows`), and add up in another order
        leaves = [*experts.parameters(), x.requires_grad_(), top.requires_grad_()]
        pull = torch.randn(expected.shape, generator=generator)
        wanted = torch.autograd.grad((ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, x, selected, top) * pull).sum(), leaves)
        made = torch.autograd.grad((grouped_forward(experts, x, selected, top)[0] * pull).sum(), leaves)
        for mine, theirs in zip(made, wanted, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_skip_class_of_zaya_is_not_counted(data, tmp_path):
    """A token that skips is neither a selection of expert 0 nor part of its sums."""
    model = random_model("zaya")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.balancing_biases[-1] = 0.1
    model.save_pretrained(tmp_path / "zaya")
    stats = api.calibrate(tmp_path / "zaya", data, tmp_path / "s", **CALIBRATION)
    tokens = sum(stats.tokens.values())
    routed = [int(entry.total("selections").sum()) for entry in stats.layers.values()]
    assert any(0 < count < tokens for count in routed)
    made = api.plan(tmp_path / "zaya", "frequency", 4, stats=stats)
    api.apply(tmp_path / "zaya", made, tmp_path / "out")
    assert api.verify(tmp_path / "zaya", tmp_path / "out", tokens=256, device=DEVICE).passed


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 60), st.integers(0, 5))
def test_sample_is_seeded_and_within_the_sequences(lengths, count, seed):
    chosen = choose_sample(lengths, count, seed, "d")
    assert chosen == choose_sample(lengths, count, seed, "d")
    assert len(chosen) == min(count, sum(lengths))
    assert all(0 <= p < lengths[s] for s, p in chosen)


def test_sample_holds_the_blocks_inputs_and_outputs(checkpoints, token_file, tmp_path):
    """The sampled inputs, run through the block again, give the sampled outputs."""
    import transformers

    stats = api.calibrate(
        checkpoints("mixtral"), [f"a={token_file / 'a.jsonl'}"], tmp_path / "s", sample_tokens=15, **CALIBRATION
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints("mixtral")).eval()
    for layer, entry in stats.layers.items():
        x, y = (torch.from_numpy(entry.domains["a"][f"sample_{name}"]) for name in ("inputs", "outputs"))
        assert x.shape == (15, 32)
        with torch.no_grad():
            assert torch.allclose(model.model.layers[layer].mlp(x.unsqueeze(0))[0], y, atol=1e-6)


def test_output_sum_is_the_sum_of_raw_outputs(checkpoints, token_file, tmp_path):
    """Its norm is at most the sum of norms, and equals it where an expert saw one token."""
    stats = api.calibrate(
        checkpoints("mixtral"),
        [f"a={token_file / 'a.jsonl'}:1"],
        tmp_path / "s",
        output_sum=True,
        **{**CALIBRATION, "seq_len": 24},
    )
    for entry in stats.layers.values():
        sums = entry.domains["a"]
        length = np.linalg.norm(sums["output_sum"], axis=-1)
        assert (length <= sums["norm_sum"] * (1 + 1e-5) + 1e-9).all()
        once = sums["selections"] == 1
        assert length[once] == pytest.approx(sums["norm_sum"][once], rel=1e-5)
        assert length.max() > 0


def test_router_entropy_of_a_uniform_router_is_log_n(data, tmp_path):
    model = random_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    model.save_pretrained(tmp_path / "flat")
    stats = api.calibrate(tmp_path / "flat", data, tmp_path / "s", **CALIBRATION)
    for entry in stats.layers.values():
        assert float(entry.total("entropy_sum").item()) / float(entry.total("tokens").item()) == pytest.approx(
            math.log(8), rel=1e-5
        )
        assert entry.total("ratio_histogram")[-1] == entry.total("tokens").item()


def test_easy_ep_choices_of_demonstrations(checkpoints, data, tmp_path):
    """all, random-n and longest-n are cut from the same pass; two domains are normalised before they are added."""
    from expertsmith.methods import methods
    from expertsmith.methods.base import Facts

    stats = api.calibrate(checkpoints("mixtral"), data, tmp_path / "s", **CALIBRATION)
    entry = stats.layers[0]
    facts = Facts(0, 8, stats.sequence_lengths)
    method = methods()["easy_ep"]
    tables = {d: entry.domains[d]["easy_ep_by_sequence"].astype(np.float64) for d in "ab"}
    one = stats.select(["a"]).layers[0]
    assert method.function(one, facts) == pytest.approx(entry.domains["a"]["easy_ep"])
    lengths = stats.sequence_lengths["a"]
    longest = sorted(range(6), key=lambda i: (-lengths[i], i))[:3]
    assert method.function(one, facts, demonstrations="longest", count=3) == pytest.approx(tables["a"][longest].sum(0))
    drawn = method.function(one, facts, demonstrations="random", count=3, seed=1)
    assert any(drawn == pytest.approx(tables["a"][[i, j, k]].sum(0)) for i in range(6) for j in range(i) for k in range(j))
    assert (drawn == method.function(one, facts, demonstrations="random", count=3, seed=1)).all()
    mixed = method.function(entry, facts)
    a, b = (entry.domains[d]["easy_ep"] for d in "ab")
    assert mixed == pytest.approx(a / a.sum() + b / b.sum())


def test_mixed_domains_do_not_depend_on_their_scale():
    """EASY-EP golden check 9: the same domain twice selects as once; a constant factor on a domain changes nothing; empty rows are safe."""
    from expertsmith.methods.easy_ep import mix

    s, t = np.array([3.0, 1.0, 2.0]), np.array([0.0, 5.0, 1.0])
    assert (np.argsort(mix({"a": s, "b": s})) == np.argsort(s)).all()
    assert mix({"a": s, "b": t}) == pytest.approx(mix({"a": s * 7, "b": t}))
    assert np.isfinite(mix({"a": s, "b": np.zeros(3)})).all()


@pytest.mark.parametrize("shape", ["stacked", "per_expert"])
def test_aimer_keeps_peaky_experts(shape, tmp_path):
    """HIGHER mean|w| / RMS IS PRUNED: an expert with one spike survives, a flat one goes; an all-zero expert is never pruned."""
    model_type = "mixtral" if shape == "per_expert" else "gpt_oss"
    model = random_model(model_type)
    with torch.no_grad():
        for layer in model.model.layers:
            experts = layer.mlp.experts
            for weight in (experts.gate_up_proj, experts.down_proj):
                weight[5] = 0.0
                weight[5].view(-1)[0] = 1.0  # spike
                weight[2] = 1.0  # flat
                weight[6] = 0.0
    model.save_pretrained(tmp_path / "m")
    made = api.plan(tmp_path / "m", "aimer", 7)
    for entry in made.layers:
        assert entry.saliency is not None
        assert entry.saliency[2] == pytest.approx(-1.0)
        assert entry.saliency[6] == 0.0
        assert entry.keep == [0, 1, 3, 4, 5, 6, 7]
        others = [entry.saliency[e] for e in (0, 1, 3, 4, 7)]
        assert all(-0.9 < value < -0.7 for value in others)  # Gaussian weights: -sqrt(2 / pi) = -0.798
    size = model.model.layers[0].mlp.experts.down_proj[0].numel() * 3 if model_type == "mixtral" else None
    if size:
        assert made.layers[0].saliency[5] == pytest.approx(-2 / math.sqrt(size * 2))


def test_reap_and_frequency_formulas_agree_with_their_sums(checkpoints, data, tmp_path):
    """REAP golden checks 2-4 on a whole model with softmax, renormalised gates."""
    stats = api.calibrate(checkpoints("mixtral"), data, tmp_path / "s", **CALIBRATION)
    tokens = sum(stats.tokens.values())
    for entry in stats.layers.values():
        assert int(entry.total("selections").sum()) == 2 * tokens
        assert float(entry.total("weight_sum").sum()) == pytest.approx(tokens, rel=1e-5)
        assert float(entry.total("score_sum").sum()) == pytest.approx(tokens, rel=1e-5)


def test_seeds_of_random(checkpoints):
    source = checkpoints("mixtral")
    plans = [api.plan(source, "random", 4, options={"seed": seed}).kept for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert len({tuple(ids) for ids in plans[0].values()}) > 1  # layers are drawn apart


def test_top_half_contains_the_top_quarter(checkpoints, data, tmp_path):
    """EASY-EP golden check 10."""
    stats = api.calibrate(checkpoints("qwen3_moe"), data, tmp_path / "s", **CALIBRATION)
    half, quarter = (api.plan(checkpoints("qwen3_moe"), "easy_ep", k, stats=stats).kept for k in (4, 2))
    assert all(set(quarter[layer]) <= set(half[layer]) for layer in half)


def test_expert_without_tokens_goes_first_and_is_named(checkpoints, tmp_path, data):
    """A router row far below all others: saliency 0 under every data-driven criterion."""
    model = random_model("deepseek_v3")
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias[3] = -100.0
    model.save_pretrained(tmp_path / "m")
    stats = api.calibrate(tmp_path / "m", data, tmp_path / "s", output_moments=True, **CALIBRATION)
    from expertsmith.methods import methods

    for name, method in methods().items():
        if method.reads == "statistics" and method.gives == "saliency":
            made = api.plan(tmp_path / "m", name, 6, stats=stats)
            assert all(entry.saliency[3] == 0.0 and 3 not in entry.keep for entry in made.layers), name

    made = api.plan(tmp_path / "m", "reap", 8, stats=stats)
    assert any("got no calibration token" in note for note in made.notes)


def test_calibration_in_bfloat16_matches_float32_roughly(tmp_path, data):
    """Routing weights in bf16 models: same tokens counted, sums within rounding of the float32 pass."""
    save_tiny("mixtral", tmp_path / "m")
    a = api.calibrate(tmp_path / "m", data, tmp_path / "a", dtype="float32", **CALIBRATION)
    b = api.calibrate(tmp_path / "m", data, tmp_path / "b", dtype="bfloat16", **CALIBRATION)
    for layer in a.layers:
        x, y = a.layers[layer].total("norm_sum").sum(), b.layers[layer].total("norm_sum").sum()
        assert y == pytest.approx(x, rel=0.05)
        assert a.layers[layer].total("tokens") == b.layers[layer].total("tokens")


def test_the_table_of_statistics_is_what_a_calibration_writes(checkpoints, data, tmp_path):
    from expertsmith.calibration.observers import STATISTICS

    stats = api.calibrate(
        checkpoints("mixtral"),
        data,
        tmp_path / "s",
        output_moments=True,
        neurons=True,
        all_outputs=True,
        sample_tokens=3,
        **CALIBRATION,
    )
    plain = api.calibrate(checkpoints("mixtral"), data, tmp_path / "plain", **CALIBRATION)
    for domain in "ab":
        sizes = {
            "1": 1,
            "2": 2,
            "1000": 1000,
            "E": 8,
            "I": json.loads((checkpoints("mixtral") / "config.json").read_text())["intermediate_size"],
            "hidden": 32,
            "n": 3,
            "sequences": stats.header["data"]["sequences"][domain],
        }
        for layer, entry in stats.layers.items():
            held = entry.domains[domain]
            assert set(held) == set(STATISTICS)
            assert set(plain.layers[layer].domains[domain]) == {name for name, what in STATISTICS.items() if not what.option}
            for name, what in STATISTICS.items():
                assert held[name].shape == tuple(sizes[part] for part in what.shape.strip("[]").split(", ") if part), name


def test_methods_that_average_warn_of_few_tokens(checkpoints, data, tmp_path):
    from expertsmith.methods import methods

    stats = api.calibrate(checkpoints("mixtral"), data, tmp_path / "s", output_moments=True, **CALIBRATION)
    for name, method in methods().items():
        if method.gives != "saliency":
            continue
        made = api.plan(checkpoints("mixtral"), name, 8, stats=stats.select(["a"]))
        assert any("noise" in note for note in made.notes) == (name in ("man", "mone", "msan", "reap")), name
        assert method.averages == (name in ("man", "mone", "msan", "reap"))


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_outputs_of_all_experts_are_those_of_the_experts_own_forward(model_type):
    """The sum over all tokens by linearity of the down projection against every expert run on every token."""
    from expertsmith.engine.experts import outputs_of_all, run_all
    from expertsmith.engine.layout import experts_of, has_experts

    record = families()[model_type]
    model = random_model(model_type)
    layer = next(layer for layer in reversed(list(model.get_submodule(record.layers))) if has_experts(layer, record))
    experts = experts_of(layer, record)
    width = 16 if model_type == "nemotron_h" else 32  # its experts work in a latent space
    x = torch.randn(11, width, generator=torch.Generator().manual_seed(0))
    dims = 3 if model_type == "dbrx" else 2
    with torch.no_grad():
        scores = torch.rand(11, 8, generator=torch.Generator().manual_seed(1))
        total, scored = outputs_of_all(experts, x, scores, record, dims)
        raw = run_all(experts, x, 8, record, dims).double()
    assert (total - raw.sum(1)).abs().max() < 1e-6 * raw.abs().max()
    assert (scored - torch.einsum("eth,te->eh", raw, scores.double())).abs().max() < 1e-6 * raw.abs().max()
    one = torch.zeros(len(x), 1, dtype=torch.long)
    if record.call == "routed":
        with torch.no_grad():
            slots = flattened_forward(experts, x, one + 3, torch.ones(len(x), 1), False, (1, *x.shape)[3 - dims :])[1]
        assert (raw[3] - slots.raw.double()).abs().max() < 1e-6 * raw.abs().max()


def test_gram_of_router_logits_and_outputs_over_all_tokens(checkpoints, data, tmp_path):
    """Against logits and expert outputs caught by hooks on plain transformers."""
    import transformers

    source = checkpoints("qwen2_moe")
    stats = api.calibrate(source, data, tmp_path / "s", all_outputs=True, **CALIBRATION)
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    last = max(stats.layers)
    block = model.model.layers[last].mlp
    rows = [json.loads(line)["input_ids"] for line in Path(data[0].partition("=")[2]).read_text().splitlines()]
    gram, sums, scored = (torch.zeros(8, width, dtype=torch.float64) for width in (8, 32, 32))
    for ids in rows:
        caught = []
        handle = block.gate.register_forward_hook(lambda m, a, o, caught=caught: caught.append((a[0], o[0])))
        with torch.no_grad():
            model(torch.tensor([ids]))
        handle.remove()
        x, logits = (value.reshape(-1, value.shape[-1]) for value in caught[0])
        gram += logits.double().T @ logits.double()
        for e in range(8):
            gate, up = (x @ block.experts.gate_up_proj[e].T).chunk(2, -1)
            raw = ((torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[e].T).double().detach()
            sums[e] += raw.sum(0)
            scored[e] += logits.double().softmax(-1)[:, e].detach() @ raw
    entry = stats.layers[last].domains["a"]
    assert np.abs(entry["logit_gram"] - gram.numpy()).max() < 1e-5 * np.abs(gram.numpy()).max()
    for name, wanted in (("all_output_sum", sums.numpy()), ("all_scored_output_sum", scored.numpy())):
        assert np.abs(entry[name] - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "longcat_flash", "zaya", "gemma4_text", "dbrx"])
def test_a_batch_does_not_wait_for_the_device(model_type, checkpoints, data, tmp_path, monkeypatch):
    """Llama 4 is not among them: which tokens its experts take is in their inputs alone, and has to be looked for."""
    add, passed = _Watch._add, []

    def watched(*arguments):
        with Waits() as mode:
            add(*arguments)
        passed.append(mode.found)

    monkeypatch.setattr(_Watch, "_add", watched)
    api.calibrate(checkpoints(model_type), data, tmp_path / "stats", output_sum=True, **CALIBRATION)
    assert passed
    assert not any(passed)
