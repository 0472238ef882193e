"""`method auto` through small jobs: what it came to is in plan, manifest and checkpoints, and later work keeps it."""

import pytest
import torch
import train_data

from helpers import runs
from helpers.errors import TunebookError
from helpers.gguf import trained
from helpers.planner import cost_model
from helpers.report import facts
from helpers.train import config, distributed, training

SHORT = {"method": "auto", "max_steps": 1, "eval_steps": 1, "batch_size": 4, "eval_rows": 2}


def job(stage="sft", **given):
    return training.open(train_data.settings(stage, **{**SHORT, **given}))


@pytest.fixture
def memory(monkeypatch):
    """Sets the memory that the planner finds on this CPU, GiB."""

    def set_to(gib):
        card = cost_model.Card("CPU", None, gib, 0.08, 20, 20, 0.5)
        monkeypatch.setattr(cost_model, "card_here", lambda: card)

    return set_to


def needs(method):
    return job(method=method).planned.option.need_gib


def test_sft_says_what_auto_came_to_and_preference_training_keeps_its_base_weights(data, memory):
    memory(100.0)
    sft = job()
    assert sft.params.method == sft.planned.method == "lora" and sft.stage.params.method == "auto"
    assert str(sft.plan()).startswith("lora fits on CPU: ")
    assert str(sft.planned).count("Method auto: lora, on the 32-bit base") == 1
    sft.train()
    assert not any("bnb" in type(m).__module__ for m in sft.model.modules())
    manifest = sft.finish()
    assert manifest.data["method"] == manifest.data["plan"]["method"] == "lora" and manifest.params["method"] == "auto"
    found = facts.Facts("r", manifest.path.parent, stages={"sft": manifest})
    assert found.used("sft")["method"] == "lora"
    assert {s.name: (s.value, s.changed) for s in found.settings("sft")}["method"][0] == "lora"
    assert job().stage.done, "asked for again, it is there"
    memory(needs("lora") / 0.9)  # a machine on which a new training would be on 4 bits
    assert job(seed=18).params.method == "qlora"
    orpo = job("orpo")
    assert orpo.params.method == "lora" and "as " + str(manifest.path / "adapter") in orpo.planned.reasons[0]
    named = job("orpo", method="qlora")
    assert named.params.method == "qlora" and named.planned.reasons[0].startswith("Warning: method is qlora")


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_killed_run_resumes_on_the_base_weights_that_it_had(data, memory, tmp_path, mirrored):
    given = {"mirror": str(tmp_path / "drive")} if mirrored else {}
    memory(100.0)
    killed = job(**given)
    killed.train()
    runs.unlock("r", "sft")
    if mirrored:
        killed.stage.path.rename(tmp_path / "gone")
    memory(killed.planned.option.need_gib / 0.9)
    again = job(**given)
    assert again.params.method == "lora" and "the checkpoints of this run were trained" in again.planned.reasons[0]
    again.train()
    assert again.result["steps"] == 1
    assert job(resume="never").params.method == "qlora"


def test_of_several_gpus_auto_with_a_reference_copy_is_not_sharded(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = {m: distributed.sharded(train_data.settings("sft", method=m)) for m in ("lora", "qlora", "auto")}
    assert found == {"lora": True, "qlora": False, "auto": False}
    assert not distributed.sharded(train_data.settings("sft", method="lora", quantize="fp8"))


def test_init_names_the_base_and_a_contradiction_is_refused(data, memory):
    memory(100.0)
    assert job(init="loftq").params.method == "qlora" and job(init="pissa").params.method == "lora"
    with pytest.raises(TunebookError, match="loftq"):
        job(init="loftq", method="lora")


def test_a_base_in_fp8_is_trained_and_resumed_and_later_work_keeps_it(data, memory, monkeypatch, narrow_llama):
    memory(100.0)
    with pytest.raises(TunebookError, match=r"needs a GPU of .* 8\.9 where here is no GPU; set quantize to 'auto'"):
        job(method="lora", quantize="fp8")
    monkeypatch.setenv(config.EMULATED, "1")
    killed = job(quantize="fp8", max_steps=2)
    sixteen = job(method="lora", max_steps=2, seed=18).planned
    assert killed.params.method == "lora" and killed.planned.setting.quantize == "fp8"
    assert killed.planned.option.need_gib < sixteen.option.need_gib
    killed.train()
    assert any(note == "base in FP8, row-wise scales: 14 linear layers" for note in killed.notes)
    runs.unlock("r", "sft")
    again = job(quantize="fp8", max_steps=2)
    again.train()
    assert again.result["steps"] == 2
    said = trained.logprobs(again.model.eval(), [11, 250, 31, 77, 900])
    manifest = again.finish()
    assert manifest.data["quantize"] == manifest.data["plan"]["quantize"] == trained.saw(manifest) == "fp8"
    found = trained.load(narrow_llama, manifest.path / "adapter", again.tokenizer, "fp8", dtype="fp32")
    assert torch.allclose(trained.logprobs(found, [11, 250, 31, 77, 900]), said, atol=1e-4)
    orpo = job("orpo")
    assert orpo.params.quantize == "fp8" and orpo.planned.reasons[0].startswith("Method auto: lora on FP8, as ")
    assert job("orpo", method="lora").planned.reasons[0].startswith("Warning: method is lora, and ")
    monkeypatch.delenv(config.EMULATED)
    orpo = job("orpo")
    assert orpo.params.method == "lora" and "trained by lora on FP8, on other base weights" in orpo.planned.reasons[0]
