"""The examples run, and every public name is documented and has its types."""

from __future__ import annotations

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import ckpt_engine
from ckpt_engine import _native

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(name: str) -> str:
    command = [sys.executable, EXAMPLES / name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_process_sends_two_versions():
    assert "version 2: 3 tensors, active" in run("in_process.py")


def test_grpo_learns():
    pytest.importorskip("torch")
    assert "step 60: reward" in run("grpo_torch.py")


def test_every_public_name_is_documented():
    for name in ckpt_engine.__all__:
        thing = getattr(ckpt_engine, name)
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing) and thing.__module__.startswith("ckpt_engine"):
            for member, value in vars(thing).items():
                if not member.startswith("_") and callable(value):
                    assert inspect.getdoc(value), f"{name}.{member}"


def test_the_stubs_of_the_native_module_have_what_it_has_and_no_more():
    stub = pathlib.Path(ckpt_engine.__file__).with_name("_native.pyi").read_text()
    named = {}
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ClassDef):
            named[node.name] = {
                each.name for each in node.body if isinstance(each, ast.FunctionDef)
            } - {"__new__"}
        elif isinstance(node, ast.FunctionDef):
            named[node.name] = None
    there = {name for name in vars(_native) if not name.startswith("_")}
    assert set(named) == there
    for name, members in named.items():
        if members is not None:
            own = vars(getattr(_native, name))
            protocol = {"__dlpack__", "__dlpack_device__", "__array_interface__"}
            assert members == {m for m in own if not m.startswith("_") or m in protocol}, name
