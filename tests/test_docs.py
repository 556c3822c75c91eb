"""README and recipes say what the program does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from expertsmith.methods import methods

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every `expertsmith …` line in a code block, continued lines joined."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("#")[0].strip()
            if line.startswith("expertsmith "):
                found.append(line)
    return found


def test_the_list_of_families_is_up_to_date():
    subprocess.run([sys.executable, str(ROOT / "scripts" / "readme_families.py"), "--check"], check=True)


def test_every_method_stands_in_the_table():
    table = README.split("## Methods")[1].split("## ")[0]
    assert all(f"`{name}`" in table for name in methods())


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_readme_parse(line):
    """Names of commands, options and words are checked; nothing runs."""
    import typer

    from expertsmith.cli import app

    group = typer.main.get_command(app)
    _, name, *arguments = shlex.split(line)
    command = group.commands[name]
    context = command.make_context(name, arguments)
    assert context.params


def test_there_are_commands_to_check():
    assert len(commands()) >= 8


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
