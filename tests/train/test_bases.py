"""Bases of other kinds through training, export and evaluation: packed in 4 bits, with tokens added, with experts."""

import json
import shutil

import pytest
import train_data

from helpers import params as parameters
from helpers import runs
from helpers.data import vocabulary
from helpers.errors import TunebookError
from helpers.evaluate import candidates
from helpers.gguf import export, preflight
from helpers.model import loading, merging, weights
from helpers.train import methods, training
from tests.model.test_weights import pack

TRAINED = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_rows": 2, "batch_size": 2, "learning_rate": 1e-2}


def settings(**given):
    return train_data.settings("sft", **{**TRAINED, **given})


def exported(proven=True, **given):
    """The GGUF stage's job after its files were proven, or the merge alone."""
    small = {"run": "r", "quantizations": "q8_0", "fidelity_tokens": 60, "fidelity_answers": 1, "task_questions": 0}
    job = export.open(parameters.resolve("gguf", {**small, **given}))
    job.check()
    (job.prove if proven else job.merge)()
    return job


def logprobs(model, ids):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().log_softmax(-1)


def divergence(wanted, found):
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.fixture
def packed(runs_root, narrow_llama, tokenizer, tmp_path):
    """Run "r" with data for the small model as bitsandbytes packs it."""
    folder = pack(narrow_llama, tmp_path / "small-bnb-4bit", tokenizer)
    train_data.data_stage("r", folder, tokenizer)
    return folder


def test_a_packed_base_is_trained_resumed_exported_and_judged(packed, narrow_llama, tokenizer):
    job = training.open(settings(method="lora"))
    held = weights.Weights(packed).stored_bytes
    assert job.planned.shape.stored == held and job.planned.setting.quantize == "nf4"
    job.train()
    assert any("own 4-bit weights" in note for note in job.notes)
    whole = {n: p.detach().clone() for n, p in job.model.named_parameters() if p.requires_grad}
    shutil.rmtree(job.checkpoints / "checkpoint-4")  # killed after the second step
    runs.unlock("r", "sft")
    again = training.open(settings(method="lora"))
    again.train()
    assert all((whole[n] - p).abs().max() < 1e-5 for n, p in again.model.named_parameters() if p.requires_grad)
    ids = tokenizer("Which rivers have length_km above 30? SELECT")["input_ids"]
    tuned = logprobs(again.model.eval(), ids)
    adapter = again.finish().path / "adapter"

    job = exported()
    assert "4-bit weights, unpacked" in repr(job.check()) and job.results[0].type == "f16"
    merged = logprobs(loading.load_model(job.merged, dtype="fp32"), ids)
    assert divergence(tuned, merged) < 1e-3
    job.finish()
    sft = candidates.Candidate("sft", "sft", "hf", "sft", packed, adapter)
    with candidates.Session(sft, "answers") as session:
        judged = logprobs(session.reader.model, ids)
    assert divergence(judged, merged) < 1e-3

    job = exported(False, model_16bit=str(narrow_llama), again=True)
    assert "the 16-bit base" in repr(job.check())
    onto_16 = logprobs(loading.load_model(job.merged, dtype="fp32"), ids)
    original = merging.merge(narrow_llama, adapter, job.work / "wanted").path
    assert divergence(logprobs(loading.load_model(original, dtype="fp32"), ids), onto_16) < 1e-6
    assert divergence(tuned, onto_16) > divergence(tuned, merged)


def test_what_a_packed_base_cannot_do_is_refused(packed, untied_llama):
    for given, words in (
        ({"method": "full"}, "method is 'full', which needs 16-bit weights"),
        ({"init": "loftq", "method": "qlora"}, "init is 'loftq', which needs 16-bit weights"),
    ):
        with pytest.raises(TunebookError, match=words):
            training.open(settings(**given)).build()
        runs.unlock("r", "sft")
    for given, words in (
        ({"merge_onto": "16bit"}, "holds only 4-bit weights; name the 16-bit model"),
        ({"model_16bit": str(untied_llama)}, "is not what the base .* was quantised from"),
        ({"model_16bit": "no/such_model"}, "no/such_model"),
    ):
        with pytest.raises(TunebookError, match=words):
            export.open(parameters.resolve("gguf", {"run": "r", "export": "base", **given}))
    unpacked = exported(False, export="base").merged
    assert not weights.Weights(unpacked).states


def test_added_tokens_of_an_untied_model_are_the_same_everywhere(runs_root, untied_llama, smollm2):
    own, tokens = loading.load_tokenizer(smollm2), "kilohertz,<|sql|>"
    added = vocabulary.add_tokens(None, own, tokens)
    rows = train_data.sft_rows(own, 8)
    for row in rows:
        row["input_ids"] = [*row["input_ids"][:-2], *added, *row["input_ids"][-2:]]
        row["completion_mask"] = [*row["completion_mask"], 1, 1]
    train_data.data_stage("r", untied_llama, own, rows, rows[:2], add_tokens=tokens)
    job = training.open(settings(method="lora"))
    job.train()
    model = job.model.eval()
    trained = {name.split(".")[-4] for name, p in model.named_parameters() if "trainable_tokens" in name}
    assert trained == {"embed_tokens", "lm_head"}
    ids = [*own("How many lakes? SELECT")["input_ids"], *added, 5]
    tuned = logprobs(model, ids)
    adapter = job.finish().path / "adapter"
    base = loading.load_model(untied_llama, dtype="fp32")
    assert vocabulary.add_tokens(base, loading.load_tokenizer(smollm2), tokens) == added
    again = logprobs(loading.load_adapter(base, adapter), ids)
    assert divergence(tuned, again) < 1e-5
    head = weights.header(adapter / "adapter_model.safetensors")
    assert any("lm_head" in name and entry.shape[0] == 2 for name, entry in head.items())
    made = exported(False)
    merged = logprobs(loading.load_model(made.merged, dtype="fp32"), ids)
    assert divergence(again, merged) < 1e-4
    sft = candidates.Candidate("sft", "sft", "hf", "sft", untied_llama, adapter)
    with candidates.Session(sft, "answers") as session:
        assert divergence(merged, logprobs(session.reader.model, ids)) < 1e-4


def test_added_tokens_use_the_free_rows_of_a_padded_embedding(tokenizer, smollm2, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for tied in (True, False):
        config = LlamaConfig(vocab_size=len(tokenizer) + 64, tie_word_embeddings=tied, **size)
        folder = tmp_path / str(tied)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        own, model = loading.load_tokenizer(smollm2), loading.load_model(folder, dtype="fp32")
        added = vocabulary.add_tokens(model, own, "kilohertz")
        assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 64
        assert added == [len(tokenizer)]
        params = settings(target_modules="q_proj")
        wrapped = methods._new_adapter(model, params, loading.ModelSource("x", folder, "", "folder"), added)
        with torch.no_grad():
            for name, weight in wrapped.named_parameters():
                if "trainable_tokens" in name:
                    weight.add_(1.0)
        wanted = logprobs(wrapped, [5, *added, 6])
        methods.save(wrapped, own, tmp_path / f"{tied}-adapter")
        merged = merging.merge(folder, tmp_path / f"{tied}-adapter", tmp_path / f"{tied}-merged").path
        assert json.loads((merged / "config.json").read_text())["vocab_size"] == len(tokenizer) + 64
        assert divergence(wanted, logprobs(loading.load_model(merged, dtype="fp32"), [5, *added, 6])) < 1e-4


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_training(tokenizer, smollm2, tmp_path):
    from tests.conftest import random_llama

    folder = random_llama(tmp_path / "model", tokenizer, hidden_size=64, intermediate_size=64)
    larger = loading.load_tokenizer(smollm2)
    larger.add_tokens([f"word{n}" for n in range(7)])
    larger.save_pretrained(folder)
    with pytest.raises(TunebookError, match=r"7 of its tokens, 'word0' first, have no row in the embedding of 49,152"):
        preflight.check(folder, where=tmp_path).require()


def foreign(kind, folder, tokenizer):
    """A base in `folder` that is no causal language model."""
    import transformers as t

    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"vocab_size": len(tokenizer)}
    pair = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    pair |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": len(tokenizer)}
    image = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    seq = {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "vocab_size": len(tokenizer)}
    llama, untied = t.LlamaConfig(**size), {"tie_word_embeddings": False, "num_labels": 1, "pad_token_id": 0}
    made = {
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**seq)),
        "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**pair)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**size)),
        "xlnet": lambda: t.XLNetLMHeadModel(
            t.XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=32, vocab_size=len(tokenizer))
        ),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**image)),
        "reward": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**size, **untied)),
        "tied reward": lambda: t.Qwen2ForSequenceClassification(
            t.Qwen2Config(**size, num_key_value_heads=1, **untied | {"tie_word_embeddings": True})
        ),
        "no head": lambda: t.LlamaModel(llama),
    }
    made.get(kind, lambda: t.LlamaForCausalLM(llama))().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    changes = {"unknown": {"model_type": "frobnicate"}, "none": {"model_type": None}, "nothing": dict.fromkeys(config)}
    config = {k: v for k, v in (config | changes.get(kind, {})).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("t5", "type t5 has an encoder beside its decoder"),
        ("bart", "type bart has an encoder beside its decoder"),
        ("bert", "type bert reads a text in both directions"),
        ("xlnet", "type xlnet reads a text in both directions"),
        ("vit", "type vit is a ViTForImageClassification, whose head predicts no next token"),
        ("reward", "is a LlamaForSequenceClassification, whose head predicts no next token"),
        ("tied reward", "is a Qwen2ForSequenceClassification, whose head predicts no next token"),
        ("no head", r"lacks lm_head.weight \[49152, 32\]; these would be random numbers"),
        ("unknown", "model type `frobnicate`"),
        ("none", "Should have a `model_type` key in its config.json"),
        ("nothing", "Should have a `model_type` key in its config.json"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_before_its_weights_are_loaded(
    kind, words, runs_root, tokenizer, tmp_path
):
    folder = foreign(kind, tmp_path / "model", tokenizer)
    rows, pairs = train_data.sft_rows(tokenizer, 2), train_data.pair_rows(tokenizer, 2)
    train_data.data_stage("r", folder, tokenizer, rows, rows, pairs, pairs)
    with pytest.raises(TunebookError, match=words):
        training.open(settings())


# ---------------------------------------------------------------- experts and vision parts


def sizes(**more):
    size = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return {**size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more}


def families():
    import transformers as t

    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    head = {"head_dim": 16}
    deepseek = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    yarn = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return {
        "mixtral": t.MixtralConfig(**sizes(num_local_experts=3)),
        "qwen3_moe": t.Qwen3MoeConfig(**sizes(num_experts=3, **experts, **head)),
        "olmoe": t.OlmoeConfig(**sizes(num_experts=3, num_experts_per_tok=2)),
        "gpt_oss": t.GptOssConfig(**sizes(num_local_experts=3, num_experts_per_tok=2, **head, **yarn)),
        "granitemoe": t.GraniteMoeConfig(**sizes(num_local_experts=3, num_experts_per_tok=2)),
        "deepseek_v3": t.DeepseekV3Config(
            **sizes(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, **experts, **deepseek)
        ),
        "gemma3": t.Gemma3Config(
            text_config=t.Gemma3TextConfig(**sizes(**head)),
            vision_config=t.SiglipVisionConfig(**vision),
            mm_tokens_per_image=4,
        ),
        "mistral3": t.Mistral3Config(
            text_config=t.MistralConfig(**sizes(**head)), vision_config=t.PixtralVisionConfig(**vision, head_dim=8)
        ),
        "qwen3_5": t.Qwen3_5Config(
            text_config=t.Qwen3_5TextConfig(**sizes(**head, num_hidden_layers=4)),
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
            },
        ),
    }


WHOLE = ("gemma3", "mistral3", "qwen3_5")  # saved with their vision part, as the hub has them
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "deepseek_v3", *WHOLE)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_language_models_with_a_vision_part_merge_into_what_was_trained(family, tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    config = families()[family]
    made = getattr(transformers, config.architectures[0]) if config.architectures else None
    whole = {"gemma3": "Gemma3", "mistral3": "Mistral3", "qwen3_5": "Qwen3_5"}.get(family)
    made = getattr(transformers, f"{whole}ForConditionalGeneration") if whole else loading.auto_class(config)
    model = made(config) if whole else made.from_config(config)
    base = tmp_path / "base"
    model.to(torch.bfloat16).save_pretrained(base, max_shard_size="60KB")
    ids = list(range(5, 25))
    plain = logprobs(loading.load_model(base, dtype="fp32"), ids)
    source = loading.ModelSource(family, base, "", "folder")
    model = methods._new_adapter(loading.load_model(base, dtype="fp32"), settings(), source, [])
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert not [name for name in trained if "vision" in name or "visual" in name or "projector" in name]
    if family not in WHOLE:
        assert [name for name in trained if "experts" in name]
    with torch.no_grad():
        for weight in (w for w in model.parameters() if w.requires_grad):
            weight.add_(torch.randn_like(weight) * 0.1)
    wanted = logprobs(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    merged = merging.merge(base, tmp_path / "adapter", tmp_path / "merged")
    found = logprobs(loading.load_model(merged.path, dtype="fp32"), ids)
    assert divergence(wanted, found) < 1e-4 < 0.002 < divergence(wanted, plain)
    again = loading.load_adapter(loading.load_model(base, dtype="fp32"), tmp_path / "adapter")
    assert divergence(wanted, logprobs(again, ids)) < 1e-8
    before, after = weights.Weights(base), weights.Weights(merged.path)
    assert {n: before.shape(n) for n in before.entries} == {n: after.shape(n) for n in after.entries}
    kept = [n for n in before.entries if any(part in n for part in ("vision", "visual", "projector", "norm"))]
    assert kept and all(torch.equal(before.read(n), after.read(n)) for n in kept)
    assert (merged.path / "config.json").read_bytes() == (base / "config.json").read_bytes()
