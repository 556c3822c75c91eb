"""On really trained models: experts chosen for a domain keep that domain; needs $EXPERTSMITH_TESTBED."""

from __future__ import annotations

import pytest

from expertsmith import api

pytestmark = pytest.mark.testbed
RUN = {"device": "cpu", "dtype": "float32", "memory": "resident"}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_half_of_the_experts_chosen_for_a_domain(name, testbed, tmp_path):
    """easy_ep on spanish text: verified, less than half of the loss that random halves cost there, and more than nothing elsewhere."""
    model, corpus = testbed / "models" / name, testbed / "data" / "corpus"
    stats = api.calibrate(
        model,
        [f"spanish={corpus / 'spanish' / 'calib.jsonl'}"],
        tmp_path / "s",
        samples=16,
        seq_len=256,
        batch_tokens=2048,
        **RUN,
    )
    heldout = [f"{domain}={corpus / domain / 'heldout.jsonl'}" for domain in ("spanish", "story")]
    options = {"samples": 12, "seq_len": 256, "batch_tokens": 2048, **RUN}

    def losses(path) -> dict[str, float]:
        return {domain: row["loss"] for domain, row in api.evaluate(path, heldout, **options).to_json()["domains"].items()}

    def rise(method: str, **chosen: object) -> dict[str, float]:
        out = tmp_path / f"{method}{chosen}".replace(" ", "")
        made = api.compress(model, method, 0.5, out=out, stats=stats, options=chosen, measure=False, device="cpu")
        assert made["verify"].passed
        assert made["verify"].largest < 1e-5
        return {domain: loss - base[domain] for domain, loss in losses(out).items()}

    base = losses(model)
    ours = rise("easy_ep")
    random = [rise("random", seed=seed)["spanish"] for seed in (0, 1)]
    assert ours["spanish"] < 0.5 * sum(random) / len(random)
    assert ours["story"] > ours["spanish"]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_router_rows_follow_gate_neurons_in_trained_models(name, testbed, tmp_path):
    """The paper's first observation holds in models that were really trained, and only for gate."""
    found = api.analyze(testbed / "models" / name, tmp_path / "look")
    first = found["observations"][0]
    assert first["verdict"] == "supported"
    assert first["r2"]["gate"] > 3 * first["chance_r2"]
    assert max(first["r2"]["up"], first["r2"]["down"]) < first["r2"]["gate"] / 2
