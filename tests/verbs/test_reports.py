"""The pages of `compress` and `evaluate`: their numbers are those of the result, and what was not measured is said."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
from html import unescape
from pathlib import Path

import pytest

from conftest import CALIBRATION, run_cli
from expertsmith import api
from expertsmith.errors import UserError
from expertsmith.lint import ENGINES
from expertsmith.verbs.compress import _plain
from expertsmith.verbs.definition import command_line
from expertsmith.views.pages import compression, evaluation
from expertsmith.views.pages.figures import differences, kept_map
from expertsmith.views.show import byte_count, count, ranges

MADE = {"by": "expertsmith 1", "command": "expertsmith compress", "settings": {"seed": 3}, "seconds": {"plan": 1.0}, "memory": {"the process": 2e9}, "versions": {"torch": "2"}, "when": "today"}  # fmt: skip


@pytest.fixture(scope="module")
def compressed(checkpoints, data, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("compressed") / "out"
    return api.compress(checkpoints("mixtral"), "reap", 0.5, out=out, data=data, eval_data=data, heal=None, **CALIBRATION)


def text_of(html: str) -> str:
    """What a reader sees: without style, script and tags."""
    body = re.sub(r"<(style|script).*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def first_screen(html: str) -> str:
    return text_of(html[html.index("<header>") : html.index("</header>")])


def test_the_first_screen_of_compress_has_the_numbers_of_its_result(compressed):
    html = Path(compressed["report"]).read_text()
    seen, plan, mean = first_screen(html), compressed["plan"], compressed["quality"]["mean"]
    before, after = plan.summary.bytes
    assert f"4 of 8 experts per layer stay, with {100 * after / before:.0f} % of the bytes" in seen
    assert f"{byte_count(before)} → {byte_count(after)}" in seen
    assert f"{count(plan.summary.parameters[0])} → {count(plan.summary.parameters[1])} parameters" in seen
    assert f"{mean['rise']:+.3f} ± {mean['rise_se']:.3f} nats per token" in seen
    assert f"KL {mean['kl']:.3f} nats, same top-1 at {100 * mean['top1_agreement']:.1f} %" in seen
    for name, row in compressed["quality"]["domains"].items():
        assert f"{name}: perplexity {row['reference_perplexity']:.2f} → {row['perplexity']:.2f}" in seen
        assert f"{row['rise']:+.3f} ± {row['rise_se']:.3f}" in seen
    verdict = compressed["verify"]
    assert verdict.passed
    assert f"Is it proven? Largest difference {verdict.largest:.1e} bytes: {verdict.tensors} tensors as planned" in seen
    assert all(f"{version}: " in seen for version in ENGINES.values())
    assert html.count("<svg") == 3


def test_the_rest_of_the_page(compressed, checkpoints, data):
    html = Path(compressed["report"]).read_text()
    seen = text_of(html)
    assert Path(compressed["report"]) == Path(compressed["out"]) / "expertsmith" / "report.html"
    for entry in compressed["plan"].layers:
        assert f"{entry.layer} {len(entry.keep)} {entry.num_experts} {ranges(entry.keep)}" in seen
    for row in compressed["verify"].layers:
        assert f"{row['layer']} {row['difference']:.2g} {row['scale']:.3g}" in seen
    told = shlex.split(re.search(r"command (expertsmith compress .*?) model ", seen)[1])
    wanted = ["--method", "reap", "--keep", "0.5", "--out", "out", "--data", "a=a.jsonl", "--data", "b=b.jsonl"]
    assert told[:3] == ["expertsmith", "compress", "mixtral"]
    assert told[3 : 3 + len(wanted)] == wanted
    assert "--no-pack" in told
    assert "--measure" not in told, "that is the default"
    assert "seed 42" in seen
    assert "peak memory" in seen
    links = re.findall(r'(?:href|src)="([^"]*)"', html)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(re.findall(r'id="([^"]+)"', html))
    assert len(html) < 100_000


@pytest.mark.parametrize("relative", [False, True])
def test_what_is_published_does_not_show_a_users_folders(relative, checkpoints, data, tmp_path, monkeypatch):
    """No file in the output names a folder of this machine, however the paths were given; all names of files and folders are there."""
    home = tmp_path / "home of it's user"
    shutil.copytree(checkpoints("mixtral"), home / "models" / "small")
    rows = (Path(data[0].partition("=")[2])).read_text() * 3
    (home / "texts").mkdir()
    for name in ("calib", "held"):
        (home / "texts" / f"{name}.jsonl").write_text(rows)
    monkeypatch.chdir(home)
    place = Path() if relative else home
    result = api.compress(
        f"{place / 'models' / 'small'}/", "reap", 4, out=place / "results" / "half", data=[f"a={place / 'texts' / 'calib.jsonl'}:16"],
        eval_data=[str(place / "texts" / "held.jsonl")], heal=None if relative else "least_squares", **(CALIBRATION | {"batch_tokens": 48}),
    )  # fmt: skip
    texts = {file: file.read_text() for file in Path(result["out"]).rglob("*") if file.suffix in (".md", ".json", ".html")}
    assert {"report.html", "README.md", "plan.json", "verify.json" if relative else "heal.json"} <= {
        file.name for file in texts
    }
    for file, text in texts.items():
        assert not re.findall(r"home of it|models/|texts/|results/", unescape(text)), file
    seen = text_of(texts[Path(result["report"])])
    assert "expertsmith compress small --method reap --keep 4 --out half --data a=calib.jsonl:16 --eval-data held.jsonl" in seen
    assert "`small`" in texts[Path(result["out"]) / "README.md"]


def test_what_was_not_measured_is_said_with_the_option(compressed, checkpoints, data, tmp_path):
    said = {}
    for name, options in {"none": {}, "off": {"data": data, "measure": False}}.items():
        result = api.compress(checkpoints("mixtral"), "random", 4, out=tmp_path / name, **options)
        said[name] = first_screen(Path(result["report"]).read_text())
        assert "the loss was not measured" in said[name]
    assert "What it cost Loss not measured no text was given: pass --eval-data FILE" in said["none"]
    assert "What it cost Loss not measured --no-measure: run again with --measure" in said["off"]
    own = _plain(compressed) | {"quality": compressed["quality"] | {"held_out": False}}
    assert "too optimistic, pass --eval-data FILE" in first_screen(compression.page(own, MADE))
    one = copy.deepcopy(_plain(compressed))
    one["quality"]["mean"]["rise_se"] = None
    assert "(one sequence: no standard error)" in first_screen(compression.page(one, MADE))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"passed": False}, ("the proof FAILED", "FAILED Is it proven?")),
        ({"passed": False, "wrong_tensors": ["model.x"], "layers": []}, ("the proof FAILED", "1 of ")),
        ({"config_differs": ["num_experts"], "passed": False}, ("the proof FAILED", "config differs in num_experts")),
        ({"not_compared": "no class"}, ("the bytes are proven", "layers, logits: not measured, no class")),
    ],
)
def test_a_proof_that_is_none_is_never_called_one(change, says, compressed):
    found = _plain(compressed)
    page = first_screen(compression.page(found | {"verify": found["verify"] | change}, MADE))
    assert all(text in page for text in says)
    assert "the result is proven" not in page


def test_engines_that_refuse(compressed):
    found = _plain(compressed)
    finding = {"rule": "vllm-x", "engine": "vllm", "level": "error", "message": "too few <experts>", "remedy": "keep more", "source": "x.py"}  # fmt: skip
    html = compression.page(found | {"lint": {"engines": ENGINES, "findings": [finding]}}, MADE)
    assert "vllm will not serve it" in first_screen(html)
    assert "1 refuses Will it serve? 3 of 4 engines, by lint" in first_screen(html)
    assert "too few <experts>; keep more" in text_of(html)
    assert "<experts>" not in html


def test_healing_is_shown_and_the_proof_is_of_before_it(checkpoints, data, tmp_path):
    options = {**CALIBRATION, "batch_tokens": 48}
    done = api.compress(checkpoints("mixtral"), "reap", 4, out=tmp_path / "out", data=data, eval_data=data, heal="least_squares", **options)  # fmt: skip
    html = Path(done["report"]).read_text()
    assert "it was proven before healing" in first_screen(html)
    for name, row in done["heal"]["held_out"]["after"]["domains"].items():
        was = done["heal"]["held_out"]["before"]["domains"][name]
        assert f"{name} {was['reference_loss']:.4f} {was['loss']:.4f} {row['loss']:.4f}" in text_of(html)


# ---- evaluate


def test_evaluate_writes_what_it_found(checkpoints, compressed, data, tmp_path):
    options = {"seq_len": 16, "device": "cpu"}
    quality = api.evaluate(compressed["out"], data, reference=checkpoints("mixtral"), generate=3, report=tmp_path / "sub" / "r.html", **options)  # fmt: skip
    found, html = quality.to_json(), (tmp_path / "sub" / "r.html").read_text()
    mean, seen = found["mean"], first_screen(html)
    assert f"the loss is {abs(mean['rise']):.3f} ± {mean['rise_se']:.3f} nats per token" in seen
    assert ("above" if mean["rise"] >= 0 else "below") in seen
    for name, row in found["domains"].items():
        assert f"{row['rise']:+.3f} ± {row['rise_se']:.3f}" in seen
        line = f"{name} {row['reference_perplexity']:.2f} {row['perplexity']:.2f} {row['reference_loss']:.4f} {row['loss']:.4f}"
        assert line in text_of(html)
    length = found["generation"]["domains"]["a"]["length"]
    assert f"tokens {length['reference']:.1f} ± {length['reference_se']:.1f} {length['value']:.1f}" in text_of(html)
    assert "not measured tasks (--tasks NAME), speed and memory (--speed)" in text_of(html)


def test_the_command_on_the_page_gives_the_page(checkpoints, data, tmp_path, capsys):
    file = tmp_path / "my report.html"
    line = ("evaluate", checkpoints("mixtral"), "-d", data[0], "--seq-len", 16, "--report", file, "-q", "--json")
    code, out, err = run_cli(capsys, *line)
    assert (code, err) == (0, "")
    first = text_of(file.read_text())
    assert f"{json.loads(out)['domains']['a']['perplexity']:.2f}" in first
    assert "no reference was given" in first
    code, _, err = run_cli(capsys, *line)
    assert (code, "exists already" in err and "--overwrite" in err) == (2, True)
    command = shlex.split(re.search(r"command (expertsmith evaluate .*?) model ", first)[1])
    assert run_cli(capsys, *command[1:], "--overwrite", "-q", "--json")[1] == out


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    """The model is not even looked for."""
    (tmp_path / "file").write_text("mine")
    for report, says in ((tmp_path / "file" / "r.html", "is no folder"), (tmp_path, "is a folder"), (tmp_path / "file", "exists already")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            api.evaluate(tmp_path / "no-such-model", ["no-such-data.jsonl"], report=report)
        code, _, err = run_cli(capsys, "evaluate", tmp_path / "no-such-model", "--speed", "--report", report)
        assert code == 2
        assert says in err
    assert (tmp_path / "file").read_text() == "mine"


def test_speed_and_tasks_alone_answer_too():
    row = {"task": "t", "metric": "acc", "filter": "none", "shots": 0, "documents": 9, "higher_is_better": True, "cut": 0, "value": 0.5, "se": 0.1, "reference": 0.8, "reference_se": 0.1, "difference": -0.3, "difference_se": 0.1, "clear": True}  # fmt: skip
    measured = {"prefill_tokens_per_second": 10.0, "decode_tokens_per_second": 4.0}
    found = {
        "tasks": {"limit": None, "rows": [row]},
        "speed": {
            "setting": {"engine": "vllm", "batch": 1, "prompt_len": 8, "new_tokens": 4, "dtype": "auto", "rounds": 3},
            "model": measured,
            "reference": {key: value / 2 for key, value in measured.items()},
            "ratios": dict.fromkeys(measured, 2.0),
        },
    }
    html = evaluation.page(found, "a/small", "a/large", MADE)
    seen = first_screen(html)
    assert "small next to large" in seen
    assert "Of 1 task scores, 1 worse by more than two standard errors." in seen
    assert "Speed in vllm, against the reference: prefill 2.00 ×, decode 2.00 ×." in seen
    assert "t acc ↑ 9 0.800 ± 0.100 0.500 ± 0.100 -0.300 ± 0.100 worse" in text_of(html)
    assert "prefill, tokens/s 5.0 10.0 2.00 ×" in text_of(html)
    assert html.count("<svg") == 2


# ---- parts


def test_a_map_of_many_experts_is_small():
    layers = [{"layer": i, "num_experts": 256, "keep": list(range(0, 256, 2))} for i in range(61)]
    text = kept_map(layers, ranges)
    assert len(text) < 700_000
    assert text.count('class="kept"') == 61
    few = kept_map([{"layer": 7, "num_experts": 4, "keep": [0, 3], "merge": [{"into": 0, "from": [0, 1]}]}], ranges)
    assert {kind: path.count("M") for kind, path in re.findall(r'class="(kept|merged|gone)" d="([^"]*)"', few)} == {"kept": 2, "merged": 1, "gone": 1}  # fmt: skip
    assert "layer 7: keeps 2 of 4 experts: 0 3" in few


def test_differences_are_to_scale():
    """From -1 to +3 on 416 units: zero is at 2 + 104, a unit is 104."""
    text = differences("d", [("a", "-1", -1.0, None), ("b", "+2.4", 2.4, 0.6), ("c", "+1", 1.0, 0.5)])
    assert '<rect class="better" x="2.0" y="41" width="104.0"' in text
    assert '<rect class="worse" x="106.0" y="87" width="249.6"' in text
    assert 'd="M293.2 94H418.0' in text
    assert '<rect class="is" x="106.0" y="133" width="104.0"' in text, "two standard errors: may be chance"


def test_a_command_has_what_differs_from_the_defaults():
    given = {"model": "a/b", "method": "reap", "keep": 0.5, "out": Path("o"), "options": {"x": 1}, "measure": False, "stats": object(), "seed": 42, "samples": 3, "pack": True}  # fmt: skip
    assert command_line("compress", given) == (
        "expertsmith compress a/b --method reap --keep 0.5 --out o --stats '<stats>' --option x=1 --no-measure --samples 3 --pack"
    )
