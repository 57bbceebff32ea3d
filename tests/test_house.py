"""The house: no circles, and rooms that do not know each other."""

from __future__ import annotations

import subprocess
import sys

import house
import pytest


def test_no_circle_of_imports():
    assert house.circle(house.imports()) == []


def test_a_circle_is_found():
    assert house.circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]


@pytest.mark.parametrize("room", ["rivals", "clean", "report"])
def test_the_core_knows_neither_rivals_nor_clean_data_nor_pages(room):
    doors = ("diffem.cli", "diffem.rivals", "diffem.clean", "diffem.report")
    for name, wanted in house.imports().items():
        if not name.startswith(doors):
            assert not [w for w in wanted if w.startswith(f"diffem.{room}")], name


def test_imports_in_functions_count():
    assert "diffem.rivals" in house.imports()["diffem.cli"]


def test_no_class_is_longer_than_a_person_reads():
    lines, name = house.longest()
    assert lines <= house.LONGEST, name


HEAVY = ("torch", "numpy", "matplotlib", "scipy", "sklearn", "azula", "jinja2", "PIL")


@pytest.mark.parametrize("code", ["import diffem", "import diffem.cli; diffem.cli.main(['--help'])"])
def test_invariant_9_import_and_help_load_nothing_heavy(code):
    script = f"""
import sys
try:
    {code}
except SystemExit:
    pass
print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stderr == "[]\n"


def test_invariant_7_plain_python_needs_no_process_group():
    code = "import diffem, torch; diffem.DiffEM; print(torch.distributed.is_available() and torch.distributed.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"
