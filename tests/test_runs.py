"""Run folders: what is finished, what is refused, what goes on."""

import errno
import json
import os
import subprocess
import sys
import weakref

import pytest
import yaml

from helpers import machine, params, runs, steps
from helpers.errors import TunebookError
from tests.conftest import PROJECT, begun


def finish(stage, run="r", template=None, **given):
    opened = begun(stage, params.resolve(stage, {"run": run, **given}))
    runs.write_atomic(opened.path / "result.txt", f"{stage} {given}")
    return opened.finish({"score": 1}, template_hash=template)


def test_a_finished_stage_lists_every_file_with_its_hash_and_names_its_parents(runs_root):
    data = finish("data", template="t1")
    sft = finish("sft")
    assert sft.data["parents"] == {"data": {"folder": "01_data_prep", "manifest_sha256": data.sha256}}
    assert sft.data["artifacts"]["result.txt"]["sha256"] == runs.sha256_file(sft.path / "result.txt")
    assert sft.data["template_hash"] == "t1"
    recorded = {"wall_s", "peak_memory_gib", "versions", "code_revision", "code_hash", "params", "metrics"}
    assert recorded <= set(sft.data)
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
    first = begun("data", params.resolve("data", {"run": "r"}))
    (first.path / "half.txt").write_text("half")
    again = begun("data", params.resolve("data", {"run": "r"}))
    assert again.resumed and (again.path / "half.txt").exists()
    other = begun("data", params.resolve("data", {"run": "r", "max_length": 128}))
    assert not other.resumed and not (other.path / "half.txt").exists()
    assert (other.path.with_name("01_data_prep.old-1") / "half.txt").exists()
    assert "old-1" in capsys.readouterr().out


def test_a_rerun_keeps_the_finished_folder_aside(runs_root):
    finish("data")
    finish("data", max_length=256)
    assert (runs_root / "r" / "01_data_prep.old-1" / "manifest.json").exists()


def test_a_stage_is_done_only_with_the_same_parameters_parents_and_files(runs_root):
    finish("data")
    same, other = params.resolve("data", {"run": "r"}), params.resolve("data", {"run": "r", "max_length": 64})
    assert runs.stage("data", same).done and not runs.stage("data", other).done
    finish("sft")
    assert runs.stage("sft", params.resolve("sft", {"run": "r"})).done
    finish("data", max_length=256)
    assert not runs.stage("sft", params.resolve("sft", {"run": "r"})).done


def other_process(
    runs_root, code="from helpers import params; runs.stage('data', params.resolve('data', {'run': 'r'})).begin()"
):
    """Another process, one that opens the data stage: (exit status, error output)."""
    code = f"from helpers import runs; {code}"
    environment = {**os.environ, "TUNEBOOK_RUNS": str(runs_root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_two_processes_cannot_work_on_one_stage(runs_root):
    begun("data", params.resolve("data", {"run": "r"}))
    status, said = other_process(runs_root)
    assert status != 0 and f"process {os.getpid()}" in said
    runs.unlock("r", "data")


class Work(steps.Job):
    """Two steps of which the first fails as often as `failures` says."""

    failures = 0

    @steps.step
    def work(self):
        (self.stage.path / "result.txt").write_text("done")
        if self.failures:
            self.failures -= 1
            raise RuntimeError("failed")
        return "worked"

    @steps.step
    def finish(self):
        return self.stage.finish({"score": 1})


def work(**given):
    return Work(runs.stage("data", params.resolve("data", {"run": "r", **given})))


def test_a_failed_step_lets_go_of_the_lock_and_the_cell_can_be_run_again(runs_root):
    job = work()
    job.failures = 1
    with pytest.raises(RuntimeError):
        job.work()
    status, said = other_process(runs_root)
    assert status == 0, said
    assert job.work() == "worked"
    assert other_process(runs_root)[0] != 0
    assert job.finish().metrics == {"score": 1}


def test_a_failed_step_is_not_repeated_over_what_another_process_did_meanwhile(runs_root):
    job = work()
    job.failures = 1
    with pytest.raises(RuntimeError):
        job.work()
    work(max_length=64).work()
    runs.unlock("r", "data")
    with pytest.raises(TunebookError, match="first cell"):
        job.work()
    runs.unlock("r", "data")


def test_a_lock_that_the_disk_does_not_know_is_said_and_the_named_process_is_looked_for(runs_root, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    finish("data")
    assert "No locks available" in capsys.readouterr().out
    path = runs_root / "r" / ".locks" / "data"
    assert path.read_text() == ""
    path.write_text(f"{os.getppid()} {runs.socket.gethostname()}")
    with pytest.raises(TunebookError, match=f"process {os.getppid()}"):
        finish("data")
    path.write_text(f"999999999 {runs.socket.gethostname()}")
    assert finish("data")


def test_a_forked_child_does_not_keep_a_dead_owners_lock(runs_root):
    code = (
        "import multiprocessing, os, signal, time; from helpers import params, runs; "
        "runs.stage('data', params.resolve('data', {'run': 'r'})).begin(); "
        "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(20,)); child.start(); "
        "print(child.pid, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "TUNEBOOK_RUNS": str(runs_root)}
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, env=environment, stdout=subprocess.PIPE)
    child = int(owner.stdout.readline())
    owner.wait()
    os.kill(child, 0)  # it still works
    assert other_process(runs_root)[0] == 0
    os.kill(child, 9)
    owner.stdout.close()


def test_a_parameter_changed_after_the_stage_was_opened_is_refused_before_any_work(runs_root):
    values = params.resolve("data", {"run": "r"})
    job = Work(runs.stage("data", values))
    values.max_length = 64
    with pytest.raises(TunebookError, match="max_length changed"):
        job.work()
    assert not runs_root.exists()
    job = Work(runs.stage("data", values))
    job.work()
    with pytest.raises(TunebookError, match="max_length cannot be changed"):
        values.max_length = 128
    runs.unlock("r", "data")


def test_a_finished_stage_is_shown_from_disk_and_again_runs_it_anew(runs_root):
    work().work()
    first = work()
    first.work()
    made = first.finish()
    shown = work()
    shown.failures = 1
    assert repr(shown.work()) == "'worked'" and shown.finish().sha256 == made.sha256
    assert [p.name for p in (runs_root / "r").iterdir() if p.name != ".locks"] == ["01_data_prep"]
    anew = work(again=True)
    anew.work()
    anew.finish()
    assert (runs_root / "r" / "01_data_prep.old-1" / "manifest.json").exists()
    assert (
        runs.load("r", "data").params == made.params and runs.stage("data", params.resolve("data", {"run": "r"})).done
    )


@pytest.fixture
def watched(monkeypatch):
    """As in a notebook that a person runs."""
    monkeypatch.setattr(machine, "interactive", lambda: True)


def test_what_a_recipe_made_is_shown_in_a_notebook_that_leaves_its_parameters_at_their_defaults(
    runs_root, watched, capsys
):
    made = finish("data", max_length=256, seed=3)
    job = work(seed=3)
    told = capsys.readouterr().out
    assert job.stage.done.sha256 == made.sha256 and job.finish().sha256 == made.sha256
    assert "01_data_prep: done at " in told and "shown from disk; `again = True`" in told
    assert "max_length = 256" in told and "seed" not in told
    job.params = job.stage.params
    job.params.max_length = 1024
    job._results["work"] = "shown"
    assert job.work() == "shown" and "max_length changed (512 → 1024)" in capsys.readouterr().out
    assert not work(seed=4).stage.done and not work(seed=3, again=True).stage.done, "asked for, so it is work"
    assert not list((runs_root / "r").glob("*.old-*")), "and looking sets nothing aside"


def test_a_notebook_without_a_reader_works_with_its_own_parameters(runs_root):
    finish("data", max_length=256)
    assert not work().stage.done


def test_an_edit_of_the_code_does_not_hide_what_is_finished_from_a_reader(runs_root, watched, monkeypatch, capsys):
    finish("data")
    monkeypatch.setattr(machine, "code_hash", lambda notebook="": "another edit")
    assert work().stage.done and "earlier version of the code" in capsys.readouterr().out


def test_a_finished_stage_with_other_parents_is_not_shown(runs_root, watched):
    finish("data")
    finish("sft")
    finish("data", max_length=256)
    assert not runs.stage("sft", params.resolve("sft", {"run": "r"})).done


def test_manifest_and_params_yaml_hold_what_was_used_whatever_is_moved_later(runs_root):
    values = params.resolve("data", {"run": "r", "max_length": 512})
    job = Work(runs.stage("data", values))
    job.work()
    with pytest.raises(TunebookError, match="max_length cannot be changed"):
        values.max_length = 2048
    object.__setattr__(values, "max_length", 2048)  # even so
    job._results["finish"] = job.stage.finish({})
    made = job._results["finish"]
    assert made.params["max_length"] == yaml.safe_load((made.path / "params.yaml").read_text())["max_length"] == 512


def test_a_step_that_is_stopped_says_so_in_one_line_and_lets_go_of_the_lock_and_of_what_it_held(runs_root):
    class Held:
        pass

    class Stops(Work):
        @steps.step
        def work(self):
            model = Held()
            self.seen = weakref.ref(model)
            raise KeyboardInterrupt

    job = Stops(runs.stage("data", params.resolve("data", {"run": "r"})))
    with pytest.raises(TunebookError, match=r"Stopped in work\(\); run the cell again") as caught:
        job.work()
    assert len(caught.value._render_traceback_()) == 1 and job.seen() is None
    assert other_process(runs_root)[0] == 0


def test_another_edit_of_the_code_is_another_stage_and_a_commit_of_a_readme_is_not(runs_root, monkeypatch):
    finish("data")
    same = params.resolve("data", {"run": "r"})
    monkeypatch.setattr(machine, "revision", lambda: "another commit")
    assert runs.stage("data", same).done
    monkeypatch.setattr(machine, "code_hash", lambda notebook="": "another edit")
    assert not runs.stage("data", same).done


def test_a_score_that_is_no_number_leaves_no_manifest(runs_root):
    opened = begun("data", params.resolve("data", {"run": "r"}))
    with pytest.raises(ValueError):
        opened.finish({"loss": float("nan")})
    assert not (opened.path / "manifest.json").exists() and not (opened.path / "metrics.json").exists()


def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(tmp_path):
    """A real full disk: /dev/full answers every write with ENOSPC."""
    with (
        pytest.raises(TunebookError, match="No space left"),
        runs.writing(tmp_path / "x"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")


def test_a_write_that_fails_leaves_nothing_half_written(tmp_path):
    target = tmp_path / "a.json"
    runs.write_json(target, {"a": 1})
    with pytest.raises(ValueError):
        runs.write_json(target, {"a": float("inf")})
    assert json.loads(target.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_how_long_it_took_does_not_follow_a_clock_that_is_set_back(runs_root, monkeypatch):
    opened = begun("data", params.resolve("data", {"run": "r"}))
    monkeypatch.setattr(runs.time, "time", lambda: 0.0)
    assert 0 <= opened.finish({}).data["wall_s"] < 60


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden", "x" * 100])
def test_a_run_name_cannot_leave_the_runs_folder(name, runs_root):
    for call in (runs.folder, runs.load, runs.unlock):
        with pytest.raises(TunebookError, match="run name"):
            call(name, "data")
    with pytest.raises(TunebookError, match="run name"):
        finish("data", run=name)
    assert not runs_root.exists()
