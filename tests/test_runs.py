"""Run folders: what is finished, what is refused, what goes on."""

import errno
import json
import os
import subprocess
import sys

import pytest

from helpers import params, runs
from helpers.errors import TunebookError
from tests.conftest import PROJECT


def finish(stage, run="r", template=None, **given):
    opened = runs.open_stage(stage, params.resolve(stage, {"run": run, **given}))
    runs.write_atomic(opened.path / "result.txt", f"{stage} {given}")
    return opened.finish({"score": 1}, template_hash=template)


def test_a_finished_stage_lists_every_file_with_its_hash_and_names_its_parents(runs_root):
    data = finish("data", template="t1")
    sft = finish("sft")
    assert sft.data["parents"] == {"data": {"folder": "01_data_prep", "manifest_sha256": data.sha256}}
    assert sft.data["artifacts"]["result.txt"]["sha256"] == runs.sha256_file(sft.path / "result.txt")
    assert sft.data["template_hash"] == "t1"
    assert {"wall_s", "peak_memory_gib", "versions", "code_revision", "params", "metrics"} <= set(sft.data)
    assert runs.load("r", "sft").metrics == {"score": 1}


def test_a_stage_before_its_parent_says_what_to_run(runs_root):
    with pytest.raises(TunebookError, match="01_data_prep"):
        finish("sft")
    assert not (runs_root / "r" / "02_qlora_sft").exists()


@pytest.mark.parametrize("harm", ["alter", "delete", "manifest", "unfinished"])
def test_a_parent_that_is_altered_damaged_or_unfinished_is_refused(runs_root, harm):
    folder = finish("data").path
    {
        "alter": lambda: (folder / "result.txt").write_text("data {!}"),
        "delete": lambda: (folder / "result.txt").unlink(),
        "manifest": lambda: (folder / "manifest.json").write_text("{"),
        "unfinished": lambda: (folder / "manifest.json").unlink(),
    }[harm]()
    with pytest.raises(TunebookError, match="01"):
        finish("sft")


def test_a_stage_made_from_an_earlier_parent_is_refused(runs_root):
    finish("data")
    finish("sft")
    finish("data", max_length=256)
    with pytest.raises(TunebookError, match="02_qlora_sft"):
        finish("gguf")


def test_another_chat_template_in_between_is_refused(runs_root):
    finish("data", template="one")
    finish("sft", template="two")
    with pytest.raises(TunebookError, match="chat template"):
        finish("gguf")


def test_an_unfinished_stage_goes_on_only_with_the_same_parameters(runs_root, capsys):
    first = runs.open_stage("data", params.resolve("data", {"run": "r"}))
    (first.path / "half.txt").write_text("half")
    again = runs.open_stage("data", params.resolve("data", {"run": "r"}))
    assert again.resumed and (again.path / "half.txt").exists()
    other = runs.open_stage("data", params.resolve("data", {"run": "r", "max_length": 128}))
    assert not other.resumed and not (other.path / "half.txt").exists()
    assert (other.path.with_name("01_data_prep.old-1") / "half.txt").exists()
    assert "old-1" in capsys.readouterr().out


def test_a_rerun_keeps_the_finished_folder_aside(runs_root):
    finish("data")
    finish("data", max_length=256)
    assert (runs_root / "r" / "01_data_prep.old-1" / "manifest.json").exists()


def test_is_done_only_with_the_same_parameters_parents_and_files(runs_root):
    finish("data")
    same, other = params.resolve("data", {"run": "r"}), params.resolve("data", {"run": "r", "max_length": 64})
    assert runs.is_done("data", same) and not runs.is_done("data", other)
    finish("sft")
    assert runs.is_done("sft", params.resolve("sft", {"run": "r"}))
    finish("data", max_length=256)
    assert not runs.is_done("sft", params.resolve("sft", {"run": "r"}))


def test_two_processes_cannot_work_on_one_stage(runs_root):
    runs.open_stage("data", params.resolve("data", {"run": "r"}))
    code = "from helpers import params, runs; runs.open_stage('data', params.resolve('data', {'run': 'r'}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env={**os.environ, "TUNEBOOK_RUNS": str(runs_root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and f"process {os.getpid()}" in done.stderr
    runs.unlock("r", "data")


def test_a_score_that_is_no_number_leaves_no_manifest(runs_root):
    opened = runs.open_stage("data", params.resolve("data", {"run": "r"}))
    with pytest.raises(ValueError):
        opened.finish({"loss": float("nan")})
    assert not (opened.path / "manifest.json").exists() and not (opened.path / "metrics.json").exists()


def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(tmp_path):
    """A real full disk: /dev/full answers every write with ENOSPC."""
    error = None
    try:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    except OSError as caught:
        error = caught
    assert error.errno == errno.ENOSPC
    assert "No space left" in str(runs.disk_error(error, tmp_path / "x"))


def test_a_write_that_fails_leaves_nothing_half_written(tmp_path):
    target = tmp_path / "a.json"
    runs.write_json(target, {"a": 1})
    with pytest.raises(ValueError):
        runs.write_json(target, {"a": float("inf")})
    assert json.loads(target.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden", "x" * 100])
def test_a_run_name_cannot_leave_the_runs_folder(name, runs_root):
    with pytest.raises(TunebookError, match="run name"):
        runs.folder(name, "data")
