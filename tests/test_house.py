"""Private parts of other libraries live behind one small file each, which says why and what would replace it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import expertsmith

ROOT = Path(expertsmith.__file__).parent
BEHIND = {
    r"\bgreenlet\b": "engine/pauses.py",
    r"\bctypes\b": "engine/pages.py",
    r"\bscipy(\.\w+)*\.(_\w+)|from scipy(\.\w+)* import _": "methods/counting.py",
    r"core_model_loading|conversion_mapping|LoadStateDictConfig|_get_model_class|_grouped_linear|_get_dtype_plan": "engine/stock.py",
}


@pytest.mark.parametrize(("pattern", "file"), BEHIND.items())
def test_one_file_each(pattern, file):
    users = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if re.search(pattern, code_of(path))}
    assert users == {file}
    text = (ROOT / file).read_text()
    reason = " ".join((ast.get_docstring(ast.parse(text)) or "").lower().split())
    assert "replace" in reason, "the file says what would replace it"
    assert "because" in reason or "why:" in reason
    assert len(text.splitlines()) < 180


def code_of(path: Path) -> str:
    """A file without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def test_the_root_holds_rooms():
    root = Path(__file__).parent.parent / "src" / "expertsmith"
    assert {path.name for path in root.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py"}
    rooms = {path.parent.name for path in root.glob("*/__init__.py")}
    described = (root.parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The rooms")[1].split("```")[1]
    assert {room for room in rooms if f"  {room}/" not in described} == set()
