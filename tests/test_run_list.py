"""`tunebook runs`: what is listed, what comes back, what is removed, and only when it was meant."""

import io
import sys

import pytest

from helpers import __main__ as command_line
from helpers import params, runs
from tests.conftest import begun
from tests.test_runs import finish, other_process


def tunebook(capsys, *arguments):
    """(status, output, error output) of `tunebook runs …`."""
    status = command_line.main(["runs", *arguments])
    return (status, *capsys.readouterr())


@pytest.fixture
def twice(runs_root, capsys):
    """A run whose stage 01 was done twice with different parameters, with 02 on the first."""
    finish("data")
    finish("sft")
    finish("data", max_length=256)
    capsys.readouterr()
    return runs_root


def test_every_stage_folder_is_listed_with_its_state(twice, capsys):
    finish("data", run="other")
    capsys.readouterr()
    begun("data", params.resolve("data", {"run": "half"}))
    status, said, _ = tunebook(capsys)
    lines = {line.split()[0]: line for line in said.splitlines() if "/" in line.split(" ")[0]}
    assert status == 0 and set(lines) == {
        *("half/01_data_prep", "other/01_data_prep"),
        *("r/01_data_prep", "r/01_data_prep.old-1", "r/02_qlora_sft"),
    }
    assert "unfinished" in lines["half/01_data_prep"] and "set aside, finished" in lines["r/01_data_prep.old-1"]
    assert "from an earlier 01_data_prep" in lines["r/02_qlora_sft"] and "earlier" not in lines["r/01_data_prep"]
    runs.unlock("half", "data")
    assert "half/" in tunebook(capsys, "list", "half")[1] and "half" not in tunebook(capsys, "list", "r")[1]


def test_a_folder_set_aside_comes_back_and_what_stood_there_is_kept(twice, capsys):
    status, said, _ = tunebook(capsys, "restore", "r/01_data_prep.old-1")
    assert status == 0 and "01_data_prep.old-1 is" in said
    assert runs.load("r", "data").params["max_length"] == 512
    assert runs.stage("sft", params.resolve("sft", {"run": "r"})).done, "its parent is the one it was made from again"
    kept = twice / "r" / "01_data_prep.old-2"
    assert "256" in (kept / "params.yaml").read_text()


def test_only_what_was_meant_is_removed(twice, capsys, monkeypatch):
    assert tunebook(capsys, "remove", "r/01_data_prep.old-1")[0] == 1, "nobody was asked, and --yes was not said"
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})("n\n"))
    assert tunebook(capsys, "remove", "r/01_data_prep.old-1")[0] == 1
    assert (twice / "r" / "01_data_prep.old-1").is_dir()
    assert tunebook(capsys, "remove", "--yes", "r/01_data_prep.old-1")[0] == 0
    assert sorted(p.name for p in (twice / "r").glob("0*")) == ["01_data_prep", "02_qlora_sft"]
    assert tunebook(capsys, "remove", "r", "--yes")[0] == 0 and not (twice / "r").exists()


@pytest.mark.parametrize(
    "name",
    ["../r", "r/../../r", "r/.locks", "r/checkpoints", "nosuch", "r/03_orpo_alignment", "r/01_data_prep.old-7", ""],
)
@pytest.mark.parametrize("action", ["restore", "remove"])
def test_no_other_folder_can_be_named(twice, capsys, name, action):
    before = sorted(twice.rglob("*"))
    status, _, error = tunebook(capsys, action, *([name] if name else []), *(["--yes"] if action == "remove" else []))
    assert status == 1 and error.strip().count("\n") == 0 and sorted(twice.rglob("*")) == before


def test_a_stage_in_its_place_or_at_work_is_not_touched(twice, capsys):
    assert "not set aside" in tunebook(capsys, "restore", "r/02_qlora_sft")[2]
    runs.lock("r", "data")
    status, said = other_process(twice, code="from ci import run_list; run_list.main(['remove', 'r', '--yes'])")
    assert status != 0 and "being worked on by process" in said and (twice / "r").is_dir()
    listed = other_process(
        twice, code="from ci import run_list; import sys; print(run_list.listing([]), file=sys.stderr)"
    )
    assert "works on it" in listed[1]
    runs.unlock("r", "data")


def test_without_runs_the_list_says_so(runs_root, capsys):
    assert "no runs" in tunebook(capsys)[1]
