"""Killed, cut off, out of disk, mirrored, continued with something else: what a run does when it is started again."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import train_data
import yaml

from helpers import cache, plots, runs
from helpers.errors import Stopped, TunebookError
from helpers.machine import PROJECT
from helpers.train import callbacks, resume, training
from helpers.train.__main__ import main


def settings(**given):
    return train_data.settings(
        "sft", **{"max_steps": 12, "epochs": 3, "eval_steps": 4, "save_steps": 4, "dropout": 0.1, **given}
    )


def run(**given):
    job = training.open(settings(**given))
    job.train()
    return job


def losses(job):
    return plots.series(callbacks.read(job.log), "loss")


def interrupt(step, **given):
    """A run that raises after `step`, as a kill would end it: the manifest is missing, the checkpoints are there."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    job = training.open(settings(**given)).build()
    job.trainer.add_callback(Kill())
    with pytest.raises(Stopped):
        job.train()
    runs.unlock("r", "sft")
    return job


def test_a_killed_run_resumes_with_the_same_rows_rates_and_losses(data, tmp_path, capsys):
    whole = run(max_steps=24, epochs=6)
    expected, rates = losses(whole)[1], plots.series(callbacks.read(whole.log), "learning_rate")[1]
    assert len(expected) == 24
    shutil.rmtree(whole.stage.path)
    runs.unlock("r", "sft")
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(settings(max_steps=24, epochs=6).as_dict()))
    command = [sys.executable, "-m", "helpers.train", str(file)]
    process = subprocess.Popen(
        command, cwd=PROJECT, env={**os.environ, "TUNEBOOK_HEADLESS": "1"}, stdout=subprocess.DEVNULL
    )
    log = whole.log
    while process.poll() is None and max((line["step"] for line in callbacks.read(log)), default=0) < 6:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (log.parent / "manifest.json").exists() and resume.numbered(log.parent / "checkpoints")
    assert main([str(file)]) == 0 and "Resuming from checkpoint-" in capsys.readouterr().out
    steps, found = plots.series(callbacks.read(log), "loss")
    assert steps == list(range(1, 25)) and found == pytest.approx(expected, abs=1e-4)
    assert plots.series(callbacks.read(log), "learning_rate")[1] == pytest.approx(rates, rel=1e-6)
    assert runs.load("r", "sft").metrics["steps"] == 24
    shown = training.open(settings(max_steps=24, epochs=6))  # in a notebook that is opened afterwards
    assert shown.stage.done and "24 steps" in repr(shown.plan()) and "24 steps" in repr(shown.train())
    assert "q0-0" in shown.first_row()._repr_html_() and shown.figure()._repr_png_()


def test_a_cell_that_was_stopped_and_is_run_again_resumes_and_does_not_train_on_top(data, capsys):
    whole = losses(run())[1]
    shutil.rmtree(runs.folder("r", "sft"))
    runs.unlock("r", "sft")
    job = interrupt(6)
    assert job.model is None and job.trainer is None
    job.train()
    assert "Resuming from checkpoint-4" in capsys.readouterr().out
    assert losses(job)[0] == list(range(1, 13)) and losses(job)[1] == pytest.approx(whole, abs=1e-4)


def test_a_killed_pissa_run_resumes_on_the_same_remainder_of_the_base(data):
    given = {"method": "lora", "init": "pissa", "lora_plus_ratio": 4.0, "sample_every": 2}
    whole = run(**given)
    expected = losses(whole)[1]
    shutil.rmtree(whole.stage.path)
    runs.unlock("r", "sft")
    shutil.rmtree(interrupt(6, **given).stage.path / "work")
    resumed = run(**given)
    assert losses(resumed)[1] == pytest.approx(expected, abs=1e-4)
    samples = [line["step"] for line in callbacks.read(resumed.stage.path / "samples.jsonl")]
    assert samples == [step for step in range(2, 13, 2) for _ in range(4)]


def test_a_checkpoint_that_was_cut_off_is_never_used(data, capsys):
    job = interrupt(10)
    newest, older = resume.numbered(job.checkpoints)
    assert (newest.name, older.name) == ("checkpoint-8", "checkpoint-4")
    for damage in ("cut", "unsealed"):
        if damage == "cut":
            file = newest / "adapter_model.safetensors"
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
        copy = newest.with_name("checkpoint-9")
        if damage == "unsealed":
            shutil.copytree(older, copy)
            (copy / resume.SEAL).unlink()
        assert resume.newest(job.checkpoints, job.identity) == older
        assert "was cut off" in capsys.readouterr().out and not newest.exists() and not copy.exists()
    again = run()
    assert losses(again)[0] == list(range(1, 13))
    assert "Resuming from checkpoint-4" in capsys.readouterr().out


def test_another_jobs_checkpoint_is_refused(data):
    job = interrupt(6)
    for what in ("the data", "the chat template", "the tokenizer", "learning_rate"):
        with pytest.raises(TunebookError, match=f"was written before {what} changed"):
            resume.newest(job.checkpoints, {**job.identity, what: 1.0})


def test_never_begins_anew(data, capsys):
    interrupt(6, resume="never")
    job = run(resume="never")
    assert "Resuming from" not in capsys.readouterr().out and losses(job)[0] == list(range(1, 13))


def test_a_full_disk_ends_with_a_message_and_the_same_command_resumes(data, tmp_path, capsys):
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(settings(max_steps=8, best_checkpoint=False).as_dict()))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # no file of this process can grow beyond
    try:
        status = main([str(file)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert status == 1 and "No space left on the disk" in said and "Traceback" not in said, said[-2000:]
    folder = runs.folder("r", "sft")
    assert not (folder / "manifest.json").exists() and all(
        resume.sealed(c) for c in resume.numbered(folder / "checkpoints")
    )
    assert losses(run(max_steps=8, best_checkpoint=False))[0] == list(range(1, 9))


def test_a_lost_run_folder_is_brought_back_from_the_mirror(data, tmp_path, capsys):
    drive = tmp_path / "drive"
    job = interrupt(10, mirror=str(drive))
    kept = resume.Mirror(str(drive), job.stage, job.identity).folder
    assert [p.name for p in resume.numbered(kept)] == ["checkpoint-8", "checkpoint-4"]
    shutil.rmtree(job.stage.path)
    again = run(mirror=str(drive))
    assert "checkpoint-8 is brought back" in capsys.readouterr().out
    assert losses(again)[0] == list(range(1, 13))


def test_runs_and_stages_that_share_a_mirror_keep_their_checkpoints(data, tmp_path, narrow_llama, tokenizer):
    drive = tmp_path / "drive"
    foreign = drive / "r" / "02_qlora_sft" / "checkpoint-999"  # an earlier program's, or somebody's own
    foreign.mkdir(parents=True)
    first = interrupt(10, mirror=str(drive))
    train_data.data_stage("r2", narrow_llama, tokenizer)
    for given in ({"learning_rate": 5e-4}, {"run": "r2"}):
        run(mirror=str(drive), max_steps=20, save_steps=4, **given)
    kept = resume.Mirror(str(drive), first.stage, first.identity).folder
    assert [p.name for p in resume.numbered(kept)] == ["checkpoint-8", "checkpoint-4"] and foreign.is_dir()
    found = [[p.name for p in resume.numbered(log.parent)] for log in drive.rglob("log.jsonl")]
    assert sorted(found) == [["checkpoint-20", "checkpoint-16", "checkpoint-12"]] * 2 + [
        ["checkpoint-8", "checkpoint-4"]
    ]


def test_a_mirror_that_cannot_be_written_is_found_before_training(data, tmp_path):
    (tmp_path / "drive").write_text("a file")
    with pytest.raises(TunebookError, match=r"mirror is set and .* cannot be written .*mount the drive"):
        run(mirror=str(tmp_path / "drive"))
    assert not (runs.folder("r", "sft") / "log.jsonl").exists()


def test_a_mirror_that_fills_up_is_announced_and_the_training_ends_well(data, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume.shutil, "copytree", full)
    job = run(mirror=str(tmp_path / "drive"), max_steps=8)
    said = capsys.readouterr().out
    assert job.result["steps"] == 8 and said.count("could not be copied to the mirror") == 2
    assert "No space left on device); training continues" in said


def test_a_drive_that_disappears_while_training_is_announced_and_nothing_is_put_in_its_place(
    data, tmp_path, monkeypatch, capsys
):
    put = resume.Mirror.put

    def unmounted_after(self, checkpoint, log):
        put(self, checkpoint, log)
        shutil.rmtree(tmp_path / "drive", ignore_errors=True)

    monkeypatch.setattr(resume.Mirror, "put", unmounted_after)
    job = run(mirror=str(tmp_path / "drive" / "mine"), max_steps=8)
    said = capsys.readouterr().out
    assert job.result["steps"] == 8 and not (tmp_path / "drive").exists()
    assert said.count("the folder is gone; mount the drive again); training continues") == 1


def test_a_checkpoint_that_cannot_be_read_is_kept_and_said(data, monkeypatch):
    job = interrupt(6)

    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cache, "sha256_file", broken)
    with pytest.raises(TunebookError, match=r"checkpoint-4 cannot be read \(Input/output error\); it is left as it is"):
        resume.newest(job.checkpoints, job.identity)
    assert [p.name for p in resume.numbered(job.checkpoints)] == ["checkpoint-4"]


def test_start_from_trains_an_adapter_further_and_is_not_a_resume(data, narrow_llama, tokenizer):
    first = run(max_steps=6)
    held = first.trainer.evaluate()["eval_loss"]
    adapter = first.finish().path / "adapter"
    train_data.data_stage("r2", narrow_llama, tokenizer)
    job = training.open(settings(run="r2", start_from=str(adapter), max_steps=4)).build()
    assert job.trainer.evaluate()["eval_loss"] == pytest.approx(held, rel=1e-4)
    job.train()
    assert losses(job)[0] == [1, 2, 3, 4] and job.result["eval_loss"] < held


def test_an_adapter_of_another_base_or_template_is_refused(data, narrow_llama, tokenizer, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(run(max_steps=4).finish().path / "adapter", adapter)
    with pytest.raises(TunebookError, match="is not an adapter folder"):
        training.open(settings(start_from=str(tmp_path)))
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    config = (other / "adapter_config.json").read_text().replace(str(narrow_llama), "someone/else")
    (other / "adapter_config.json").write_text(config)
    with pytest.raises(TunebookError, match="was trained on someone/else"):
        training.open(settings(start_from=str(other)))
    shutil.copy(adapter / "adapter_config.json", other)
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    with pytest.raises(TunebookError, match="another chat template"):
        training.open(settings(start_from=str(other)))


def test_an_adapter_knows_its_base_by_hash(data, narrow_llama, tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = run(max_steps=2).finish().path / "adapter"
    copies = [tmp_path / place / narrow_llama.name for place in ("same", "tuned")]  # folders of one name
    for copy in copies:
        shutil.copytree(narrow_llama, copy)
    tensors = load_file(narrow_llama / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.1
    save_file(tensors, copies[1] / "model.safetensors", metadata={"format": "pt"})
    train_data.data_stage("r2", copies[0], tokenizer)
    assert training.open(settings(run="r2", start_from=str(adapter))).adapter == adapter.resolve()
    train_data.data_stage("r3", copies[1], tokenizer)
    with pytest.raises(TunebookError, match="with other weights, config or tokenizer"):
        training.open(settings(run="r3", start_from=str(adapter)))


def test_a_template_that_is_not_the_datas_is_refused(data, narrow_llama, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(narrow_llama, other)
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    with pytest.raises(TunebookError, match="is not the one that the data of run 'r' was rendered with"):
        training.open(settings(model=str(other)))


# ---------------------------------------------------------------- runs that cannot come right


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rows(data):
    import torch

    job = training.open(settings()).build()
    with torch.no_grad():
        next(p for p in job.model.parameters() if p.requires_grad)[0, 0] = float("nan")
    with pytest.raises(TunebookError, match=r"stopped at step 1: the loss is nan; .*Rows of that step: q0-\d+, "):
        job.train()
    assert not resume.numbered(job.checkpoints)


def test_steps_without_gradient_stop_the_run(data):
    job = training.open(settings(weight_decay=0.0)).build()
    for name, weight in job.model.named_parameters():
        if "lora_" in name:
            weight.data.zero_()
    with pytest.raises(TunebookError, match="no weight had a gradient in 3 steps"):
        job.train()


def test_a_loss_that_runs_away_stops_the_run_and_a_noisy_one_does_not():
    from types import SimpleNamespace

    state = SimpleNamespace(global_step=1, is_world_process_zero=True)

    def feed(values):
        guard = callbacks.Guard(SimpleNamespace(step_rows=[(["a", "b"], 1.0)]))
        for state.global_step, value in enumerate(values, 1):
            guard.on_log(None, state, None, {"loss": value, "grad_norm": 1.0, "learning_rate": 1e-3})

    feed([2.0, 1.0, 0.5, 3.0, 0.4, 2.5, 0.3] * 6)
    with pytest.raises(
        TunebookError, match=r"the loss rose from .* and stayed there; lower learning_rate.*Rows of that step: a, b\."
    ):
        feed([2.0] * 10 + [9.0] * 60)


def test_fp16s_first_overflows_are_let_pass_and_lasting_ones_are_not():
    from types import SimpleNamespace

    state = SimpleNamespace(global_step=1)
    overflow = {"loss": 2.0, "grad_norm": float("inf"), "learning_rate": 1e-3}
    guard = callbacks.Guard(fp16=True)
    for _ in range(callbacks.SCALER_STEPS):
        guard.on_log(None, state, None, overflow)
    with pytest.raises(TunebookError, match="the gradient is inf"):
        guard.on_log(None, state, None, overflow)
    with pytest.raises(TunebookError, match="the gradient is inf"):
        callbacks.Guard().on_log(None, state, None, overflow)


def test_the_command_line_ends_bad_input_with_a_message(runs_root, tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text("rank: [1\n")
    for arguments, words in (
        ([str(tmp_path / "none.yaml")], "cannot be read"),
        ([str(bad)], "cannot be read"),
        (["-p", "rnak", "4"], "did you mean rank"),
        (["-p", "rank", "999"], "Parameter rank is '999', out of bounds"),
        ([], "run notebook 01_data_prep"),
    ):
        assert main(arguments) == 1
        assert words in capsys.readouterr().err


def test_a_run_killed_after_its_last_checkpoint_adds_no_step(data):
    whole = run(max_steps=8, best_checkpoint=False)
    expected = losses(whole)
    weights = {k: v.clone() for k, v in whole.model.state_dict().items() if "lora_" in k}
    (whole.stage.path / "manifest.json").unlink(missing_ok=True)
    runs.unlock("r", "sft")
    again = run(max_steps=8, best_checkpoint=False)
    assert losses(again) == expected and again.result["steps"] == 8
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in weights.items())
