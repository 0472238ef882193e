"""The notebooks themselves: all five through papermill on the real model, a run that is killed, and what people type wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from helpers import params, runs
from tests.conftest import PROJECT

SHORT = {"sft": {"max_steps": 6, "batch_size": 4, "save_steps": 3, "eval_steps": 3}, "orpo": {"max_steps": 3, "batch_size": 4, "eval_steps": 3},
         "gguf": {"quantizations": "q8_0"}, "eval": {"limit": 10}}


def command(root: Path, *arguments: str) -> list[str]:
    return [sys.executable, "ci/pipeline.py", *arguments]


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "TUNEBOOK_RUNS": str(root), "HF_HUB_OFFLINE": "1"}


def pipeline(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(root, *arguments), cwd=PROJECT, env=environment(root), capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A parameter file for a run of a few steps."""
    file = tmp_path_factory.mktemp("params") / "short.yaml"
    file.write_text(yaml.safe_dump(SHORT))
    return str(file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, short):
    """All five notebooks, run once for this module: the finished command and the folder of runs."""
    root = tmp_path_factory.mktemp("runs")
    return pipeline(root, "--run", "whole", "--params", short), root


def test_five_notebooks_end_in_a_table_of_scores_and_a_report(whole):
    done, root = whole
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tail = done.stdout[done.stdout.index("The run took"):]
    for contender in ("base", "sft", "orpo", "gguf q8_0"):
        assert re.search(rf"^{contender}\s+\d+\.\d%\s+\d+\.\d% – \d+\.\d%\s+\d+\.\d%\s+\d+", tail, re.M), tail
    report = Path(re.search(r"^Report: (.+)$", tail, re.M).group(1))
    page = report.read_text()
    assert len(page.encode()) < 3_000_000 and "<html" in page
    assert not re.search(r"""(?:src|href)=["']https?://[^"']+\.(?:js|css|png|woff2?)""", page)


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
    done = pipeline(whole[1], "--run", "whole", "--params", short)
    assert done.returncode == 0 and done.stdout.count("is done already") == len(runs.FOLDERS), done.stdout + done.stderr


def test_sft_killed_in_the_middle_goes_on_with_the_same_command(whole, short, monkeypatch):
    root = whole[1]
    monkeypatch.setenv("TUNEBOOK_RUNS", str(root))
    call = ["--run", "whole", "--params", short, "--to", "02", "-p", "sft.seed", "18", "-p", "sft.max_steps", "10"]
    process = subprocess.Popen(command(root, *call), cwd=PROJECT, env=environment(root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = runs.folder("whole", "sft")
    deadline = time.monotonic() + 240
    while not (_steps(folder) >= 4 and list((folder / "checkpoints").glob("checkpoint-*"))) or (folder / "manifest.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "manifest.json").exists()
    refused = pipeline(root, "--run", "whole", "--params", short, "--from", "03")
    assert refused.returncode != 0 and "02_qlora_sft" in refused.stderr and "Traceback" not in refused.stderr
    done = pipeline(root, *call)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Going on with the unfinished stage" in done.stdout
    manifest = runs.load("whole", "sft")
    assert manifest.data["resumed"] is True and _steps(folder) == 10


def _steps(folder: Path) -> int:
    """Highest optimizer step with a training loss in the stage's log."""
    try:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return 0
    return max((line["step"] for line in lines if "loss" in line), default=0)


@pytest.mark.parametrize(("arguments", "said"), [
    (["-p", "sft.rnk", "8"], "rnk.*rank"),
    (["-p", "sft.rank", "100000"], "rank.*100000.*256"),
    (["-p", "rank", "8"], "STAGE.NAME"),
    (["--params", "missing.yaml"], "missing.yaml"),
    (["--from", "07"], "07"),
    (["--from", "03"], "01_data_prep"),
])
def test_a_mistake_on_the_command_line_is_one_sentence_before_any_work(tmp_path, arguments, said):
    done = pipeline(tmp_path, "--run", "bad", *arguments)
    assert done.returncode == 1 and re.search(said, done.stderr) and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("bad/0*"))


@pytest.mark.parametrize(("arguments", "said"), [
    (["-p", "data.dataset", "nowhere/none.jsonl"], "none.jsonl"),
    (["-p", "data.model", "nobody/no-such-model"], "nobody/no-such-model"),
])
def test_a_mistake_found_in_a_notebook_is_one_sentence_and_leaves_no_manifest(tmp_path, arguments, said):
    done = pipeline(tmp_path, "--run", "bad", "--to", "01", *arguments)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("bad/*/manifest.json"))
    assert list(tmp_path.glob("bad/**/*.ipynb")), "the executed notebook is kept, failed as it is"


@pytest.mark.parametrize("file", sorted((PROJECT / "notebooks" / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_is_a_valid_set_of_its_stages_parameters(file):
    stage = file.name.split("_")[0]
    assert params.resolve(stage, yaml.safe_load(file.read_text()))


@pytest.mark.parametrize("name", ["cpu", "t4", "a100"])
def test_every_parameter_file_is_valid(name):
    from ci import pipeline as module
    module.resolve(PROJECT / "ci" / "params" / f"{name}.yaml", [], "r")
