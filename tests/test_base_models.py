"""Base models without a chat template through all stages: turn tokens added, left as text, and plain text completed."""

import json
import random
import shutil
from pathlib import Path

import pytest

from helpers import __main__ as command_line
from helpers import params, publish, runs, serve
from helpers.data import prepare
from helpers.errors import TunebookError
from helpers.evaluate import evaluation
from helpers.gguf import export, header
from helpers.model import weights
from helpers.model.loading import load_model, load_tokenizer, template_hash
from helpers.train import training

WORDS = (
    "the",
    "river",
    "city",
    "bridge",
    "old",
    "harbour",
    "winter",
    "light",
    "boat",
    "market",
    "tower",
    "road",
    "north",
)


@pytest.fixture(scope="module")
def bare(narrow_llama, tmp_path_factory):
    """A random Llama whose tokenizer has no chat template."""
    folder = shutil.copytree(narrow_llama, tmp_path_factory.mktemp("bare") / "model")
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).chat_template is None
    return folder


def sums(path):
    rows = [{"instruction": f"Add {i} and {i}.", "input": "", "output": f"It is {2 * i}."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(path):
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choice(WORDS) for _ in range(40)) + f" number {i}."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(base, dataset, **given):
    """The finished data stage of run "b"."""
    nothing = dict.fromkeys(("test_dataset", "preference_dataset", "database"), "")
    settings = {"eval_share": 0.15, "test_share": 0.15, "near_duplicates": 0.0, "max_length": 128, **nothing, **given}
    job = prepare.open(params.resolve("data", {"run": "b", "model": str(base), "dataset": str(dataset), **settings}))
    for step in ("read", "generate", "clean", "mix", "split", "template", "encode", "pairs"):
        getattr(job, step)()
    job.figures["vocabulary"] = {}
    return job, job.finish()


def trained(**given):
    settings = {"run": "b", "method": "lora", "precision": "fp32", "rank": 4, "max_steps": 2, "batch_size": 4, **given}
    return training.open(params.resolve("sft", settings)).run()


def exported():
    settings = {"run": "b", "quantizations": "f16,q8_0", "fidelity_tokens": 100, "fidelity_answers": 2}
    job = export.open(params.resolve("gguf", settings))
    job.check()
    return job.finish()


def judged(tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"question": "2+2", "choices": ["4", "5"], "answer": 0}\n')
    settings = {"run": "b", "candidates": "base,sft,gguf", "limit": 2, "max_new_tokens": 4, "general_text": ""}
    settings |= {"general_tasks": str(tmp_path / "tasks.jsonl")}
    job = evaluation.open(params.resolve("eval", settings))
    job.measure()
    job.scores()
    job.sides()
    job.finish()
    return job.found


def test_added_turn_tokens_go_through_training_export_and_evaluation(runs_root, bare, tmp_path):
    _, data = prepared(bare, sums(tmp_path / "sums.jsonl"), chat_template="gemma", template_tokens="add", system="Add.")
    chosen = data.data["chat_template"]
    assert (chosen["tokens"], chosen["added"]) == ("add", ["<start_of_turn>", "<end_of_turn>"])
    tokenizer = load_tokenizer(data.path / "tokenizer")
    assert template_hash(tokenizer) == data.data["template_hash"] and tokenizer.eos_token == "<end_of_turn>"
    with pytest.raises(TunebookError, match="adds tokens to the vocabulary, which the untrained base has no rows for"):
        export.open(params.resolve("gguf", {"run": "b", "export": "base"})).check()
    with pytest.raises(TunebookError, match="whose rows freeze does not train; set method to lora"):
        trained(method="freeze")
    shutil.rmtree(runs.folder("b", "sft"))
    sft = trained()
    assert any("2 added tokens" in note for note in sft.data["notes"])
    own = load_tokenizer(sft.path / "adapter")
    assert template_hash(own) == data.data["template_hash"] == sft.data["template_hash"]
    assert own.eos_token == "<end_of_turn>"
    config = json.loads((sft.path / "adapter" / "adapter_config.json").read_text())
    ids = tokenizer.convert_tokens_to_ids(chosen["added"])
    assert all(str(i) in json.dumps(config["trainable_token_indices"]) for i in ids)
    gguf = exported()
    found = header.check(gguf.path / "model-f16.gguf").metadata
    assert found["tokenizer.ggml.eos_token_id"] == ids[1] and "<start_of_turn>" in found["tokenizer.chat_template"]
    merged = json.loads((gguf.path / "merged" / "generation_config.json").read_text())
    assert (
        merged["eos_token_id"][0] == ids[1] and tokenizer.convert_tokens_to_ids("<|im_end|>") in merged["eos_token_id"]
    )
    assert json.loads((gguf.path / "merged" / "config.json").read_text())["eos_token_id"] == ids[1]
    proof = json.loads((gguf.path / "fidelity.json").read_text())["files"]
    assert not any(file["failed"] for file in proof) and "held-out 1" in proof[0]["prompt_shapes"]
    modelfile = (gguf.path / "Modelfile").read_text()
    assert 'PARAMETER stop "<end_of_turn>"' in modelfile and "<start_of_turn>model" in modelfile
    scores = judged(tmp_path)
    assert [c["status"] for c in scores["candidates"]] == ["scored"] * 4, scores["warnings"]
    assert scores["task"]["template_hash"] == data.data["template_hash"]
    (card,) = (one.card for one in publish.plan("b", "user/b", ["adapter"]))
    assert (
        "rendered with the chat template gemma, which is in this repository" in card and "own chat template" not in card
    )


def test_a_sentencepiece_base_gets_its_added_tokens_through_the_converter(runs_root, tmp_path, monkeypatch):
    """Llama 2's and Mistral's kind: the converter reads tokenizer.model, and what was added stands beside it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "gguf"))
    import gguf_models

    lines = [f"Add {i} and {i}. It is {2 * i}." for i in range(200)] + [" ".join(WORDS)] * 5
    tokenizer = gguf_models.sentencepiece_tokenizer(tmp_path / "spm", lines, special=(), prefix=True)
    tokenizer.chat_template = None
    base = gguf_models.make("llama", tmp_path / "base", tokenizer)
    _, data = prepared(base, sums(tmp_path / "sums.jsonl"), chat_template="chatml", template_tokens="add")
    assert data.data["chat_template"]["added"] == ["<|im_start|>", "<|im_end|>"]
    trained()
    gguf = exported()
    assert (gguf.path / "merged" / "tokenizer.model").is_file()
    found = header.check(gguf.path / "model-f16.gguf").metadata
    end = load_tokenizer(gguf.path / "merged").convert_tokens_to_ids("<|im_end|>")
    assert found["tokenizer.ggml.eos_token_id"] == end
    proof = json.loads((gguf.path / "fidelity.json").read_text())["files"]
    assert not any(file["failed"] for file in proof)


def test_plain_text_needs_no_template_in_any_stage(runs_root, bare, tmp_path, capsys, monkeypatch):
    job, data = prepared(bare, texts(tmp_path / "texts.jsonl"), format="text")
    assert "none, and plain text needs none" in repr(job.template()) and data.data["chat_template"] == {}
    trained()
    gguf = exported()
    assert 'TEMPLATE """{{ .Prompt }}"""' in (gguf.path / "Modelfile").read_text()
    proof = json.loads((gguf.path / "fidelity.json").read_text())["files"]
    assert not any(file["failed"] for file in proof) and proof[0]["answers"] == 2 and not proof[0]["prompt_shapes"]
    scores = judged(tmp_path)
    assert scores["task"]["kind"] == "text" and scores["task"]["data"].endswith("eval.parquet")
    assert "general_chat is left out" in capsys.readouterr().out
    for candidate in scores["candidates"]:
        perplexity = candidate["scores"]["perplexity"]
        assert perplexity["low"] <= perplexity["value"] <= perplexity["high"] and perplexity["value"] > 1000
    assert "perplexity" in scores["headline"] and scores["harness"]
    lines = iter(["the old river", "the old river " * 1200, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert command_line.main(["chat", "b", "--max-tokens", "4"]) == 0
    said = capsys.readouterr().out
    with serve.start("b") as server:
        (made,) = server.post("/v1/completions", {"prompt": "the old river", "max_tokens": 4})["choices"]
    assert "completes plain text" in said and f"\n{made['text']}\n" in said and "No answer" in said
    cards = {one.kind: one.card for one in publish.plan("b", "user/b")}
    assert all("completes plain text" in card and '"role"' not in card for card in cards.values())
    assert not any("chat template" in card.lower() for card in cards.values())


def test_a_row_for_padding_alone_does_not_put_the_whole_embedding_into_the_adapter(runs_root, bare, tmp_path):
    base = shutil.copytree(bare, tmp_path / "one-special-token")
    known = json.loads((base / "tokenizer_config.json").read_text())
    one = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    (base / "tokenizer_config.json").write_text(json.dumps(known | one))
    prepared(base, sums(tmp_path / "sums.jsonl"), chat_template="alpaca", template_tokens="eos")
    trained()
    adapter = runs.folder("b", "sft") / "adapter"
    assert len(load_tokenizer(adapter)) > json.loads((base / "config.json").read_text())["vocab_size"]
    saved = [adapter, *(runs.folder("b", "sft") / "checkpoints").glob("checkpoint-*")]
    names = [name for folder in saved for name in weights.header(folder / "adapter_model.safetensors")]
    assert len(saved) > 1 and names and all("lora_" in name for name in names)
    gguf = exported()
    rows = weights.header(gguf.path / "merged" / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert rows == len(load_tokenizer(adapter))
    assert not any(file["failed"] for file in json.loads((gguf.path / "fidelity.json").read_text())["files"])


def test_conversations_without_a_template_are_refused_with_what_to_set(runs_root, bare, tmp_path):
    with pytest.raises(TunebookError, match="no chat template; set chat_template in notebook 01"):
        prepared(bare, sums(tmp_path / "sums.jsonl"))
    assert not (runs.folder("b", "data") / "manifest.json").exists()


@pytest.mark.parametrize(
    "template", ["chatm", "{{ messages[0].content }}{{ eos_token }}", "{{ 1 }}\n{% for m in messages %}"]
)
def test_a_template_that_cannot_be_used_is_refused_before_anything_is_written(runs_root, bare, tmp_path, template):
    with pytest.raises(TunebookError, match=r"did you mean chatml|leaves out the answer|line 2"):
        prepared(bare, sums(tmp_path / "sums.jsonl"), chat_template=template)
    assert not list(runs_root.rglob("*.*"))


def test_a_base_with_another_vocabulary_is_refused_for_a_chosen_template(runs_root, bare, tmp_path):
    prepared(bare, sums(tmp_path / "sums.jsonl"), chat_template="alpaca")
    other = shutil.copytree(bare, tmp_path / "other")
    changed = load_tokenizer(bare)
    changed.add_tokens(["Brahmaputra"])
    changed.save_pretrained(other)
    with pytest.raises(TunebookError, match=r"1 of its tokens, 'Brahmaputra' first, have no row"):
        trained(model=str(other))
    model = load_model(other)
    model.resize_token_embeddings(len(changed))
    model.save_pretrained(other)
    with pytest.raises(TunebookError, match=r"vocabulary of .* is not the one"):
        trained(model=str(other))
    job = export.open(params.resolve("gguf", {"run": "b", "export": "base", "quantizations": "f16"}))
    job.merge()
    assert "### Instruction:" in load_tokenizer(job.merged).chat_template


def test_alpaca_rows_and_context_questions_get_their_templates_own_words(runs_root, bare, tmp_path):
    import pyarrow.parquet as pq

    def prompts(data):
        tokenizer = load_tokenizer(data.path / "tokenizer")
        rows = pq.read_table(data.path / "train.parquet")["input_ids"].to_pylist()
        return [tokenizer.decode(ids) for ids in rows]

    rows = [{"instruction": f"Say {i}.", "input": f"in {i}", "output": f"{i}"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, data = prepared(bare, tmp_path / "a.jsonl", chat_template="alpaca", test_share=0.0)
    assert all(".\n\n### Input:\nin " in text and ", paired with an input" in text for text in prompts(data))
    asked = {"context": "It rains.", "question": "Is it dry?", "answer": "No."}
    rows = [{**asked, "context": f"It rains, {i}.", "unanswerable_question": "Who asks?"} for i in range(20)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"chat_template": "context_qa", "format": "context_qa", "unanswerable": "Unknown.", "test_share": 0.0}
    _, data = prepared(bare, tmp_path / "c.jsonl", **given)
    made = prompts(data)
    head = "SYSTEM: Use the following contextual information to concisely answer the question.\n\nUSER: It rains, "
    assert all(text.startswith(head) and ".\n===\n" in text for text in made)
    ends = {text.partition("\n===\n")[2] for text in made}
    assert ends == {"Is it dry?\nASSISTANT: No.<|im_end|>", "Who asks?\nASSISTANT: Unknown.<|im_end|>"}
