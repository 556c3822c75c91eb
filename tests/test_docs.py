"""README, documentation and recipes say what the program does."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from expertsmith.methods import methods

plan_format = importlib.import_module("expertsmith.planning.plan")  # expertsmith.plan is the verb
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(page, text) of every code block in a language."""
    for page in PAGES:
        for block in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
            yield page.name, block


def commands() -> list[str]:
    """Every `expertsmith …` line in a code block, continued lines joined, and every one that a cell of a table shows, each once;
    `torchrun … -m expertsmith …` as torchrun runs it."""
    lines = [line.split(" #")[0].strip() for _, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [cell for page in PAGES for cell in re.findall(r"\| `([^`|]+)` \|$", page.read_text(encoding="utf-8"), re.M)]
    lines = [re.sub(r"^torchrun .*? -m expertsmith ", "expertsmith ", line) for line in lines]
    return list(dict.fromkeys(line for line in lines if line.startswith("expertsmith ")))


def test_commands_under_torchrun_are_those_that_share_their_work():
    import expertsmith.cli  # noqa: F401  (registers the verbs)
    from expertsmith.verbs.definition import VERBS

    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES).replace("\\\n", " ")
    named = set(re.findall(r"torchrun [^\n`]*? -m expertsmith (\w+)", pages))
    assert named == {name for name, verb in VERBS.items() if verb.ranks}


def test_what_is_written_from_the_program_is_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "reference.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_stale_page_is_told(tmp_path, monkeypatch, capsys):
    """The check is one: a page with another default than the program has is named, and written anew without --check."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import reference

    page = tmp_path / "cli.md"
    fresh = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    page.write_text(fresh.replace("Default: `128`.", "Default: `127`."), encoding="utf-8")
    assert page.read_text(encoding="utf-8") != fresh
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    monkeypatch.setattr(reference, "PAGES", (page,))
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    with pytest.raises(SystemExit, match=r"cli\.md: out of date: run make docs-reference"):
        reference.main()
    monkeypatch.setattr(sys, "argv", ["reference.py"])
    reference.main()
    assert page.read_text(encoding="utf-8") == fresh


def test_every_section_that_can_be_written_has_a_place(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import reference

    text = "".join(page.read_text(encoding="utf-8") for page in reference.PAGES)
    assert all(f"<!-- {name} -->" in text and f"<!-- end of {name} -->" in text for name in reference.SECTIONS)


def test_every_method_stands_in_the_table():
    table = README.split("## Methods")[1].split("## ")[0]
    assert all(f"`{name}`" in table for name in methods())


def test_every_method_and_target_of_conversion_stands_in_its_page():
    from expertsmith.conversion.settings import WAYS

    table = (ROOT / "docs" / "dense-models.md").read_text(encoding="utf-8").split("## Methods")[1].split("## ")[0]
    assert all(f"`{name}`" in table for name in WAYS)


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    """Names of commands, options and words are checked; nothing runs."""
    import typer

    from expertsmith.cli import app

    group = typer.main.get_command(app)
    _, name, *arguments = shlex.split(line)
    command = group.commands[name]
    context = command.make_context(name, arguments)
    assert context.params


def test_there_are_commands_to_check():
    assert len(commands()) >= 40


@pytest.mark.parametrize(("page", "code"), [pytest.param(page, code, id=page) for page, code in blocks("python")])
def test_python_imports_and_calls_fit(page, code):
    """What is imported from expertsmith is there, and calls of it fit the signatures."""
    import expertsmith

    names = {"expertsmith": expertsmith}
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("expertsmith"):
            names |= {alias.name: getattr(importlib.import_module(node.module), alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        path = ast.unparse(node.func).split(".")
        if path[0] not in names:
            continue
        function = names[path[0]]
        for name in path[1:]:
            function = getattr(function, name)
        inspect.signature(function).bind(*node.args, **{keyword.arg: keyword.value for keyword in node.keywords})


def test_verbs_stay_functions_when_modules_of_the_same_name_are_imported():
    code = "import expertsmith, expertsmith.planning.plan, expertsmith.lint, expertsmith.verbs.plan; print(all(callable(getattr(expertsmith, name)) for name in expertsmith._API))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_json_in_the_pages_is_json():
    found = [json.loads(block) for _, block in blocks("json")]
    plans = [entry for entry in found if entry.get("format") == plan_format.FORMAT]
    assert [entry["version"] for entry in plans] == [1]
    made = plan_format.parse_plan(plans[0], "docs/plan.md")
    assert made.merges


@pytest.mark.parametrize(
    "kind", ["Plan", "Method", "Source", "CalibrationData", "LayerPlan", "Merge", "Neurons", "Novices", "Skip", "Summary"]
)
def test_the_plan_page_names_every_key(kind):
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {kind}\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    fields = getattr(plan_format, kind).model_fields
    assert re.findall(r"^\| `(\w+)`", section[1], re.M) == [entry.alias or name for name, entry in fields.items()]


def test_the_plan_page_knows_every_part_of_a_plan():
    kinds = {
        name
        for name, value in vars(plan_format).items()
        if inspect.isclass(value) and issubclass(value, plan_format._Strict) and value is not plan_format._Strict
    }
    assert kinds == {
        "Plan",
        "Method",
        "Source",
        "CalibrationData",
        "LayerPlan",
        "Merge",
        "Neurons",
        "Novices",
        "Skip",
        "Summary",
    }


def test_recipes_in_the_pages_are_valid(tmp_path):
    from expertsmith.verbs.recipe import load_recipe

    found = [block for _, block in blocks("yaml")]
    assert found
    for block in found:
        (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
        assert load_recipe(tmp_path / "recipe.yaml").model


def test_files_that_the_pages_name_are_there():
    """Links of README and CONTRIBUTING, and paths of this repository in code; links among the docs are checked when the site is built."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`((?:benchmarks|examples|recipes|scripts|tests)/[\w/]+\.(?:py|yaml))", text)
        if page not in DOCS:
            named += [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
        assert [name for name in named if not (ROOT / name).exists()] == [], page.name


def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("material", reason="the site needs pip install 'expertsmith[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert len(pages) == len(DOCS) + 1  # and 404.html
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?(https?:[^\s\"'>]+)", text)
        fetched += re.findall(r"<link[^>]*\srel=[\"']?(?:stylesheet|icon|preconnect)[^>]*href=[\"']?(https?:[^\s\"'>]+)", text)
        assert fetched == [], page.name


def test_makefile_has_the_two_commands():
    text = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", text, re.M)
    assert re.search(r"^test:", text, re.M)
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()


def test_the_project_speaks_of_itself_alone():
    """No machine paths in what is tracked."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".txt"):
            assert not re.search(r"(?<![\w.])/(?:root|home|Users)/", path.read_text(encoding="utf-8")), name


def tracked(*suffixes: str) -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in names if name.endswith(suffixes)]


def test_every_yaml_file_parses():
    files = tracked(".yml", ".yaml", ".cff")
    assert {ROOT / "CITATION.cff", ROOT / "mkdocs.yml"} <= set(files)
    for path in files:
        assert isinstance(yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader), dict | list), path.name


def test_the_citation_names_this_version():
    from expertsmith import __version__

    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_run_what_is_there(path):
    """Every step names an action or runs a make target, a file of this repository, or python."""
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    steps = [step for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values() for step in job["steps"]]
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    assert all("uses" in step or "run" in step for step in steps)
    for line in lines:
        program, *words = shlex.split(line)
        if program == "make":
            assert words
            assert set(words) <= set(targets), line
        else:
            assert program in ("python", "test") or (ROOT / program).is_file(), line


def test_the_image_is_made_of_files_that_are_there():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in line.split()]
    shown = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert sorted(copied) == sorted(shown)
    assert all((ROOT / name).exists() for name in copied)
