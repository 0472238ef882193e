"""The chain of proof begins at the model that was trained, on the base as training saw it."""

import json

import pytest
import torch
import train_data

from helpers.errors import TunebookError
from helpers.evaluate import candidates
from helpers.gguf import export, fidelity, trained
from helpers.model import fp8, loading
from helpers.params import resolve
from helpers.runs import Manifest
from helpers.tasks.questions import Decoding
from tests.conftest import begun, random_llama

IDS = [11, 250, 31, 77, 900, 4, 62, 7, 8, 1200]


@pytest.fixture(scope="module")
def coarse(tokenizer, tmp_path_factory):
    """Folder of a random model to which 4 bits do much."""
    size = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.12}
    return random_llama(tmp_path_factory.mktemp("coarse"), tokenizer, **size)


def adapter_trained(base, folder, tokenizer, quantize="nf4"):
    """A LoRA adapter after a few real steps on the quantised base; returns that model's log-probabilities of IDS."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(fp8.load(base, quantize, dtype="fp32"), config)
    model.train()  # in evaluation bitsandbytes would compute in bfloat16 on some CPUs
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    batch = torch.tensor([IDS * 4])
    for _ in range(6):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return trained.logprobs(model.train(quantize != "fp8"), IDS)  # whose activations are rounded in training alone


@pytest.fixture
def run(runs_root, coarse, tokenizer):
    """A run whose adapter was trained on the 4-bit base; yields (manifest, the trained model's log-probabilities)."""
    train_data.data_stage("r", coarse, tokenizer)
    stage = begun("sft", train_data.settings("sft", run="r"))
    said = adapter_trained(coarse, stage.path / "adapter", tokenizer)
    return stage.finish({"loss": 1.0}, method="qlora"), said


def job(**given):
    small = {
        "run": "r",
        "quantizations": "q8_0",
        "fidelity_tokens": 120,
        "fidelity_answers": 1,
        "outputs": "merged,gguf",
    }
    return export.open(resolve("gguf", {**small, **given}))


def test_the_model_that_was_trained_is_loaded_as_training_saw_it(run, coarse, tokenizer):
    manifest, wanted = run
    for dtype, near in (("fp32", 1e-6), ("bf16", 0.05)):
        model = trained.load(coarse, manifest.path / "adapter", tokenizer, "nf4", dtype=dtype)
        assert float(trained.divergence(wanted, trained.logprobs(model, IDS)).mean()) < near
        assert sum("lora" in name for name, _ in model.named_modules()) == 0 or dtype == "bf16"
    plain = trained.load(coarse, manifest.path / "adapter", tokenizer, "16bit", dtype="fp32")
    assert float(trained.divergence(wanted, trained.logprobs(plain, IDS)).mean()) > 0.05


def test_of_two_merges_the_one_nearest_to_the_trained_model_is_kept_and_both_are_told(run):
    made = job()
    table = made.prove()
    itself, nf4, plain = made.merges
    assert (itself.onto, nf4.onto, plain.onto) == ("trained", "nf4", "16bit") and nf4.chosen and not plain.chosen
    assert nf4.mean_kl < trained.MERGE_KL < 0.05 < plain.mean_kl and not nf4.failed and plain.failed
    assert nf4.tokens == plain.tokens == itself.tokens > 100
    assert "merged onto 4 bits, unpacked, kept" in table.text and "merged onto 16 bits" in table.text
    again = job()  # a killed run goes on with what was measured
    assert again.prove().text == table.text
    manifest = made.finish()
    assert [m["onto"] for m in manifest.metrics["merges"]] == ["trained", "nf4", "16bit"]
    assert json.loads((manifest.path / "fidelity.json").read_text())["merges"] == manifest.metrics["merges"]
    assert not list(manifest.path.glob("work*"))


def test_a_merge_that_is_not_the_trained_model_fails_its_gate(run):
    made = job(merge_onto="16bit")
    made.merge()
    assert [m.onto for m in made.merges] == ["trained", "16bit"]
    with pytest.raises(TunebookError, match=r"merged onto 16 bits, kept: mean KL .* set merge_onto to 'auto'"):
        fidelity.require([], made.merges)


def test_an_adapter_of_a_16_bit_base_is_merged_onto_that(runs_root, coarse, tokenizer):
    train_data.data_stage("r", coarse, tokenizer)
    stage = begun("sft", train_data.settings("sft", run="r"))
    adapter_trained(coarse, stage.path / "adapter", tokenizer)
    stage.finish({"loss": 1.0}, method="lora")
    made = job()
    made.merge()
    assert [m.onto for m in made.merges] == ["trained", "16bit"]
    assert made.merges[1].mean_kl < trained.MERGE_KL and made.merges[1].chosen


def test_the_evaluation_judges_what_was_trained_and_the_merge_apart(run, tmp_path, monkeypatch):
    manifest, wanted = run
    monkeypatch.setattr(loading, "fast_bf16", lambda: False)
    made = job()
    made.merge()
    exported = Manifest(made.stage.path, {"parents": {"sft": {}}, "metrics": {"trained_by": "sft"}})
    stages = {"data": made.stage.parents["data"], "sft": manifest, "gguf": exported}
    found = {c.name: c for c in candidates.find(stages, resolve("eval").candidates)}
    assert list(found) == ["base", "sft", "merged"] and found["sft"].onto == "nf4"
    assert found["merged"].made_from == "sft"
    kl = {}
    for name in ("base", "sft", "merged"):
        with candidates.Session(found[name], tmp_path) as session:
            (values,) = session.reader.logprobs([(IDS[:1], IDS[1:])])
            kl[name] = abs(sum(values) - float(wanted[torch.arange(9), torch.tensor(IDS[1:])].sum()))
            assert session.answers([[{"role": "user", "content": "hi"}]], Decoding(4))[0][0].tokens == 4
    assert kl["sft"] < 1e-3 < kl["merged"] < 1 < kl["base"]


def test_a_base_in_fp8_is_seen_again_and_the_merge_onto_it_is_measured_too(runs_root, coarse, tokenizer):
    train_data.data_stage("r", coarse, tokenizer)
    stage = begun("sft", train_data.settings("sft", run="r"))
    wanted = adapter_trained(coarse, stage.path / "adapter", tokenizer, "fp8")
    manifest = stage.finish({"loss": 1.0}, method="lora", quantize="fp8")
    made, loaded = job(), trained.load(coarse, manifest.path / "adapter", tokenizer, "fp8", dtype="fp32")
    assert float(trained.divergence(wanted, trained.logprobs(loaded, IDS)).mean()) < 1e-6
    made.merge()
    assert [m.onto for m in made.merges] == ["trained", "fp8", "16bit"]
    eight, plain = made.merges[1:]
    assert eight.chosen and 0 < eight.mean_kl < plain.mean_kl and eight.name == "merged onto FP8, unpacked, kept"
    stages = {"data": made.stage.parents["data"], "sft": manifest}
    assert {c.name: c.onto for c in candidates.find(stages, "base,sft")} == {"base": "16bit", "sft": "fp8"}
