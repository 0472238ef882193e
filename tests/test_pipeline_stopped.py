"""Runs that do not come to their end at once: killed in the middle, and what people type wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import short_run

from ci import pipeline, progress
from helpers import params, runs
from tests.conftest import begun


def test_sft_killed_in_the_middle_goes_on_with_the_same_command(runs_root, tmp_path):
    short = str(short_run.parameters(tmp_path))
    call = ["--run", "killed", "--recipe", short, "--to", "02", "-p", "sft.max_steps", "6"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        short_run.command(*call), cwd=short_run.PROJECT, env=short_run.environment(runs_root), **quiet
    )
    folder = runs.folder("killed", "sft")
    deadline = time.monotonic() + 1500  # of a machine with much else to do
    while (
        not (_steps(folder) >= 3 and list((folder / "checkpoints").glob("checkpoint-*")))
        or (folder / "manifest.json").exists()
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "manifest.json").exists()
    refused = short_run.pipeline(runs_root, "--run", "killed", "--recipe", short, "--from", "03")
    assert refused.returncode != 0 and "02_qlora_sft" in refused.stderr and "Traceback" not in refused.stderr
    done = short_run.pipeline(runs_root, *call)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Resuming the unfinished stage" in done.stdout
    manifest = runs.load("killed", "sft")
    assert manifest.data["resumed"] is True and _steps(folder) == 6


def _steps(folder: Path) -> int:
    """Highest optimizer step with a training loss in the stage's log."""
    try:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return 0
    return max((line["step"] for line in lines if "loss" in line), default=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "sft.rnk", "8"], "rnk.*rank"),
        (["-p", "sft.rank", "100000"], "rank.*100000.*512"),
        (["-p", "rank", "8"], "STAGE.NAME"),
        (["--recipe", "finetome-llama"], "finetome-llama"),
        (["--from", "07"], "07"),
        (["--from", "03"], "01_data_prep"),
        (["--from", "05", "--to", "01"], "in order"),
        (["--run", "../../x"], "run name '../../x'"),
        (["--run", "a/b"], "run name 'a/b'"),
        (["--run", "~nobody"], "run name"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence_before_any_work(runs_root, arguments, said, capsys):
    assert pipeline.main(["--run", "bad", *arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") <= 2
    assert not runs_root.exists() and not (runs_root.parent / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "data.dataset", "nowhere/none.jsonl"], "none.jsonl"),
        (["-p", "data.model", "nobody/no-such-model"], "nobody/no-such-model"),
    ],
)
def test_a_mistake_found_in_a_notebook_is_one_sentence_and_leaves_no_manifest(tmp_path, arguments, said):
    done = short_run.pipeline(tmp_path, "--run", "bad", "--to", "01", *arguments)
    assert done.returncode == 1 and said in done.stderr
    assert done.stderr.startswith("\nStopped: ") and done.stderr.count("\n") == 2, done.stderr
    assert "[01_data_prep]" in (tmp_path / "bad" / "log.txt").read_text()
    assert not list(tmp_path.glob("bad/*/manifest.json"))
    assert list(tmp_path.glob("bad/**/*.ipynb")), "the executed notebook is kept, failed as it is"


@pytest.mark.parametrize("first", ["01", "1", "data", "01_data_prep"])
def test_from_means_the_same_however_the_notebook_is_named(runs_root, first, monkeypatch, capsys):
    executed = []
    monkeypatch.setattr(pipeline, "execute", lambda stage, chosen, following: executed.append((stage, chosen.again)))
    monkeypatch.setattr(pipeline, "finished", lambda stage, chosen: None if chosen.again else Finished())
    assert pipeline.main(["--run", "r", "--recipe", "cpu", "--from", first, "--to", "02"]) == 0
    assert executed == [("data", True), ("sft", True)]
    assert pipeline.main(["--run", "r", "--recipe", "cpu", "--to", "02"]) == 0
    assert len(executed) == 2 and capsys.readouterr().out.count("is done already") == 2


class Finished:
    def __init__(self):
        self.data = {"finished_at": "today"}


def test_what_a_kernel_writes_to_its_standard_error_is_in_the_log_and_not_on_the_terminal(tmp_path, capfd):
    log = tmp_path / "log.txt"
    code = "import os; os.write(2, b'Traceback: Socket operation on non-socket')"
    with pytest.raises(KeyError), pipeline._stderr_into(log, "[01]"):
        subprocess.run([sys.executable, "-c", code], check=True)
        raise KeyError
    print("ours", file=sys.stderr)
    subprocess.run([sys.executable, "-c", "import os; os.write(2, b'after')"], check=True)
    assert "non-socket" in log.read_text() and capfd.readouterr().err == "ours\nafter"


BAD = [
    "rank: {a: 1\n",
    "- 1",
    "rank: 3\nrank: 4",
    "rnk: 3",
    "seed: 2026-99-99",
    "\xff",
    "[" * 3000,
    "seed: 1:30",
    "rank: [8]",
]
BAD += [
    "a: &a 1\nrank: *a",
    "rank: !!python/object/apply:os.mkdir [x]",
    "? [1]\n: 2",
    "rank: 1e999",
    f"rank: {'9' * 5000}",
]
BAD += [
    f"rank: 0x{'f' * 5000}",
    "#" * 300_000,
    "rank: 010",
    "rank: !!int x",
    "<<: {rank: 8}",
    "--- 1\n--- 2",
    "rank: \x00",
]


@pytest.mark.parametrize("text", BAD)
def test_a_recipe_with_a_bad_file_is_one_error_message_that_names_it(tmp_path, runs_root, text, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sft.yaml").write_bytes(text.encode("latin-1"))
    assert pipeline.main(["--recipe", str(tmp_path / "own")]) == 1
    error = capsys.readouterr().err
    assert "sft.yaml" in error and error.count("\n") == 2 and len(error) < 2000
    assert os.listdir(tmp_path) == ["own"]


@pytest.mark.parametrize("name", ["stf.yaml", "sft.yml", "sft_8b.yaml", ""])
def test_a_recipe_with_any_other_yaml_or_none_is_refused(tmp_path, runs_root, name, capsys):
    (tmp_path / name).touch(exist_ok=True)
    assert pipeline.main(["--recipe", str(tmp_path), "--run", "r"]) == 1
    error = capsys.readouterr().err
    assert (name or "none") in error and "sft.yaml" in error and not runs_root.exists()


@pytest.mark.parametrize("name", ["~nobody/x", "x" * 400, "a\0b", "ci/params/cpu/sft.yaml", "../recipes"])
def test_what_is_no_recipe_is_refused_by_name(name, runs_root, capsys):
    assert pipeline.main(["--recipe", name]) == 1
    assert name[:60].encode("unicode_escape").decode()[:2] in capsys.readouterr().err and not runs_root.exists()


def test_only_the_stages_of_a_recipe_run_and_the_run_is_called_like_it(tmp_path, runs_root, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    for stage in ("data", "orpo"):
        (tmp_path / "mine" / f"{stage}.yaml").write_text("seed: 3\n")
    executed = []
    took = lambda stage, chosen, following: executed.append((stage, chosen.run, chosen.seed))  # noqa: E731
    monkeypatch.setattr(pipeline, "execute", took)
    assert pipeline.main(["--recipe", str(tmp_path / "mine"), "-p", "orpo.seed", "4"]) == 0
    assert executed == [("data", "mine", 3), ("orpo", "mine", 4)]
    assert pipeline.main(["--recipe", str(tmp_path / "mine"), "-p", "sft.seed", "4"]) == 1
    assert "sft.seed" in capsys.readouterr().err


def finished_stages(run, *stages, **given):
    """Finished stages without any work; `files` of the data stage stand for what it wrote."""
    for stage in stages:
        opened = begun(stage, params.resolve(stage, {"run": run, **given}))
        runs.write_atomic(opened.path / "preference.parquet", stage)
        opened.finish({})


@pytest.fixture
def executed(monkeypatch):
    """What would be run."""
    stages = []
    monkeypatch.setattr(pipeline, "execute", lambda stage, chosen, following: stages.append(stage))
    monkeypatch.setattr(pipeline, "summary", lambda run: "")
    return stages


def test_from_asks_only_for_the_parents_that_are_needed(runs_root, executed, capsys):
    finished_stages("r", "data")
    assert pipeline.main(["--run", "r", "--recipe", "cpu", "--from", "04"]) == 0, "no adapter: the base is exported"
    assert pipeline.main(["--run", "r", "--recipe", "cpu", "--from", "05"]) == 0
    assert executed == ["gguf", "eval", "eval"]
    assert pipeline.main(["--run", "r", "--recipe", "cpu", "--from", "03", "--to", "03"]) == 1
    assert "02_qlora_sft" in capsys.readouterr().err
    assert (
        pipeline.main(["--run", "r", "--recipe", "cpu", "--from", "3", "--to", "3", "-p", "orpo.start_from", "base"])
        == 0
    )
    begun("sft", params.resolve("sft", {"run": "r"}))
    runs.unlock("r", "sft")
    assert pipeline.main(["--run", "r", "--recipe", "cpu", "--from", "04"]) == 1, (
        "half an adapter is not left out unsaid"
    )
    assert "'sft' of the run 'r' did not finish" in capsys.readouterr().err


def test_without_preference_pairs_03_is_a_line_and_an_earlier_result_of_it_is_set_aside(runs_root, executed, capsys):
    finished_stages("r", "data", "sft", "orpo")
    opened = begun("data", params.resolve("data", {"run": "r", "max_length": 64}))
    opened.finish({})
    assert pipeline.main(["--run", "r", "--recipe", "cpu", "--from", "02"]) == 0
    said = capsys.readouterr().out
    assert "[03_orpo_alignment] skipped: the data has no preference pairs" in said
    assert executed == ["sft", "gguf", "eval"] and (runs_root / "r" / "03_orpo_alignment.old-1").is_dir()


def test_a_terminal_gets_a_line_a_stage_and_the_time_left(runs_root, monkeypatch, capsys):
    chosen = {
        "sft": params.resolve("sft", {"run": "r", "max_minutes": 2}),
        "gguf": params.resolve("gguf", {"run": "r"}),
    }
    board = progress.Board(chosen)
    board.start("sft", chosen["sft"])
    share, left, _ = board.now()
    assert share < 0.05 and 150 < left < 400
    (runs.folder("r", "sft")).mkdir(parents=True)
    line = {"step": 30, "of_steps": 40, "loss": 0.5, "left_s": 60}
    (runs.folder("r", "sft") / "log.jsonl").write_text('{"step": 29}\n' + json.dumps(line) + '\n{"step": 3')
    share, left, doing = board.now()
    assert doing == "step 30 of 40, loss 0.500" and 100 < left < 300
    monkeypatch.setenv("COLUMNS", "80")
    board.live = True
    line = board._line(0.83, 1800, "step 107 of 130, loss 0.093")
    board.live = False
    assert len(line) < 80 and line.endswith("83 %; step 107 of 130, loss 0.093; 30 min left"), (
        "nothing is cut at 80 columns"
    )
    board.write("Resuming\x1b[2J from checkpoint-20.\n\none\ntwo\nthree\n")
    board.end("finished")
    said = capsys.readouterr().out
    assert "Resuming␛[2J" in said and "two" in said and "three" not in said and "log.txt" in said
    assert "[02_qlora_sft] max_minutes=2" in said and "[02_qlora_sft] finished in" in said
    assert "\r" not in said and "\x1b" not in said, "neither redrawn lines nor colours go into a file"
