"""Package layout: layers import only from themselves and lower ones; --help skips torch."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FLOORS = ("base", "step", "edge", "run")


def floor_of(module):
    """The layer of a module as a number; others (programs, the miniature) come last."""
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else len(FLOORS)


def imports(file):
    """The project's modules that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("minwurst"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minwurst"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_floors_import_only_from_those_before_them():
    for file in (ROOT / "minwurst").rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for imported in imports(file):
            assert floor_of(imported) <= floor_of(module), f"{module} imports {imported}"


@pytest.mark.parametrize("script", ["train.py", "lora.py"])
def test_help_needs_no_torch(script):
    code = f"""
import runpy, sys
sys.argv = ["{script}", "--help"]
try:
    runpy.run_path("{script}", run_name="__main__")
except SystemExit:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage: ") and done.stdout.endswith("False\n"), done.stderr
