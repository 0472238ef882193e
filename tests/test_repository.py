"""What is committed: clean notebooks, small files, locks that still resolve."""

import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from helpers import machine
from helpers.runs import FOLDERS
from tests.conftest import PROJECT


def committed() -> list:
    if not shutil.which("git") or not (PROJECT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    return [PROJECT / n for n in names if n and (PROJECT / n).is_file()]


@pytest.mark.parametrize("name", ["00_quickstart", *FOLDERS.values()])
def test_notebooks_are_committed_without_outputs_and_with_short_cells(name):
    notebook = nbformat.read(PROJECT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)
    lines = [[line for line in c.source.splitlines() if not line.startswith("# @markdown")] for c in code]
    assert all(len(of_cell) <= 25 for of_cell in lines)  # the help lines of Colab's form are no code
    assert "widgets" not in notebook.metadata and notebook.metadata.kernelspec.name == "python3"


def test_badges_bootstrap_and_parameters_are_as_the_stamp_writes_them():
    done = subprocess.run([sys.executable, "ci/stamp.py", "--check"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_repository_and_tag_are_written_by_hand_in_one_place_only():
    owners = [
        p.relative_to(PROJECT).as_posix()
        for p in committed()
        if p.suffix in (".py", ".sh", ".yaml", ".yml", ".toml")
        and re.search(rf"{re.escape(machine.REPOSITORY)}\b", p.read_text(errors="ignore"))
    ]
    assert owners == ["helpers/machine.py"]


def test_no_file_is_over_two_mebibytes_and_none_was_downloaded():
    for path in committed():
        assert path.stat().st_size <= 2 << 20, path
        assert path.suffix not in (".gguf", ".safetensors", ".whl", ".so", ".bin", ".pt"), path


def test_no_package_named_datasets_hides_hugging_faces():
    assert not (PROJECT / "datasets" / "__init__.py").exists()
    code = "import importlib.util; print(importlib.util.find_spec('datasets').origin)"
    found = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    assert "site-packages" in found


@pytest.mark.parametrize("kind", ["cpu", "colab"])
def test_every_requirement_is_in_the_lock_at_its_pinned_version(kind):
    lock = {
        line.split("==")[0].lower(): line.split("==")[1].split(" ")[0]
        for line in (PROJECT / f"ci/locks/{kind}.txt").read_text().splitlines()
        if "==" in line
    }
    for line in (PROJECT / "requirements.txt").read_text().split("# Development")[0].splitlines():
        if not line or line.startswith("#") or "==" not in line or (kind == "cpu" and "[cuda]" in line):
            continue
        name, version = line.split("#")[0].strip().split("==")
        if kind == "cpu":
            assert lock[name.lower().replace("_", "-")] == version
        elif name.lower() in lock:
            assert lock[name.lower()] == version


def test_the_colab_lock_resolves_again_and_leaves_colabs_torch_numpy_and_widgets_alone():
    lock = (PROJECT / "ci/locks/colab.txt").read_text()
    for name in ("torch", "torchvision", "numpy", "ipykernel", "ipywidgets"):
        assert not re.search(rf"^{name}==", lock, re.M)
    done = subprocess.run(
        [sys.executable, "ci/lock.py", "--check", "colab"], cwd=PROJECT, capture_output=True, text=True
    )
    if "error sending request" in done.stderr or "Failed to fetch" in done.stderr:
        pytest.skip("no package index is reachable")
    assert done.returncode == 0, done.stdout + done.stderr
