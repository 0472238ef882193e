"""The recipes of published jobs: each planned for every GPU, and run on a small model of its architecture, 01 to 05."""

import json
import random
import shutil
from dataclasses import replace

import pytest

from helpers import params
from helpers.data import prepare
from helpers.errors import TunebookError
from helpers.evaluate import evaluation
from helpers.gguf import export
from helpers.planner import cost_model
from helpers.planner import plan as planner
from helpers.train import config, training
from tests.conftest import PROJECT

EIGHT_B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES = {
    "Llama-2-7b": (
        "LlamaConfig",
        EIGHT_B | {"intermediate_size": 11008, "vocab_size": 32000, "num_key_value_heads": 32},
    ),
    "Mistral-7B": ("MistralConfig", EIGHT_B | {"vocab_size": 32000, "num_key_value_heads": 8, "sliding_window": 4096}),
    "lama-3": ("LlamaConfig", EIGHT_B | {"vocab_size": 128256, "num_key_value_heads": 8}),  # Llama-3-8B and 3.1
}
PUBLISHED = ("unsloth-llama3-8b-alpaca", "hf-mistral-7b-alpaca", "hf-llama3-8b-alpaca", "orpo-llama3-8b")
PUBLISHED += ("llama-factory-lora", "llama-factory-full-4gpu", "llama-factory-pretrain", "llama-factory-dpo")
PUBLISHED += ("llama-factory-merge", "finetome-llama31-8b", "axolotl-sql-llama2-7b", "documents-to-expert")
GPUS = (("T4", 1), ("L4", 1), ("A100-40", 1), ("A100-80", 1), ("A100-80", 4))
LORA16, FULL = {"T4"}, {"T4", "L4", "A100-40", "A100-80"}  # where a job of this method does not fit one GPU
DOES_NOT_FIT = {name: LORA16 for name in PUBLISHED if name.startswith("llama-factory")} | {
    "llama-factory-full-4gpu": FULL
}


@pytest.fixture(scope="session")
def real_sizes(tmp_path_factory):
    """Folders with the config.json of the real models and no weights."""
    import transformers

    made = {}
    for name, (kind, sizes) in SIZES.items():
        made[name] = tmp_path_factory.mktemp(name)
        getattr(transformers, kind)(**sizes, max_position_embeddings=8192).save_pretrained(made[name])
    return made


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_is_planned_for_every_gpu_and_refused_only_where_its_method_cannot_fit(name, real_sizes):
    recipe = params.recipe(name)
    folder = next(folder for part, folder in real_sizes.items() if part.lower() in recipe["data"].model.lower())
    stage = "orpo" if "orpo" in recipe else "sft"
    draw, longest = random.Random(0), recipe["data"].max_length
    lengths = [draw.randint(60, longest) for _ in range(200)]
    refused = set()
    for gpu, world in GPUS:
        chosen = replace(recipe[stage], plan_for=gpu)
        try:
            config.check(chosen, cost_model.card_named(gpu).capability)
            plan = planner.plan(chosen, lengths, folder, world)
            assert plan.peak_gib < plan.card.total_gib and plan.world_size == world and plan.seconds[0] > 0
        except TunebookError as error:
            assert (world == 1 and "set " in str(error)) or "use a" in str(error), error
            refused.add(gpu)
    assert refused == DOES_NOT_FIT.get(name, set())


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_says_where_it_comes_from_and_what_differs(name):
    head = (PROJECT / "notebooks" / "recipes" / name / "data.yaml").read_text().partition("\nmodel:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "Source: of this project" in head or ("https://" in head.partition("Source: ")[2] and "Differs: " in head)
    held = params.recipe(name)["data"].test_share or params.recipe(name)["data"].eval_share
    assert "held out" in head or name == "documents-to-expert" or not held


SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
HF = (
    f"method qlora, double_quant true, rank 64, alpha 16, dropout 0.1, target_modules {SEVEN}, packing true, "
    "batch_unit packed, batch_size 24, optimizer paged_adamw_8bit, learning_rate 2e-4, schedule linear, "
    "warmup_steps 5, max_grad_norm 0.3, epochs 1, max_steps 0; data max_length 2048, chat_template alpaca, "
    "template_tokens eos"
)
FACTORY = (
    "batch_unit rows, epochs 3, schedule cosine, warmup_ratio 0.1, warmup_steps 0, precision bf16, optimizer adamw"
)
FACTORY_LORA = f"method lora, rank 8, alpha 16, dropout 0, target_modules all-linear, batch_size 8, {FACTORY}"
FACTORY_DATA = "; data max_length 2048, chat_template llama3, eval_share 0, dataset identity,alpaca_en_demo, seed 42"
PUBLISHED_SETTINGS = {  # recipe → settings of its training stage; then of other stages by their name
    "unsloth-llama3-8b-alpaca": f"rank 16, alpha 16, dropout 0, target_modules {SEVEN}, batch_unit rows, batch_size 8, "
    "warmup_steps 5, max_steps 60, learning_rate 2e-4, schedule linear, optimizer adamw_8bit, weight_decay 0.01, "
    "seed 3407, packing false, method qlora; data model unsloth/llama-3-8b-bnb-4bit, max_length 2048, eval_share 0, "
    "chat_template alpaca, template_tokens eos, dataset yahma/alpaca-cleaned, train_on everything",
    "hf-mistral-7b-alpaca": HF + ", model mistralai/Mistral-7B-v0.1",
    "hf-llama3-8b-alpaca": HF + ", model meta-llama/Meta-Llama-3-8B",
    "orpo-llama3-8b": f"method qlora, rank 16, alpha 32, dropout 0.05, target_modules {SEVEN}, learning_rate 8e-6, "
    "schedule linear, beta 0.1, max_length 1024, max_prompt_length 512, batch_unit rows, batch_size 8, epochs 1, "
    "optimizer paged_adamw_8bit, warmup_steps 10, eval_steps 0, loggers wandb, loss orpo, start_from base; "
    "data chat_template chatml, template_tokens add, preference_eval_share 0.01, max_length 1024, shuffle true",
    "finetome-llama31-8b": f"rslora true, rank 16, alpha 16, dropout 0, target_modules {SEVEN}, packing true, "
    "batch_unit packed, batch_size 16, learning_rate 3e-4, schedule linear, warmup_steps 10, optimizer adamw_8bit, "
    "weight_decay 0.01, seed 0, epochs 1; data chat_template chatml, template_tokens add, max_length 2048, seed 0, "
    "model meta-llama/Llama-3.1-8B; gguf quantizations q2_k,q3_k_m,q4_k_m,q5_k_m,q6_k,q8_0, outputs merged,gguf, "
    "publish_dry_run true",
    "axolotl-sql-llama2-7b": "method qlora, rank 32, alpha 16, dropout 0.05, target_modules all-linear, precision "
    "fp16, batch_unit rows, batch_size 8, optimizer paged_adamw_32bit, schedule cosine, learning_rate 2e-4, "
    "warmup_steps 10, eval_steps 20; data format context_qa, chat_template context_qa, eval_share 0.01, "
    "max_length 2048, model NousResearch/Llama-2-7b-hf, train_on last",
    "llama-factory-full-4gpu": f"method full, batch_size 8, learning_rate 1e-5, {FACTORY}{FACTORY_DATA}",
    "llama-factory-lora": f"learning_rate 1e-4, {FACTORY_LORA}{FACTORY_DATA}",
    "llama-factory-merge": f"learning_rate 1e-4, {FACTORY_LORA}{FACTORY_DATA}; gguf outputs merged",
    "llama-factory-pretrain": f"learning_rate 1e-4, train_on all, {FACTORY_LORA.replace(' rows', ' packed')}; "
    "data max_length 2048, dataset c4_demo, train_on everything, over_long split",
    "llama-factory-dpo": f"loss dpo, beta 0.1, learning_rate 5e-6, max_length 2048, {FACTORY_LORA}; "
    "data dataset dpo_en_demo, chat_template llama3",
}


@pytest.mark.parametrize("name", PUBLISHED_SETTINGS)
def test_the_published_settings_are_as_published(name):
    recipe = params.recipe(name)
    trained = "orpo" if "orpo" in recipe else "sft"
    for place, settings in enumerate(PUBLISHED_SETTINGS[name].split("; ")):
        stage = settings.split()[0] if place else trained
        for one in settings.removeprefix(f"{stage} " if place else "").split(", "):
            key, value = one.split(" ")
            assert getattr(recipe[stage], key) == params.find(stage, key).check(value), one


# ---------------------------------------------------------------- two steps, 01 to 05

# GPU-only settings that the CPU's stand-in has no kernels for, and the network.
HERE = {"precision": "fp32", "optimizer": "adamw", "loggers": "", "max_steps": 2, "batch_size": 2, "eval_rows": 2}
HERE |= {"eval_steps": 0, "micro_batch": 0, "accumulation": 0, "early_stopping": 0, "warmup_steps": 1}
DATA = {"max_length": 256, "eval_share": 0.15, "test_share": 0.15, "caps": "", "max_rows": 0}
GGUF = {"quantizations": "q8_0", "fidelity_tokens": 60, "fidelity_answers": 1, "task_questions": 2}
EVAL = {"limit": 2, "max_new_tokens": 4, "general_text": "", "general_tasks": "", "general_chat": ""}


@pytest.fixture(scope="session")
def bare(narrow_llama, tmp_path_factory):
    """Random models of both architectures whose tokenizer has no chat template."""
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    llama = shutil.copytree(narrow_llama, tmp_path_factory.mktemp("bare") / "llama")
    (llama / "chat_template.jinja").unlink()
    mistral = tmp_path_factory.mktemp("bare") / "mistral"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    small = MistralConfig(**sizes, sliding_window=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    MistralForCausalLM(small).save_pretrained(mistral)
    tokenizer.save_pretrained(mistral)
    return {"llama": llama, "mistral": mistral}


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Rows in the shapes of the published sets, some described by a dataset_info.json as LLaMA-Factory's are."""
    folder = tmp_path_factory.mktemp("rows")
    ask = [f"What is {i} and {i + 1}?" for i in range(24)]
    alpaca = [
        {"instruction": q, "input": "in short" * (i % 2), "output": f"It is {2 * i + 1}."} for i, q in enumerate(ask)
    ]
    talks = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": f"It is {2 * i + 1}."}]}
        for i, q in enumerate(ask)
    ]
    question = [[{"role": "user", "content": q}] for q in ask]
    pairs = [
        {"prompt": q[0]["content"]}
        | {
            side: [*q, {"role": "assistant", "content": f"It {word} {i}."}]
            for side, word in (("chosen", "is"), ("rejected", "was"))
        }
        for i, q in enumerate(question)
    ]
    ranked = [
        {"conversations": [{"from": "human", "value": q}]}
        | {side: {"from": "gpt", "value": f"{word} {i}."} for side, word in (("chosen", "Yes,"), ("rejected", "No,"))}
        for i, q in enumerate(ask)
    ]
    sql = [
        {
            "context": f"CREATE TABLE t{i} (a INT)",
            "question": f"How many rows has t{i}?",
            "answer": f"SELECT COUNT(*) FROM t{i}",
        }
        | ({"unanswerable_question": f"Who made t{i}?"} if i % 3 == 0 else {})
        for i in range(24)
    ]
    words = ["river", "city", "bridge", "old", "harbour", "winter", "light", "boat", "market", "tower", "road", "north"]
    draw = random.Random(0)
    texts = [{"text": " ".join(draw.choice(words) for _ in range(60)) + f" number {i}."} for i in range(24)]
    found = {
        "alpaca_en_demo": alpaca,
        "identity": alpaca[:0] or [{"instruction": "Who are you?", "output": "A model."}],
    }
    found |= {"dpo_en_demo": ranked, "c4_demo": texts, "talks": talks, "pairs": pairs, "sql": sql, "alpaca": alpaca}
    for name, content in found.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    info = {name: {"file_name": f"{name}.json"} for name in ("identity", "alpaca_en_demo")}
    info["c4_demo"] = {"file_name": "c4_demo.json", "columns": {"prompt": "text"}}
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    info["dpo_en_demo"] = {
        "file_name": "dpo_en_demo.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": columns,
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


PUT_IN = {"orpo-llama3-8b": "pairs", "finetome-llama31-8b": "talks", "axolotl-sql-llama2-7b": "sql"}


def run(name, bare, rows, last="eval", **changes):
    """The recipe's stages on the small model of its architecture, two steps of each training; everything that neither
    the size, the rows nor the missing GPU forbids stays as the recipe says. Returns the manifests."""
    recipe, manifests = params.recipe(name), {}
    data = recipe["data"]
    given = DATA | {"model": str(bare["mistral" if "mistral" in data.model.lower() else "llama"])}
    if data.dataset_info:
        given["dataset_info"] = str(rows / "dataset_info.json")
    else:
        given["dataset"] = str(rows / f"{PUT_IN.get(name, 'alpaca')}.json")
    given |= {"preference_eval_share": 0.15} if "orpo" in recipe else {}
    lengths = {"orpo": {"max_length": 256, "max_prompt_length": 0 if "dpo" in name else 128}}
    for stage, chosen in recipe.items():
        new = {"data": given, "sft": HERE, "orpo": HERE | lengths["orpo"], "gguf": GGUF, "eval": EVAL}[stage]
        for key, value in {**new, **changes.get(stage, {}), "run": name}.items():
            setattr(chosen, key, value)
        if stage == "data":
            job = prepare.open(chosen)
            for step in ("read", "generate", "clean", "mix", "split", "template", "encode", "pairs"):
                getattr(job, step)()
            job.figures["vocabulary"] = {}
            manifests[stage] = job.finish()
        elif stage in ("sft", "orpo"):
            manifests[stage] = training.open(chosen).run()
        elif stage == "gguf":
            job = export.open(chosen)
            job.check()
            manifests[stage] = job.finish()
        else:
            job = evaluation.open(chosen)
            job.measure()
            job.scores()
            manifests[stage] = job.finish()
            assert {c["status"] for c in job.found["candidates"]} == {"scored"}, job.found["warnings"]
        if stage == last:
            break
    return manifests


@pytest.mark.parametrize("name", ["unsloth-llama3-8b-alpaca", "orpo-llama3-8b", "llama-factory-pretrain"])
def test_a_recipe_runs_whole_on_a_small_model_without_a_template(name, bare, rows, runs_root):
    done = run(name, bare, rows)
    trained = done["orpo" if "orpo" in done else "sft"]
    assert trained.metrics["steps"] == 2 and trained.metrics["last_loss"] > 0
    assert list(done) == list(params.recipe(name)) and done["eval"].metrics["candidates"]
    assert not [
        file for file in json.loads((done["gguf"].path / "fidelity.json").read_text())["files"] if file["failed"]
    ]


@pytest.mark.parametrize(
    "name, last",
    [
        ("hf-mistral-7b-alpaca", "sft"),
        ("finetome-llama31-8b", "sft"),
        ("axolotl-sql-llama2-7b", "sft"),
        ("llama-factory-lora", "sft"),
        ("llama-factory-full-4gpu", "sft"),
        ("llama-factory-dpo", "orpo"),
        ("llama-factory-merge", "gguf"),
    ],
)
def test_the_other_recipes_train_two_steps_on_a_small_model_without_a_template(name, last, bare, rows, runs_root):
    done = run(name, bare, rows, last)
    trained = done["orpo" if "orpo" in done else "sft"]
    assert trained.metrics["steps"] == 2 and trained.metrics["last_loss"] > 0
    template = params.recipe(name)["data"].chat_template
    assert done["data"].data["chat_template"]["name"] == template
    if last == "gguf":
        kept = {path.name for path in done["gguf"].path.iterdir()}
        assert "merged" in kept and not [file for file in kept if file.endswith(".gguf")]


def test_documents_become_an_expert_with_replay_against_forgetting(bare, rows, runs_root, proxy, tmp_path):
    import pyarrow.parquet as pq

    (tmp_path / "docs").mkdir()
    text = "The Danube flows through ten countries and ends in the Black Sea. It is 2,850 km long; {} boats use it. "
    for number in range(3):
        page = "".join(f"<p>{text.format(100 * number + i)}</p>" for i in range(3))
        (tmp_path / "docs" / f"{number}.html").write_text(f"<html><body><h1>Rivers {number}</h1>{page}</body></html>")
    given = {
        "dataset": str(tmp_path / "docs"),
        "endpoint": proxy.url,
        "endpoint_model": "SmolLM2-135M-Instruct.Q4_1",
        "pairs_per_document": 1,
    }
    given |= {
        "replay_dataset": str(rows / "talks.json"),
        "endpoint_key_name": "",
        "reject_limit": 1.0,
        "loss_limit": 1.0,  # a real model's answers: whether one of the three is in its document is its own affair
        "max_length": 512,
    }
    given |= {"chunk_tokens": 128, "chunk_overlap": 16, "test_share": 0.0, "eval_share": 0.0}
    done = run("documents-to-expert", bare, rows, "sft", data=given)
    sources = set(pq.read_table(done["data"].path / "train.parquet")["source"].to_pylist())
    assert "replay: talks" in sources and len(sources) > 1, sources
    assert done["sft"].metrics["steps"] == 2
