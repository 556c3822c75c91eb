"""Results in Python: short as text, tables in a notebook, data frames."""

from __future__ import annotations

import math
import sys

import pytest

from conftest import CALIBRATION
from expertsmith import api
from expertsmith.errors import UserError
from expertsmith.views.notebook import Shown


def test_results_are_short_as_text_and_tables_in_a_notebook(checkpoints, data, tmp_path):
    source = checkpoints("mixtral")
    held = api.calibrate(source, data, tmp_path / "stats", **CALIBRATION)
    made = api.plan(source, "frequency", 0.5, stats=held)
    api.apply(source, made, tmp_path / "out")
    verdict = api.verify(source, tmp_path / "out", tokens=64, device="cpu")
    quality = api.evaluate(source, data, seq_len=24, device="cpu")
    layers = len(made.layers)
    assert repr(made) == f"<Plan: frequency keeps {4 * layers} of {8 * layers} experts in {layers} layers of mixtral>"
    assert repr(verdict).startswith("<Verdict: passed, ")
    assert repr(held).startswith(f"<Statistics: {layers} layers, tokens: a ")
    assert repr(quality).startswith("<Quality: a perplexity ")
    assert quality.perplexity == pytest.approx(
        math.exp(sum(math.log(entry.perplexity) for entry in quality.domains.values()) / len(quality.domains))
    )
    for result, rows in ((made, layers), (verdict, len(verdict.layers)), (held, 2 * layers), (quality, 2)):
        assert len(result.to_dataframe()) == rows
        page = result._repr_html_()
        assert page.count("<tr>") == rows + 1
        assert "Infinity" not in page
    assert list(made.to_dataframe()["kept"]) == [4] * layers


def test_a_table_is_text_for_html(monkeypatch):
    class Two(Shown):
        def _rows(self):
            return [{"<a>": 1234567, "b": 0.123456}, {"<a>": "<b>", "b": True}]

        def _line(self):
            return "x & y"

    assert Two()._repr_html_() == (
        "<table><caption>x &amp; y</caption><thead><tr><th>&lt;a&gt;</th><th>b</th></tr></thead><tbody>"
        "<tr><td>1,234,567</td><td>0.1235</td></tr><tr><td>&lt;b&gt;</td><td>True</td></tr></tbody></table>"
    )
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="to_dataframe needs pandas"):
        Two().to_dataframe()


def test_a_notebook_sees_progress_and_a_program_does_not(monkeypatch, checkpoints, capfd):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    api.plan(checkpoints("mixtral"), "random", 0.5)
    assert capfd.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    api.plan(checkpoints("mixtral"), "random", 0.5)
    assert "keep: 4 of 8 experts per layer" in capfd.readouterr().err
