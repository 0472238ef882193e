"""The export as notebook 04 runs it: every cell twice, killed anywhere, with nothing lost and nothing let in."""

import json

import gguf_models
import pytest
import train_data

from helpers import params as parameters
from helpers import runs
from helpers.errors import Stopped, TunebookError
from helpers.gguf import convert, export
from tests.conftest import begun

SMALL = {"run": "r", "quantizations": "q8_0", "fidelity_tokens": 60, "fidelity_answers": 1, "fidelity_gates": False}


def settings(**given):
    return parameters.resolve("gguf", {**SMALL, "outputs": "adapter,gguf,adapter_gguf", **given})


@pytest.fixture
def trained(runs_root, tiny_llama, tokenizer):
    """A run with finished data and SFT stages; the adapter's weights are random."""
    train_data.data_stage("r", tiny_llama, tokenizer)
    stage = begun("sft", train_data.settings("sft", run="r"))
    gguf_models.random_adapter(tiny_llama, stage.path / "adapter", [1, 2, 3])
    stage.finish({"loss": 1.0})


def finished(job):
    """Every step in the notebook's order; the manifest."""
    for step in (job.check, job.merge, job.convert, job.prove, job.figure, job.modelfile):
        step()
    return job.finish()


def test_every_cell_may_be_run_twice_and_the_whole_notebook_again(trained):
    job = export.open(settings())
    table = job.prove()
    type(job).prove.__wrapped__(job)  # the work itself, too, replaces what it found
    finished(job)
    assert job.prove() is table and table.text.count("q8_0 ") == 1
    assert [r.type for r in job.results] == ["f16", "q8_0"]
    again = export.open(settings())
    assert again.stage.done and again.prove().text == table.text and again.best == job.best and again.base == job.base
    assert finished(again).data == again.stage.done.data


def test_what_is_kept_is_what_outputs_names(trained):
    manifest = finished(export.open(settings()))
    kept = {name.split("/")[0] for name in manifest.data["artifacts"]}
    assert {"model-q8_0.gguf", "adapter", "adapter.gguf", "merged", "Modelfile", "fidelity.json"} <= kept
    assert not {"model-f16.gguf", "work"} & kept and not (manifest.path / "work").exists()
    assert not [name for name in manifest.data["artifacts"] if "merged/" in name and "safetensors" in name]


def test_an_adapter_is_written_with_its_names_in_a_stable_order(tiny_llama, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from helpers.train import methods

    names = ["v_proj", "q_proj", "up_proj", "k_proj", "down_proj", "o_proj", "gate_proj"]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM"))
    methods.save(model, tokenizer, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"] == sorted(names)


def test_killed_in_any_step_the_same_command_resumes_and_no_scraps_become_artefacts(trained, monkeypatch):
    """A kill leaves what the step had written; an exception inside the step would be tidied up by it."""

    def killed(*arguments, **named):
        for out in (a for a in (*arguments, named.get("out")) if a is not None and "work/new/" in str(a)):
            (out.parent / f".{out.name}._scrap").mkdir()
            (out.parent / f".{out.name}._scrap" / "half.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    for module, name in (
        (export.merging, "merge"),
        (convert, "convert"),
        (convert, "quantize"),
        (convert, "convert_adapter"),
        (runs.Stage, "finish"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, killed)
            with pytest.raises(Stopped):
                finished(export.open(settings()))

    def not_again(*_, **__):
        raise AssertionError("it was done already")

    for module, name in ((export.merging, "merge"), (convert, "convert"), (convert, "quantize")):
        monkeypatch.setattr(module, name, not_again)
    manifest = finished(export.open(settings()))
    assert not [name for name in manifest.data["artifacts"] if "_scrap" in name]
    assert not list(manifest.path.rglob("*_scrap*"))


def test_training_rows_in_place_of_held_out_ones_are_announced(runs_root, tiny_llama, tokenizer, capsys):
    rows = [{**row, "input_ids": row["input_ids"][:1]} for row in train_data.sft_rows(tokenizer, 2)]
    train_data.data_stage("r", tiny_llama, tokenizer, held_out=rows)
    job = export.open(settings(export="base", outputs="gguf"))
    assert "TRAINING rows" in job.prove().text and "TRAINING rows" in capsys.readouterr().out
    manifest = job.finish()
    assert "TRAINING rows" in manifest.metrics["text"]
    assert "TRAINING rows" in json.loads((manifest.path / "fidelity.json").read_text())["text"]


def test_parameters_that_cannot_be_met_are_refused_before_anything_is_written(trained):
    for given, words in (
        ({"quantizations": "q9"}, "quantizations is 'q9'"),
        ({"outputs": "gguf,pdf"}, "outputs is 'gguf,pdf'"),
        ({"export": "orpo"}, "no finished stage of that name"),
        ({"model_name": "a b"}, "model_name is 'a b'"),
    ):
        with pytest.raises(TunebookError, match=words):
            export.open(settings(**given))
    assert not runs.folder("r", "gguf").exists()
