"""Every cell and every notebook may be run twice: the same results, nothing doubled, nothing set aside.

One kernel a notebook: the first half of its cells, then all of them with each run twice, then all of them once more.
"""

import json
import re

import nbclient
import nbformat
import pandas as pd
import pytest
import short_run

from helpers import params, runs
from helpers.display import escape
from tests.conftest import PROJECT

CHANGES = {"seconds", "finished_at", "wall_s", "peak_memory_gib", "tokens_per_s", "cache"}


def cells_of(stage, given):
    """The notebook's cells with `given` set after the parameters cell, as papermill does it."""
    notebook = nbformat.read(PROJECT / "notebooks" / f"{runs.FOLDERS[stage]}.ipynb", as_version=4)
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    at = next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
    cells.insert(at + 1, nbformat.v4.new_code_cell("\n".join(f"{n} = {v!r}" for n, v in given.items())))
    return notebook, cells


def copy(cell):
    return nbformat.v4.new_code_cell(cell.source)


def shown(cell):
    """What a cell's last line showed: its HTML, the word image for a picture, or its text."""
    texts = []
    for data in (o.data for o in cell.outputs if o.output_type == "execute_result"):
        text = data.get("text/html", f"<pre>{escape(data['text/plain'])}</pre>")
        # A look before the work says what is free on the machine just now.
        text = re.sub(r"[\d.,]+", "", text) if ".open(" in cell.source else text
        texts.append("image" if "image/png" in data else text)
    return texts


def execute(stage, given):
    """Run the notebook as the docstring says: (cells of each pass, outputs included)."""
    notebook, cells = cells_of(stage, given)
    half = [copy(c) for c in cells[: len(cells) // 2 + 1]]
    first, second, third = ([copy(c) for c in cells] for _ in range(3))
    doubled = [c for pair in zip(first, second, strict=True) for c in pair]
    notebook.cells = [*half, *doubled, *third]
    run(notebook)
    return first, second, third


def run(notebook):
    place = {"metadata": {"path": str(PROJECT)}}
    quiet = ["--IPKernelApp.log_level=40"]
    nbclient.NotebookClient(notebook, kernel_name="python3", resources=place, extra_arguments=quiet).execute()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of runs, for the kernels too."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEBOOK_RUNS", str(folder))
        patch.setenv("TUNEBOOK_HEADLESS", "1")
        yield folder


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_llama):
    """The short run's parameters, on a small random model: what it says does not matter here."""
    recipe = params.recipe(short_run.parameters(tmp_path_factory.mktemp("params")))
    stages = {stage: chosen.changed() for stage, chosen in recipe.items()}
    stages["data"] |= {"model": str(tiny_llama)}
    stages["gguf"] |= {"fidelity_gates": False}
    return stages


@pytest.mark.parametrize("stage", runs.FOLDERS)
def test_cells_and_notebooks_run_twice_with_the_same_result(stage, root, given):
    for parent in runs.PARENTS[stage]:
        if not (runs.folder("twice", parent.rstrip("?")) / "manifest.json").is_file():
            pytest.skip(f"{parent} did not finish")
    first, second, third = execute(stage, {"run": "twice", **given.get(stage, {})})
    for one, two, again in zip(first, second, third, strict=True):
        assert shown(two) == shown(one) and shown(again) == shown(one), (one.source, *map(shown, (one, two, again)))
    assert not list((root / "twice").glob("*.old-*"))
    manifest = runs.load("twice", stage)
    assert runs.stage(stage, params.resolve(stage, manifest.params)).done
    {"data": once_data, "sft": once_trained, "orpo": once_trained, "gguf": once_exported, "eval": once_asked}[stage](
        manifest, given.get(stage, {})
    )


def steady(value):
    """A metric without what differs from run to run."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in CHANGES and not k.endswith("_s")}
    return value


def once_data(manifest, given):
    """The same rows and counts as of a notebook that is run once."""
    notebook, cells = cells_of("data", {"run": "once", **given})
    notebook.cells = cells
    run(notebook)
    once = runs.load("once", "data")
    assert steady(manifest.metrics) == steady(once.metrics)
    assert set(manifest.data["artifacts"]) == set(once.data["artifacts"])
    for name in ("train.parquet", "eval.parquet", "test.parquet"):
        assert pd.read_parquet(manifest.path / name).equals(pd.read_parquet(once.path / name))


def once_trained(manifest, given):
    """Every optimizer step once."""
    lines = [json.loads(line) for line in (manifest.path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, given["max_steps"] + 1))


def once_exported(manifest, given):
    """Every file once in the table."""
    files = json.loads((manifest.path / "fidelity.json").read_text())["files"]
    assert sorted(f["type"] for f in files) == sorted({f["type"] for f in files})


def once_asked(manifest, given):
    """Every question counted once."""
    assert {score["n"] for score in manifest.metrics["candidates"].values()} == {given["limit"]}
