"""Settings of published jobs, through whole small jobs: whole modules, unpaired answers, cut prompts, experts."""

import json
import math
import shutil

import pytest
import torch
import train_data
from safetensors.torch import load_file

from helpers import runs
from helpers.errors import TunebookError
from helpers.model import merging
from helpers.model.loading import load_adapter, load_model
from helpers.train import examples, training


def job(stage, **given):
    if stage == "orpo":
        given = {"start_from": "base", **given}
    return training.open(train_data.settings(stage, **{"max_steps": 3, "epochs": 30, "eval_steps": 3, **given}))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embeddings_and_head_are_trained_whole_and_merged(
    runs_root, narrow_llama, untied_llama, tokenizer, tied, tmp_path
):
    base = narrow_llama if tied else untied_llama
    train_data.data_stage("r", base, tokenizer)
    given = {"precision": "auto", "modules_to_save": "embed_tokens, lm_head", "train_on": "all"}
    one = job("sft", learning_rate=1e-2, warmup_steps=1, dropout=0.1, **given)
    one.train()
    assert "stopped by themselves" in str(one.answers()) and any("trained whole, in fp32" in note for note in one.notes)
    whole = [p for n, p in one.model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert all(p.dtype == torch.float32 for p in whole)
    assert len({p.data_ptr() for p in whole}) == (1 if tied else 2)
    adapter = one.finish().path / "adapter"
    saved = {name for name in load_file(adapter / "adapter_model.safetensors") if "lora_" not in name}
    assert any("embed_tokens" in name for name in saved) and (tied or any("lm_head" in name for name in saved))
    merged = merging.merge(base, adapter, tmp_path / "merged")
    ids = torch.tensor([[5, 9, 200, 31, 7]])
    with torch.no_grad():
        found = load_model(merged.path, dtype="fp32").eval()(ids).logits
        expected = load_adapter(load_model(base, dtype="fp32"), adapter).eval()(ids).logits
        before = load_model(base, dtype="fp32").eval()(ids).logits
    assert (found - expected).norm() < 0.2 * (expected - before).norm()


def test_a_module_that_is_no_embedding_and_no_head_is_refused(data):
    with pytest.raises(TunebookError, match="modules_to_save names wte; this model has embed_tokens"):
        job("sft", modules_to_save="wte").build()


def kto_rows(tokenizer, count):
    pairs = train_data.pair_rows(tokenizer, count)
    kept = [
        (pair, side) for n, pair in enumerate(pairs) for side in ("chosen", "rejected") if n % 3 or side == "chosen"
    ]
    return [
        {"id": f"{p['id']}{s}", "prompt_ids": p["prompt_ids"], "completion_ids": p[f"{s}_ids"], "label": s == "chosen"}
        for p, s in kept
    ]


def test_unpaired_answers_are_trained_where_there_are_some_and_pairs_apart_where_not(data, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    apart = job("orpo", loss="kto", batch_size=4)
    assert len(apart.train_rows) == 48 and sum(apart.train_rows["label"]) == 24
    assert "24 good and 24 bad answers, weighted 1 to 1" in str(apart.left_out())
    parquet.write_table(pa.Table.from_pylist(kto_rows(tokenizer, 30)), data.path / "kto.parquet")
    train, held_out, counts = examples.read(data, train_data.settings("orpo", loss="kto"))
    assert len(train) + len(held_out) == 50 == counts["train"]["answers"] and 0 < len(held_out) < 20
    assert not {str(p) for p in train["prompt_ids"]} & {str(p) for p in held_out["prompt_ids"]}
    good = sum(train["label"])
    assert f"{good} good and {len(train) - good} bad answers" in counts["train"]["balance"]
    assert "undesirable_weight" in counts["train"]["balance"]
    one = job("orpo", loss="kto", batch_size=6)
    one.train()
    assert math.isfinite(one.result["last_loss"]) and len(one.train_rows) == len(train)


def test_long_prompts_of_pairs_lose_their_beginning_and_are_counted(data):
    whole = examples.read(data, train_data.settings("orpo"))[0]["prompt_ids"]
    limit = sorted(map(len, whole))[len(whole) // 2]
    train, _, counts = examples.read(data, train_data.settings("orpo", max_prompt_length=limit))
    assert [list(p) for p in train["prompt_ids"]] == [list(p[-limit:]) for p in whole]
    assert counts["train"]["prompts cut"] == sum(len(p) > limit for p in whole) > 0
    assert "prompts cut" in str(job("orpo", max_prompt_length=limit).left_out())


def test_a_mixture_of_experts_trains_answers_and_balances_by_document(runs_root, tokenizer, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        pad_token_id=0,
        max_position_embeddings=2048,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    train_data.data_stage("r", tmp_path / "moe", tokenizer)
    found = {}
    for weight, accumulation in ((0.0, 1), (0.5, 1), (0.5, 4)):
        one = job(
            "sft", router_aux_loss=weight, accumulation=accumulation, max_steps=1, eval_steps=1, learning_rate=1e-6
        )
        one.build()
        one.trainer.train()
        logged = {k: v for line in one.trainer.state.log_history for k, v in line.items()}
        found[weight, accumulation] = logged["loss"], logged["eval_loss"]
        one.stage.path.joinpath("log.jsonl").unlink(missing_ok=True)
        one.result = {"steps": 1}
        assert "stopped by themselves" in str(one.answers())
        shutil.rmtree(one.checkpoints, ignore_errors=True)
        runs.unlock("r", "sft")
    plain, one, four = (found[key] for key in ((0.0, 1), (0.5, 1), (0.5, 4)))
    assert one == pytest.approx(four, rel=1e-5) and one[1] == pytest.approx(plain[1], rel=1e-5)
    assert one[0] - plain[0] > 0.4  # twice the experts chosen: at least 0.5 · 2 · (1/4 · 4) / 2


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rows_on_both_sides_of_a_rotary_limit_are_refused_before_loading(
    narrow_llama, runs_root, tokenizer, tmp_path, kind
):
    """transformers takes the frequencies of the longest example for a whole batch."""
    folder, rows = tmp_path / "base", train_data.sft_rows(tokenizer, 12)
    sizes = sorted(len(row["input_ids"]) for row in rows)
    assert sizes[0] < sizes[-1]
    shutil.copytree(narrow_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [2.0] * half} if kind == "longrope" else {"factor": 2.0}
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": sizes[-2], **factors}
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    train_data.data_stage("r", str(folder), tokenizer, rows, rows[:2])
    with pytest.raises(TunebookError, match=f"are longer than {sizes[-2]} tokens.*set max_length to {sizes[-2]} in"):
        training.open(train_data.settings("sft"))
    training.open(train_data.settings("sft", packing=False, micro_batch=1))
