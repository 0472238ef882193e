"""notebooks/00_quickstart.ipynb: the same stages as by five notebooks, in one kernel."""

import nbformat
import papermill
import pytest
import yaml

from ci import quickstart
from helpers import params, runs
from helpers.errors import TunebookError
from tests.conftest import PROJECT

NOTEBOOK = PROJECT / "notebooks" / "00_quickstart.ipynb"


def execute(tmp_path, monkeypatch, root, **given):
    """The executed notebook."""
    monkeypatch.setenv("TUNEBOOK_RUNS", str(root))
    monkeypatch.setenv("TUNEBOOK_HEADLESS", "1")
    quiet = ["--IPKernelApp.log_level=40"]
    return papermill.execute_notebook(
        NOTEBOOK, tmp_path / "out.ipynb", given, cwd=PROJECT, progress_bar=False, extra_arguments=quiet
    )


def shown(notebook, call):
    """What the cell with this call printed and showed."""
    (cell,) = (c for c in notebook.cells if c.cell_type == "code" and call in c.source)
    return "\n".join(o.get("text") or o.data["text/plain"] for o in cell.outputs)


def test_a_run_of_five_notebooks_is_finished_work_for_the_quickstart(whole_run, tmp_path, monkeypatch):
    """The parameters, parents and code are the same: there is no second way to do a stage."""
    root = whole_run[1]
    before = {stage: runs_file(root, stage) for stage in runs.FOLDERS}
    notebook = execute(tmp_path, monkeypatch, root, run="whole", preset=str(root.parent / "short"))
    assert {stage: runs_file(root, stage) for stage in runs.FOLDERS} == before
    assert not list((root / "whole").glob("*.old-*"))
    lines = shown(notebook, "quick.work()").splitlines()
    assert [f"[{name}]" in "".join(lines) for name in runs.FOLDERS.values()] == [True] * 5
    assert "[whole] done in" in lines[-1]
    assert "base" in shown(notebook, "quick.verdict()")
    assert "serve" in shown(notebook, "quick.chat()")
    taken = shown(notebook, "quick.downloads()")
    assert "report.html" in taken and "model-q8_0.gguf" in taken and "Modelfile" in taken


def runs_file(root, stage):
    return (root / "whole" / runs.FOLDERS[stage] / "manifest.json").read_bytes()


def test_rows_become_a_verdict_in_one_kernel(tmp_path, monkeypatch, tiny_llama):
    preset = tmp_path / "tiny"
    preset.mkdir()
    stages = {
        "data": {"model": str(tiny_llama), "max_rows": 40},
        "sft": {"max_steps": 2, "batch_size": 2, "eval_rows": 2, "export_check": False},
        "eval": {"limit": 2, "max_new_tokens": 8, "general_text": "", "general_tasks": "", "general_chat": ""},
    }
    for stage, values in stages.items():
        (preset / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    notebook = execute(tmp_path, monkeypatch, tmp_path / "runs", run="quick", preset=str(preset))
    manifest = runs.load("quick", "eval")
    assert {s: c["n"] for s, c in manifest.metrics["candidates"].items()} == {"base": 2, "sft": 2}
    assert runs.stage("sft", params.resolve("sft", {"run": "quick", **stages["sft"]})).done
    assert "There is no file to talk to" in shown(notebook, "quick.chat()")
    assert "report.html" in shown(notebook, "quick.downloads()")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"modle": "x"}, "no parameter 'modle'; did you mean model"),
        ({"preset": "no-such"}, "There is no recipe 'no-such'"),
        ({"preset": "quick-look"}, "has no data, sft"),
        ({"run": "../x"}, "cannot name a folder"),
    ],
)
def test_a_wrong_value_stops_before_any_work(given, said, runs_root):
    with pytest.raises(TunebookError, match=said):
        quickstart.start(given)
    assert not runs_root.exists()


def test_own_rows_leave_the_embedded_files_behind(runs_root):
    quick = quickstart.start({"preset": "cpu", "dataset": "mine.csv", "keep_runs_in": "this session"})
    data = quick.plan["data"]
    assert (data.dataset, data.test_dataset, data.preference_dataset, data.database) == ("mine.csv", "", "", "")


def test_the_form_of_the_notebook_is_what_the_quickstart_takes():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    (form,) = (c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    values = {}
    exec(form, values)
    assert {name: values[name] for name in quickstart.FORM} == quickstart.FORM
    assert form.count("# @param ") == len(quickstart.FORM) == form.count("# @markdown `")


def test_the_line_over_the_whole_says_the_stage_its_step_and_the_time_left(runs_root):
    plan = quickstart.start({"preset": "cpu", "run": "r"}).plan
    line = quickstart.Line(plan)
    log = runs.folder("r", "sft") / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 5, "of_steps": 10, "loss": 1.5, "left_s": 60}\n')
    line.start("sft", plan["sft"])
    line.over.wait(2.5)  # it is drawn every second
    assert "Supervised fine-tuning: step 5 of 10, loss 1.500" in line.view.value
    assert "left of the whole" in line.view.value and "<progress" in line.view.value
    line.end("finished")
    assert "[02_qlora_sft] finished in" in line.view.value and "value='1.000'" not in line.view.value
