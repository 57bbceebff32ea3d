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


OPTIONAL = (
    "deepinv",
    "tifffile",
    "astropy",
    "h5py",
    "nibabel",
    "pandas",
    "pyarrow",
    "zarr",
    "tensorboard",
    "huggingface_hub",
)
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


TINY_RUN = """
import diffem, numpy, sys, torch
y = numpy.random.default_rng(0).normal(size=(64, 3)).astype("float32")
sections = {"em": {"iterations": 1}, "m_step": {"first_steps": 2, "batch": 16}, "prior": {"steps": 1}}
run = diffem.DiffEM(diffem.config.from_dict(sections), diffem.Observations(y, diffem.GaussianNoise(0.1)), sys.argv[1])
rows = [*run.iterate()]
"""


def test_invariants_7_and_9_plain_python_needs_neither_a_process_group_nor_an_extra(tmp_path):
    shown = f"len(rows), torch.distributed.is_initialized(), [m for m in {OPTIONAL!r} if m in sys.modules]"
    code = f"{TINY_RUN}print({shown})"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "3 False []\n", done.stderr
