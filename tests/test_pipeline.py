"""The notebooks themselves: all five through papermill on the real model, and the parameter sets with them."""

import json
import re
from pathlib import Path

import nbformat
import pytest
import short_run
import yaml

from helpers import params, runs
from tests.conftest import PROJECT


@pytest.fixture
def whole(whole_run):
    """All five notebooks, run once for all tests: the finished command and the folder of runs."""
    return whole_run


@pytest.fixture
def short(whole_run):
    """The recipe of that run."""
    return str(whole_run[1].parent / "short")


def test_five_notebooks_end_in_a_table_of_scores_and_a_report(whole):
    done, _ = whole
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tail = done.stdout[done.stdout.index("The run took") :]
    for candidate in ("base", "sft", "orpo", "gguf q8_0"):
        assert re.search(rf"^{candidate}\s+\d+\.\d %\s+\d+\.\d – \d+\.\d %\s+\d+\.\d %\s+\d+", tail, re.M), tail
    report = Path(re.search(r"^Report: (.+)$", tail, re.M).group(1))
    assert done.stdout.rstrip().endswith(report.resolve().as_uri()), "and the link is the last line"
    metrics = json.loads((report.parent / "05_evaluation" / "metrics.json").read_text())
    assert f"\n- {metrics['headline']}\n" in tail
    page = report.read_text()
    assert len(page.encode()) < 3_000_000 and "<html" in page
    assert not re.search(r"""(?:src|href)=["']https?://[^"']+\.(?:js|css|png|woff2?)""", page)


def test_the_terminal_shows_about_forty_lines_and_the_log_shows_everything(whole):
    done, root = whole
    assert len(done.stdout.splitlines()) <= 55, done.stdout
    log = (root / "whole" / "log.txt").read_text()
    for text, what in ((done.stdout, "terminal"), (log, "log")):
        assert "Passed unknown parameter" not in text and not re.search(r"\d+it/s|\d+s/it", text), what
    assert all(f"[{name}] finished in" in done.stdout for name in runs.FOLDERS.values())
    assert "left of the whole run" in done.stdout and "SELECT" in log and "SELECT" not in done.stdout
    assert not re.search(r"^\s*\(['\"0-9]", done.stdout, re.M), "no raw tuple"


def test_executed_copies_hold_no_snapshots_of_progress_and_fold_what_was_not_changed(whole):
    for name in runs.FOLDERS.values():
        notebook = nbformat.read(whole[1] / "whole" / name / "executed.ipynb", as_version=4)
        outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
        printed = "".join(o.text for o in outputs if o.output_type == "stream")
        assert not re.search(r"\d+%\||it/s|step \d+ of \d+", printed), (name, printed)
        shown = next(o.data["text/html"] for o in outputs if "text/html" in o.get("data", {}))
        before, _, folded = shown.partition("<details>")
        assert "default" in before and folded.count("<tr>") > before.count("<tr>")
        for image in (o for o in outputs if "image/png" in o.get("data", {})):
            assert image.metadata["image/png"]["alt"]
        assert all(
            "alt='" in tag for o in outputs for tag in re.findall("<img[^>]*>", o.get("data", {}).get("text/html", ""))
        )


@pytest.mark.parametrize("stage", runs.FOLDERS)
def test_each_stage_leaves_its_parameters_metrics_executed_notebook_and_manifest(whole, stage, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_RUNS", str(whole[1]))
    manifest = runs.load("whole", stage)
    assert yaml.safe_load((manifest.path / "params.yaml").read_text()) == manifest.params
    assert json.loads((manifest.path / "metrics.json").read_text()) == manifest.metrics
    notebook = nbformat.read(manifest.path / "executed.ipynb", as_version=4)
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code" and c.source)
    assert not [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert (manifest.path / "executed.ipynb").stat().st_size < 4_000_000
    for parent, known in manifest.data["parents"].items():
        assert runs.load("whole", parent).sha256 == known["manifest_sha256"]
    assert manifest.data["template_hash"] and manifest.data["model"]["name"] == params.find("data", "model").default


def test_the_same_command_again_uses_what_is_done(whole, short):
    done = short_run.pipeline(whole[1], "--run", "whole", "--recipe", short)
    assert done.returncode == 0 and done.stdout.count("is done already") == len(runs.FOLDERS), done.stdout + done.stderr


RECIPES = sorted(folder for place in ("notebooks/recipes", "ci/params") for folder in PROJECT.glob(f"{place}/*/"))


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_every_recipe_is_a_folder_of_flat_files_that_begin_with_what_they_are(folder):
    assert params.recipe(folder) and all(file.suffix == ".yaml" for file in folder.iterdir())
    first = next(folder / f"{stage}.yaml" for stage in runs.FOLDERS if (folder / f"{stage}.yaml").is_file())
    assert first.read_text().startswith("# ")


def test_the_benchmark_reads_every_figure_out_of_a_run(whole, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_RUNS", str(whole[1]))
    from ci import bench

    lines = bench.figures("whole")
    assert all(isinstance(line["value"], (int, float)) for line in lines), lines
    assert {"sft training", "orpo training", "evaluation", "export", "peak memory", "wall time"} == {
        line["figure"] for line in lines
    }
    assert "q8_0" in [line.get("step") for line in lines]
