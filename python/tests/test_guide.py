"""The Python code that README and the guide show: it is Python, and what it uses of the package is there."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import ckpt_engine

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Modules for what they plug into, which is not installed here: their files are read instead.
SUBMODULES = {path.stem for path in Path(ckpt_engine.__file__).parent.glob("*.py")}


def blocks() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for part in page.read_text().split("```python\n")[1:]:
            code = part.split("```")[0]
            if "{{#include" not in code:
                found.append((page.name, inspect.cleandoc(code)))
    return found


def chain(node: ast.expr) -> list[str]:
    """``a.b.c`` as its names; nothing for other expressions."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (names := chain(node.value)):
        return [*names, node.attr]
    return []


def is_there(names: list[str]) -> bool:
    """Whether the package has this name, in itself or in one of its modules."""
    # Also of one that another test has imported: it imports what it plugs into when it is asked for a class.
    if len(names) > 1 and names[1] in SUBMODULES:
        source = (Path(ckpt_engine.__file__).parent / f"{names[1]}.py").read_text()
        return len(names) < 3 or names[2] in {
            node.name for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        }
    thing: object = ckpt_engine
    for name in names[1:]:
        if not hasattr(thing, name):
            return False
        thing = getattr(thing, name)
    return True


@pytest.mark.parametrize(("page", "code"), blocks())
def test_code_of_a_page_uses_what_the_package_has(page: str, code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        names = chain(node) if isinstance(node, ast.Attribute) else []
        if names[:1] == ["ckpt_engine"]:
            assert is_there(names), f"{page}: there is no {'.'.join(names)}"


def test_the_pages_have_code() -> None:
    assert len(blocks()) > 5
