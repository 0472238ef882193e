"""`tunebook import`: what becomes of other trainers' settings, and that no YAML crashes it or runs code."""

import json
import os

import pytest
import yaml

from helpers import __main__ as command_line
from helpers import import_recipe, params
from helpers.errors import TunebookError
from helpers.import_recipe import FREE, LOST, NEAR, TAKEN

LLAMA = {"model_name_or_path": "org/base-8b", "stage": "sft", "do_train": True, "finetuning_type": "lora"}
LLAMA |= {"dataset": "one", "cutoff_len": 1024, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
LLAMA |= {"learning_rate": 1e-4, "lora_rank": 8, "lora_target": "all", "bf16": True, "output_dir": "saves/x"}
AXOLOTL = {"base_model": "org/base-7b", "adapter": "qlora", "load_in_4bit": True, "lora_r": 32, "lora_alpha": 16}
AXOLOTL |= {"lora_target_linear": True, "datasets": [{"path": "org/rows", "type": "sharegpt"}], "sequence_len": 2048}
AXOLOTL |= {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 1, "warmup_steps": 10}


@pytest.fixture
def job(tmp_path):
    """Reads these settings as the YAML of another trainer, beside a dataset_info.json with four sets."""

    def imported(values, gpus=1):
        (tmp_path / "data").mkdir(exist_ok=True)
        sets = {"one": {"file_name": "one.json"}, "two": {"file_name": "one.json", "formatting": "sharegpt"}}
        sets |= {"pictures": {"file_name": "one.json", "columns": {"images": "images"}}, "away": {"file_name": "../x"}}
        (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(sets))
        (tmp_path / "data" / "one.json").write_text('[{"instruction": "q", "output": "a"}]')
        file = tmp_path / "job.yaml"
        file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return import_recipe.read(file, gpus)

    return imported


def verdicts(made):
    return {name: verdict for name, _, verdict, _ in made.rows}


def test_a_llama_factory_job_is_taken_over_whole_with_its_defaults_and_its_sets(job, tmp_path):
    made = job(LLAMA, gpus=4)
    assert not made.differs, made.differs
    data, sft = made.recipe["data"], made.recipe["sft"]
    info = str(tmp_path / "data" / "dataset_info.json")
    assert {"model": "org/base-8b", "dataset": "one", "dataset_info": info, "max_length": 1024}.items() <= data.items()
    assert (sft["batch_size"], sft["method"], sft["rank"], sft["learning_rate"]) == (32, "lora", 8, 1e-4)
    assert (sft["epochs"], sft["schedule"], sft["target_modules"], sft["seed"]) == (3.0, "linear", "all-linear", 42)
    assert verdicts(made)["output_dir"] == FREE and verdicts(made)["cutoff_len"] == TAKEN
    assert sorted(params.recipe(made.write(tmp_path / "mine"))) == ["data", "eval", "gguf", "sft"]


def test_an_axolotl_job_is_taken_over_with_its_sets_and_batch(job, tmp_path):
    made = job(AXOLOTL | {"val_set_size": 0.01, "sample_packing": True, "bf16": "auto", "wandb_project": None})
    assert not [row for row in made.differs if row[0] != "datasets"], made.differs
    data, sft = made.recipe["data"], made.recipe["sft"]
    assert (data["dataset"], data["max_length"], data["eval_share"]) == ("org/rows", 2048, 0.01)
    assert (sft["method"], sft["rank"], sft["batch_size"], sft["batch_unit"]) == ("qlora", 32, 8, "packed")
    assert sft["warmup_steps"] == 10 and sft["learning_rate"] == 2e-4
    folder = made.write(tmp_path / "mine")
    assert (folder / "data.yaml").read_text().startswith("# From job.yaml of Axolotl.")
    with pytest.raises(TunebookError, match="there already"):
        made.write(folder)


@pytest.mark.parametrize(
    "change, stage, expected",
    [
        ({"stage": "dpo", "pref_beta": 0.2}, "orpo", {"loss": "dpo", "beta": 0.2, "max_length": 1024}),
        ({"stage": "dpo", "pref_loss": "orpo"}, "orpo", {"loss": "orpo", "start_from": "base"}),
        ({"stage": "kto"}, "orpo", {"loss": "kto", "beta": 0.1}),
        ({"stage": "dpo"}, "data", {"preference_eval_share": 0}),
        ({"stage": "dpo", "val_size": 0.1}, "data", {"preference_eval_share": 0.1}),
        ({"stage": "pt"}, "sft", {"train_on": "all", "batch_unit": "packed"}),
        ({"stage": "pt", "packing": False}, "sft", {"packing": False, "batch_unit": "rows"}),
        ({}, "sft", {"rank": 8, "alpha": 16, "warmup_ratio": 0.0}),
        ({"lora_rank": 32, "lora_alpha": 16}, "sft", {"rank": 32, "alpha": 16}),
        ({"finetuning_type": "full", "deepspeed": "z3.json"}, "sft", {"method": "full"}),
        ({"quantization_bit": 4, "quantization_method": "bnb"}, "sft", {"method": "qlora"}),
        (
            {"optim": "paged_adamw_32bit", "pissa_init": True},
            "sft",
            {"optimizer": "paged_adamw_32bit", "init": "pissa"},
        ),
        ({"max_samples": 50}, "data", {"max_rows": 50}),
        ({"warmup_steps": 0.03}, "sft", {"warmup_ratio": 0.03}),
        ({"dataset": ["one", "two"], "max_samples": 50}, "data", {"caps": "one=50,two=50", "dataset": "one,two"}),
    ],
)
def test_what_llama_factory_calls_otherwise_becomes_the_same_here(job, change, stage, expected):
    made = job(LLAMA | change)
    assert expected.items() <= made.recipe[stage].items(), made.recipe


def test_a_merge_becomes_an_export_of_the_runs_adapter(job):
    merge = {"model_name_or_path": "org/base-8b", "adapter_name_or_path": "saves/x", "template": "llama3"}
    made = job(merge | {"export_dir": "merged", "export_size": 5, "export_legacy_format": False})
    assert made.recipe == {"gguf": {"outputs": "merged"}} and verdicts(made)["export_dir"] == NEAR


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"rl": "dpo", "adapter": "lora", "load_in_4bit": False}, {"orpo": {"loss": "dpo", "method": "lora"}}),
        (
            {"datasets": [{"path": "org/x", "split": "train[:5%]", "name": "en"}]},
            {"data": {"dataset": "org/x:en:train[:5%]"}},
        ),
        (
            {"datasets": [{"path": "t.jsonl", "type": "completion", "field": "chapter"}]},
            {"data": {"format": "text", "columns": "prompt=chapter"}},
        ),
        (
            {"datasets": [{"path": "org/x", "type": {"field_instruction": "ask", "field_output": "say"}}]},
            {"data": {"columns": "prompt=ask,response=say"}},
        ),
        (
            {"lora_target_linear": False, "lora_target_modules": ["q_proj", "v_proj"]},
            {"sft": {"target_modules": "q_proj,v_proj"}},
        ),
        (
            {"peft": {"loftq_config": {"loftq_bits": 4}}, "adapter": "lora"},
            {"sft": {"init": "loftq", "method": "qlora"}},
        ),
        ({"adapter": None, "load_in_4bit": False, "lora_dropout": 0.05, "fp16": True}, {"sft": {"method": "full"}}),
        ({"datasets": [{"path": "t.jsonl", "type": "pretrain"}]}, {"sft": {"packing": True, "batch_unit": "packed"}}),
        ({"warmup_steps": None}, {"sft": {"warmup_ratio": 0.03}}),
        ({"warmup_steps": 0}, {"sft": {"warmup_ratio": 0}}),
    ],
)
def test_what_axolotl_calls_otherwise_becomes_the_same_here(job, change, expected):
    recipe = job(AXOLOTL | change).recipe
    for stage, values in expected.items():
        assert values.items() <= recipe[stage].items(), recipe


def test_what_cannot_be_trained_together_is_refused_before_anything_is_written(job):
    with pytest.raises(TunebookError, match=r"cannot be a recipe\. This cannot work: warmup_steps 10 spends all"):
        job(AXOLOTL | {"max_steps": 5})


@pytest.mark.parametrize(
    "values, name, verdict",
    [
        (AXOLOTL | {"load_in_8bit": True, "adapter": "lora", "load_in_4bit": False}, "load_in_8bit", NEAR),
        (AXOLOTL | {"warmup_steps": 0.1}, "warmup_steps", TAKEN),
        (AXOLOTL | {"warmup_steps": 10.5}, "warmup_steps", LOST),
        (AXOLOTL | {"seed": [1]}, "seed", LOST),
        (AXOLOTL | {"lora_r": [8, 16]}, "lora_r", LOST),
        (AXOLOTL | {"datasets": [{"path": "x", "type": t} for t in ("alpaca", "sharegpt")]}, "datasets", NEAR),
        (AXOLOTL | {"adam_beta2": 0.95}, "adam_beta2", LOST),
        (AXOLOTL | {"adam_beta2": 0.999}, "adam_beta2", TAKEN),
        (AXOLOTL | {"plugins": ["axolotl.integrations.liger.LigerPlugin"]}, "plugins.LigerPlugin", FREE),
        (AXOLOTL | {"tensor_parallel_size": 2}, "tensor_parallel_size", LOST),
        (AXOLOTL | {"tensor_parallel_size": 1}, "tensor_parallel_size", FREE),
        (AXOLOTL | {"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow", LOST),
        (LLAMA | {"use_galore": True}, "use_galore", LOST),
        (LLAMA | {"stage": "dpo", "val_size": 100}, "val_size", LOST),
        (LLAMA | {"use_galore": False, "galore_rank": 8}, "use_galore", FREE),
        (LLAMA | {"dataset_dir": "nowhere"}, "dataset", NEAR),
    ],
)
def test_what_differs_says_so_in_its_row_and_in_the_recipes_comment(job, tmp_path, values, name, verdict):
    made = job(values)
    assert verdicts(made)[name] == verdict and all(row[3] for row in made.rows)
    comment = next(iter(sorted(made.write(tmp_path / "mine").iterdir()))).read_text()
    assert (f"# {verdict}: {name} " in comment) == (verdict in (NEAR, LOST))


REFUSED = [
    (LLAMA | {"stage": "rm"}, "stage is rm"),
    (LLAMA | {"stage": "ppo"}, "stage is ppo"),
    (LLAMA | {"dataset": "pictures"}, "pictures, videos or sounds"),
    (LLAMA | {"dataset": "away"}, "outside of its folder"),
    (LLAMA | {"dataset": "nosuch"}, "nosuch"),
    (LLAMA | {"quantization_method": "hqq", "quantization_bit": 4}, "quantization_method is hqq"),
    (LLAMA | {"model_name_or_path": "org/base-GPTQ"}, "quantised by another quantiser"),
    (LLAMA | {"image_max_pixels": 4096}, "only text"),
    (LLAMA | {"do_predict": True}, "trains nothing"),
    (LLAMA | {"learning_rte": 1e-4}, "did you mean learning_rate"),
    (LLAMA | {"per_device_train_batch_size": "two"}, "not a valid whole number"),
    ({"model_name_or_path": "org/base", "infer_backend": "vllm"}, "names no dataset"),
    (AXOLOTL | {"rl": "grpo"}, "rl is grpo"),
    (AXOLOTL | {"rl": "dpo", "adapter": None, "load_in_4bit": False}, "method is 'full'"),
    (AXOLOTL | {"datasets": [{"path": "org/x", "type": "input_output"}]}, "input_output"),
    (AXOLOTL | {"datasets": [{"path": "org/x", "type": "sharegpt", "data_files": ["a"]}]}, "data_files"),
    (AXOLOTL | {"datasets": [3]}, "3"),
    (AXOLOTL | {"datasets": [{"path": "org/x", "type": ["alpaca"]}]}, "alpaca"),
    (AXOLOTL | {"datasets": [{"path": "org/x", "type": {"field_output": [1]}}]}, "field_output"),
    (AXOLOTL | {"datasets": [{"path": "x", "type": t} for t in ("alpaca", "completion")]}, "alpaca, completion"),
    (AXOLOTL | {"base_model": ["org/a", "org/b"]}, "not a valid text"),
    (AXOLOTL | {"base_model": "https://user:word@host/base"}, "names a user or a password"),
    (AXOLOTL | {"processor_type": "AutoProcessor"}, "only text"),
    (AXOLOTL | {"unfrozen_parameters": ["lm_head"]}, "chosen weights"),
    (AXOLOTL | {"plugins": ["org.Strange"]}, "plugins.Strange"),
    ({"compute_environment": "LOCAL_MACHINE"}, "no training job"),
    ("base_model: a\nbase_model: b\n", "twice"),
    ("base_model: !!python/object/apply:os.mkdir [ran]\n", "the tag"),
    ("base_model: &x a\nadapter: *x\n", "alias"),
    ("- base_model", "holds a list"),
    ("base_model: " + "[" * 3000, "nested"),
    ("\x00", "cannot be read"),
]


@pytest.mark.parametrize("values, said", REFUSED, ids=[said for _, said in REFUSED])
def test_a_job_that_cannot_be_a_recipe_is_one_error_message_and_writes_nothing(
    job, tmp_path, values, said, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TunebookError, match=said):
        job(values)
    assert command_line.main(["import", "job.yaml", "--out", "mine"]) == 1
    error = capsys.readouterr().err
    assert said in error and error.strip().count("\n") == 0 and sorted(os.listdir()) == ["data", "job.yaml"]


def test_the_command_prints_the_table_and_hides_secrets_and_escapes(job, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job(AXOLOTL | {"comet_api_key": "sk-123", "x_setting": "a\x1b[2J\nb: c"})
    assert command_line.main(["import", "job.yaml", "--out", "mine"]) == 0
    said = capsys.readouterr().out
    assert "taken over" in said and "not needed. Written to mine" in said
    written = (tmp_path / "mine" / "data.yaml").read_text()
    assert "sk-123" not in said + written and "\x1b" not in said + written and "\nb: c" not in written
