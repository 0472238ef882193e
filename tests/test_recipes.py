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
    assert all(line.startswith("#") for line in head.splitlines()) and "Source: " in head
    assert "Differs: " in head or name == "documents-to-expert"


def test_the_published_settings_are_as_published():
    def of(name, stage, *names):
        chosen = params.recipe(name)[stage]
        return tuple(getattr(chosen, one) for one in names)

    lora, batch = ("rank", "alpha", "dropout"), ("batch_size", "batch_unit", "learning_rate", "schedule", "optimizer")
    steps = ("warmup_steps", "max_steps", "epochs")
    unsloth, seven = "unsloth-llama3-8b-alpaca", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    assert of(unsloth, "sft", *lora, *batch) == (16, 16, 0.0, 8, "rows", 2e-4, "linear", "adamw_8bit")
    assert of(unsloth, "sft", *steps, "weight_decay", "seed", "packing") == (5, 60, 1.0, 0.01, 3407, False)
    for name in ("hf-mistral-7b-alpaca", "hf-llama3-8b-alpaca"):
        assert of(name, "sft", *lora, *batch) == (64, 16, 0.1, 24, "packed", 2e-4, "linear", "paged_adamw_8bit")
        assert of(name, "sft", *steps, "max_grad_norm", "target_modules") == (5, 0, 1.0, 0.3, seven)
        assert of(name, "sft", "method", "double_quant") == ("qlora", True) and of(name, "data", "max_length") == (
            2048,
        )
    orpo = "orpo-llama3-8b"
    assert of(orpo, "orpo", *lora, *batch) == (16, 32, 0.05, 8, "rows", 8e-6, "linear", "paged_adamw_8bit")
    assert of(orpo, "orpo", "beta", "max_length", "max_prompt_length", "warmup_steps") == (0.1, 1024, 512, 10)
    assert of(orpo, "orpo", "loggers", "start_from") == ("wandb", "base")
    fine = "finetome-llama31-8b"
    assert of(fine, "sft", *lora, *batch) == (16, 16, 0.0, 16, "packed", 3e-4, "linear", "adamw_8bit")
    assert of(fine, "sft", "rslora", "warmup_steps", "seed") == (True, 10, 0)
    assert of(fine, "gguf", "quantizations") == ("q2_k,q3_k_m,q4_k_m,q5_k_m,q6_k,q8_0",)
    sql = "axolotl-sql-llama2-7b"
    assert of(sql, "sft", *lora, *batch) == (32, 16, 0.05, 8, "rows", 2e-4, "cosine", "paged_adamw_32bit")
    assert of(sql, "sft", "precision", "eval_steps", "warmup_steps") == ("fp16", 20, 10)
    assert of(sql, "data", "format", "chat_template", "eval_share") == ("context_qa", "context_qa", 0.01)
    for name, method, rate, stage in (
        ("lora", "lora", 1e-4, "sft"),
        ("full-4gpu", "full", 1e-5, "sft"),
        ("pretrain", "lora", 1e-4, "sft"),
        ("dpo", "lora", 5e-6, "orpo"),
    ):
        found = of(f"llama-factory-{name}", stage, "method", "learning_rate", "batch_size", "epochs", "warmup_ratio")
        assert found == (method, rate, 8, 3.0, 0.1)


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
        "max_length": 512,
    }
    given |= {"chunk_tokens": 128, "chunk_overlap": 16, "test_share": 0.0, "eval_share": 0.0}
    done = run("documents-to-expert", bare, rows, "sft", data=given)
    sources = set(pq.read_table(done["data"].path / "train.parquet")["source"].to_pylist())
    assert "replay: talks" in sources and len(sources) > 1, sources
    assert done["sft"].metrics["steps"] == 2
