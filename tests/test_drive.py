"""Runs kept on a drive: two folders play two machines, a third one the drive between them."""

import json
import shutil

import pytest
import train_data

from helpers import drive, plots, runs
from helpers.errors import Stopped, TunebookError
from helpers.train import callbacks, training


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """Move to another machine by its name; the one before is thrown away."""
    monkeypatch.setenv("TUNEBOOK_KEEP", str(tmp_path / "drive"))

    def move(name):
        for other in tmp_path.glob("machine-*"):
            shutil.rmtree(other)
        monkeypatch.setenv("TUNEBOOK_RUNS", str(tmp_path / f"machine-{name}"))
        return tmp_path / "drive"

    return move


def job(**given):
    settings = {"max_steps": 4, "batch_size": 2, "save_steps": 2, "eval_steps": 2, **given}
    return training.open(train_data.settings("sft", **settings))


def cut_off(at, **given):
    """A training that is cut off after step `at`, as when a virtual machine is taken away."""
    from transformers import TrainerCallback

    class Gone(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == at:
                raise KeyboardInterrupt

    made = job(**given).build()
    made.trainer.add_callback(Gone())
    with pytest.raises(Stopped):
        made.train()
    runs.unlock("r", "sft")


def test_a_second_machine_resumes_the_first_ones_training_and_a_third_finds_it_finished(
    machines, narrow_llama, tokenizer, capsys
):
    kept = machines("one")
    data = train_data.data_stage("r", narrow_llama, tokenizer)
    cut_off(3)
    assert not (kept / "r/02_qlora_sft/manifest.json").exists()

    machines("two")
    second = job()
    assert runs.load("r", "data").sha256 == data.sha256
    second.train()
    assert "checkpoint-2 is brought back" in capsys.readouterr().out
    assert plots.series(callbacks.read(second.log), "loss")[0] == [1, 2, 3, 4]
    done = second.finish()
    assert not list((kept / "checkpoints").rglob("checkpoint-*"))  # the finished stage is there itself

    machines("three")
    third = job()
    assert third.stage.done.sha256 == done.sha256 and (third.stage.path / "adapter/adapter_config.json").is_file()
    assert "4 steps" in repr(third.train()) and not (third.stage.path / "checkpoints").exists()


def test_without_a_drive_nothing_is_copied(machines, narrow_llama, tokenizer, monkeypatch):
    kept = machines("one")
    monkeypatch.delenv("TUNEBOOK_KEEP")
    train_data.data_stage("r", narrow_llama, tokenizer)
    assert not kept.exists()


def test_a_half_copied_stage_is_neither_used_nor_copied_over_the_work_here(machines, narrow_llama, tokenizer):
    kept = machines("one")
    train_data.data_stage("r", narrow_llama, tokenizer)
    (kept / "r/01_data_prep/manifest.json").unlink()
    machines("two")
    with pytest.raises(TunebookError, match="'data'"):
        job()
    assert not (runs.folder("r", "data") / "train.parquet").exists()


def test_a_file_that_was_damaged_on_the_drive_is_found_by_its_hash(machines, narrow_llama, tokenizer):
    kept = machines("one")
    train_data.data_stage("r", narrow_llama, tokenizer)
    rows = kept / "r/01_data_prep/train.parquet"
    rows.write_bytes(rows.read_bytes()[:-1])
    machines("two")
    with pytest.raises(TunebookError, match=r"train\.parquet as it stands there"):
        job()


def test_another_result_of_the_same_name_is_kept_beside_it_on_the_drive(machines, narrow_llama, tokenizer):
    kept = machines("one")
    first = train_data.data_stage("r", narrow_llama, tokenizer)
    machines("two")
    second = train_data.data_stage("r", narrow_llama, tokenizer, train=train_data.sft_rows(tokenizer, 16))
    states = {p.name: json.loads((p / "manifest.json").read_text())["artifacts"] for p in (kept / "r").iterdir()}
    assert states["01_data_prep.old-1"] == first.data["artifacts"]
    assert states["01_data_prep"] == second.data["artifacts"] != first.data["artifacts"]


def test_a_drive_that_cannot_be_written_is_announced_and_the_stage_is_finished_here(
    machines, narrow_llama, tokenizer, capsys
):
    machines("one").write_text("a file where the folder should be")
    assert train_data.data_stage("r", narrow_llama, tokenizer)
    said = capsys.readouterr().out
    assert "01_data_prep could not be kept in" in said and "finished on this machine alone" in said


def test_a_drive_that_vanishes_is_announced_and_not_made_anew_on_this_disk(machines, narrow_llama, tokenizer, capsys):
    kept = machines("one")
    train_data.data_stage("r", narrow_llama, tokenizer)
    one = job()
    one.train()
    shutil.rmtree(kept)
    assert one.finish() and not kept.exists()
    said = capsys.readouterr().out
    assert said.count("mount the drive again") >= 1 and "is finished on this machine alone" in said


def test_a_drive_that_cannot_be_read_is_one_message_and_no_harm_to_what_is_here(
    machines, narrow_llama, tokenizer, monkeypatch, capsys
):
    machines("one")
    train_data.data_stage("r", narrow_llama, tokenizer)
    one = job()
    one.train()
    monkeypatch.setenv("TUNEBOOK_KEEP", "/" + "x" * 300)  # the system refuses to look at such a path
    done = one.finish()
    assert done.path.is_dir() and "could not be kept in" in capsys.readouterr().out
    assert job().stage.done.sha256 == done.sha256, "what is here is used"
    shutil.rmtree(done.path)
    with pytest.raises(TunebookError, match=r"Runs are kept in /x+, which cannot be read \(File name too long\)"):
        job()


def test_what_serves_this_machine_alone_is_not_copied(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_KEEP", str(tmp_path / "drive"))
    stage, place = tmp_path / "runs/r/04_gguf_export", tmp_path / "drive/r/04_gguf_export"
    for name in ("work/big", "checkpoints/a", "tensorboard/b", "shown/table.json", "x.partial", "plan.json", "model"):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text("{}")
    (stage / "link").symlink_to(stage / "model")
    (stage / "model").write_bytes(bytes(drive.SMALL + 1))
    drive.keep(stage)
    found = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
    assert found == {"plan.json", "shown/table.json"}
