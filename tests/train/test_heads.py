"""Every kind of head on packed rows: SFT and ORPO against plain transformers, one document at a time."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.errors import TunebookError
from helpers.model import chunked_loss, fused_lora, packed_attention
from helpers.train.rows import PairCollator, RowCollator

SIZE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_group": 2, "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
GRANITE = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32, "logits_scaling": 2.0}
FAMILIES = {
    "llama": {},
    "gemma2": {
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": None,
        "query_pre_attn_scalar": 8,
        "head_dim": 8,
    },
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 4096},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "qwen3_moe": {"num_experts": 4, "norm_topk_prob": True, "output_router_logits": True, **EXPERTS},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "logits_scaling": 2.0,
        "output_router_logits": True,
    },
    "granitemoehybrid": {**GRANITE, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4},
    "phi3": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "falcon_h1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8},
    "deepseek_v3": {**GROUPS, **LATENT, **EXPERTS, "num_key_value_heads": 4},
    "glm4_moe": {**GROUPS, **EXPERTS, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 128},
}
RECURRENT = ("granitemoehybrid", "falcon_h1")  # padded: a packed row would carry their state on


def tiny(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    packed_attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZE, **FAMILIES[family]})
    chosen = packed_attention.choose(None, config)
    config._attn_implementation = packed_attention.SHARED if chosen.packed else chosen.name
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for weight in model.parameters():  # heads that say something
        weight.data = weight.data * 3 if weight.dim() > 1 else weight.data
    return model, chosen.packed and family not in RECURRENT


def documents():
    draw = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 300, (20,), generator=draw).tolist()
    tails = [torch.randint(3, 300, (n,), generator=draw).tolist() for n in (7, 4, 9)]
    return prompt, tails


def logps(model, ids, start):
    """log p of ids[start:], by transformers' own logits of this document alone."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return logits[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])[:, 0]


def same(model, plain, packed):
    """SFT's loss, and each answer's and prompt's log-probabilities, in every layout."""
    prompt, tails = documents()
    rows = [{"input_ids": prompt + t, "labels": [-100] * len(prompt) + t} for t in tails]
    pair = {"prompt_ids": prompt, "chosen_ids": tails[0], "rejected_ids": tails[1]}
    with torch.no_grad():
        own = [logps(plain, prompt + t, len(prompt)) for t in tails]
        nll = -logps(plain, prompt + tails[0], 1).sum().item()
    expected = -torch.cat(own).mean().item()
    for layout, share in (("packed", True), ("packed", False), ("padded", False)) if packed else (("padded", False),):
        batch = RowCollator(0, layout, share)([rows])
        assert bool(batch.get("prefix_length")) == share
        with torch.no_grad():
            assert model(**given(batch)).loss.item() == pytest.approx(expected, rel=1e-5), layout
            batch = PairCollator(0, layout, share)([[pair]])
            found = model(**given(batch), token_logps=True).logps
        assert found.sum().item() == pytest.approx(-nll + own[1].sum().item(), rel=1e-5), layout


def given(batch):
    known = ("input_ids", "labels", "attention_mask", "position_ids", "loss_positions", *packed_attention.ROW_KEYS)
    return {k: v for k, v in batch.items() if k in (*known, "prefix_length", "suffix_index")}


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_and_preference_losses_are_those_of_documents_alone(family):
    model, packed = tiny(family)
    plain = copy.deepcopy(model)
    plain.config.output_router_logits = False
    note = fused_lora.apply(model, fused_lora=False)[-1]
    assert "whole logits" not in note.replace("without whole logits", "")
    same(model, plain, packed)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("what", ["lora on the head", "saved whole", "added tokens"])
def test_an_adapted_head_goes_through_the_packed_path(what, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    packed_attention.register()
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=tied, attn_implementation=packed_attention.SHARED))
    options = {
        "lora on the head": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": False},
        "saved whole": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": tied},
        "added tokens": {"trainable_token_indices": [5, 7, 9]},
    }[what]
    model = get_peft_model(
        base, LoraConfig(**{"target_modules": ["q_proj"], "r": 4, "init_lora_weights": False} | options)
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight) * weight.requires_grad
    plain = copy.deepcopy(model)
    note = fused_lora.apply(model.eval())[-1]
    assert ("tokens at a time" in note) != (what == "added tokens" and not tied)
    same(model, plain.eval(), True)
    model.train()
    prompt, tails = documents()
    batch = RowCollator(0, "packed", True)([[{"input_ids": prompt + t, "labels": prompt + t} for t in tails]])
    model(**given(batch)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_a_head_that_does_something_unknown_keeps_its_own_logits():
    model, packed = tiny("llama")
    scaled = model.lm_head.forward
    own = type(model).forward

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            found = own(self, *args, **kwargs)
            found.logits = found.logits * 1.7
            return found

    model.__class__ = Odd
    assert scaled and "whole logits: those of llama" in fused_lora.apply(model, fused_lora=False)[-1]
    plain, _ = tiny("llama")
    plain.__class__ = Odd
    same(model, plain, packed)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_the_routers_loss_is_each_documents_own_however_rows_are_cut(family):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model, packed = tiny(family)
    plain, config = copy.deepcopy(model), model.config
    plain.config.output_router_logits = False
    chunked_loss.install(model)
    prompt, tails = documents()
    rows = [{"input_ids": prompt + t, "labels": prompt + t} for t in tails]
    with torch.no_grad():
        expected = 0.0
        for row in rows:
            found = plain.base_model(input_ids=torch.tensor([row["input_ids"]]), output_router_logits=True)
            experts = found.router_logits[0].shape[-1]
            loss = load_balancing_loss_func(found.router_logits, experts, config.num_experts_per_tok)
            expected += len(row["input_ids"]) * loss.item()
        cuts = [[rows], [rows[:1], rows[1:]]]
        for layout, share in (("packed", True), ("packed", False), ("padded", False)) if packed else (("padded", 0),):
            for cut in cuts:
                batches = [RowCollator(0, layout, share)([part]) for part in cut]
                found = sum(model(**given(b), token_logps=True, router=True).router.item() for b in batches)
                assert found == pytest.approx(expected, rel=1e-5), (layout, share, len(cut))
        assert model(**given(batches[0])).loss.item() == pytest.approx(
            model(**given(batches[0]), router=True).loss.item()
        )


def test_a_model_without_a_router_refuses_its_loss():
    model, _ = tiny("llama")
    chunked_loss.install(model)
    batch = RowCollator(0)([[{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]])
    with pytest.raises(TunebookError, match=r"router_aux_loss needs the router's logits, which llama does not give"):
        model(**given(batch), token_logps=True, router=True)
