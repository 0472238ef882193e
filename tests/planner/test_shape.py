"""Resident and active experts, adapters on them, and what layers with a state keep: counted as they really are."""

import pytest
import torch

from ci.model_families import FAMILIES, config_of
from helpers.model import layer_kinds
from helpers.model.loading import ModelSource, auto_class
from helpers.planner import cost_model
from helpers.planner import plan as planner
from helpers.train import methods
from tests import train_data

MIXTURES = (
    "Mixtral",
    "Qwen3-MoE",
    "gpt-oss",
    "OLMoE",
    "DeepSeek-V3",
    "Ernie 4.5 MoE",
    "Granite 4 hybrid",
    "Hunyuan MoE",
)
RECURRENT = ("Granite 4 hybrid", "Qwen3-Next", "LFM2", "Falcon-H1", "Mamba 2", "Nemotron-H", "Kimi-Linear")


def published():
    """Config, billions of parameters (resident, active), and where they are published."""
    import transformers as t

    qwen = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32}
    qwen |= {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
    gpt = {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64}
    gpt |= {"num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4}
    lite = {"hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27, "num_attention_heads": 16}
    lite |= {"num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128}
    lite |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2}
    lite |= {"num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "vocab_size": 102400}
    return {
        "Qwen3-30B-A3B": (
            t.Qwen3MoeConfig(**qwen, moe_intermediate_size=768, vocab_size=151936),
            30.5,
            3.3,
        ),  # its card
        "Mixtral 8x7B": (t.MixtralConfig(), 46.7, 12.9),  # arXiv:2401.04088, and Mistral's announcement
        "gpt-oss-20b": (t.GptOssConfig(**gpt, vocab_size=201088), 20.9, 3.6),  # arXiv:2508.10925, table 1
        "OLMoE-1B-7B": (t.OlmoeConfig(intermediate_size=1024, vocab_size=50304), 6.9, 1.3),  # arXiv:2409.02060
        "DeepSeek-V2-Lite": (t.DeepseekV2Config(**lite), 15.7, 2.4),  # arXiv:2405.04434, appendix B
    }


@pytest.mark.parametrize("name", published())
def test_resident_and_active_parameters_are_the_published_ones(name):
    config, resident, active = published()[name]
    shape = layer_kinds.Shape(config)
    assert shape.parameters / 1e9 == pytest.approx(resident, rel=0.01)
    counted = shape.active - shape.embedding * (name in ("gpt-oss-20b", "DeepSeek-V2-Lite"))  # not in those tables
    assert counted / 1e9 == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_token_meets_as_many_experts_as_are_counted(family):
    torch.manual_seed(0)
    model, shape = auto_class(config := config_of(family)).from_config(config).float(), layer_kinds.Shape(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    model(input_ids=torch.tensor([[7]]), use_cache=False).logits.square().sum().backward()
    idle = [w[i].numel() for _, w in layer_kinds.expert_weights(model) for i in range(len(w)) if not w.grad[i].any()]
    assert idle and shape.active == shape.parameters - sum(idle)


@pytest.mark.parametrize("family", [*MIXTURES, *RECURRENT, "Llama 3", "GPT-2", "Gemma 3n text"])
def test_the_adapter_is_as_large_as_planned(family):
    config, params = config_of(family), train_data.settings("sft", rank=4)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    adapted = methods._new_adapter(model, params, ModelSource("x", "x", "", "folder"), [])
    made = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert cost_model.trained_parameters(layer_kinds.Shape(config), cost_model.Setting(1, params)) == made


@pytest.mark.parametrize("family", RECURRENT)
def test_what_a_layer_with_a_state_keeps_is_what_it_keeps_on_real_numbers(family):
    torch.manual_seed(0)
    config = config_of(family)
    shape, model = layer_kinds.Shape(config), auto_class(config).from_config(config, dtype=torch.bfloat16)
    mixers = [m for m in model.modules() if any(type(c) is torch.nn.Conv1d for c in m.children())]
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixers[0](torch.randn(1, 512, shape.hidden, dtype=torch.bfloat16, requires_grad=True))
    found = sum(storage.nbytes() for place, storage in kept.items() if place not in own) / 512
    assert shape.recurrent == len(mixers) and shape.kept_bytes == pytest.approx(found, rel=0.05)


def plan(config, **given):
    params = train_data.settings("sft", **{"method": "auto", "precision": "auto", "batch_size": 8, **given})
    return planner.plan(params, [300] * 64, config)


def test_a_plan_says_what_experts_take_and_that_they_stay_in_16_bits():
    config = published()["Qwen3-30B-A3B"][0]
    four = plan(config, method="qlora", plan_for="H200")
    said = " ".join(four.reasons)
    assert "30.5 billion parameters, of which a token meets 3.35 billion (8 of 128 experts)" in said
    assert "Experts stay in 16 bits (54.0 GiB)" in said and four.peak_gib > 54
    attention = plan(config, method="qlora", plan_for="H200", target_modules="q_proj,k_proj,v_proj,o_proj")
    assert attention.peak_gib < four.peak_gib and attention.tokens_per_s > four.tokens_per_s


def test_time_follows_the_experts_that_a_token_meets():
    setting = cost_model.Setting(32768, train_data.settings("sft", target_modules="q_proj"))

    def seconds(shape):
        return cost_model.row_seconds(shape, setting, cost_model.card_named("H200"), 300)[0]

    three, thirteen = (layer_kinds.Shape(published()[name][0]) for name in ("Qwen3-30B-A3B", "Mixtral 8x7B"))
    assert seconds(three) < seconds(thirteen)
    routed, thirteen.routed = seconds(thirteen), 1.0
    assert seconds(thirteen) > 2 * routed


def test_a_plan_counts_what_recurrent_layers_keep():
    from transformers import GraniteMoeHybridConfig

    size = {"hidden_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 12, "mamba_n_heads": 48}
    size |= {"num_key_value_heads": 4, "mamba_d_head": 64, "mamba_d_state": 128, "num_local_experts": 0}
    size |= {"mamba_n_groups": 1, "shared_intermediate_size": 4096}
    plain, states = (
        plan(GraniteMoeHybridConfig(**size, layer_types=[kind] * 8), plan_for="H100", method="lora")
        for kind in ("attention", "mamba")
    )
    assert "8 of 8 layers carry a state, and one keeps" in " ".join(states.reasons)
    assert states.peak_gib > plain.peak_gib + 2 and states.tokens_per_s < plain.tokens_per_s


def test_families_without_experts_or_states_are_counted_as_before():
    for family in ("Llama 3", "Qwen3", "Gemma 3", "Phi-3"):
        shape = layer_kinds.Shape(config_of(family))
        assert shape.active == shape.parameters and not (shape.experts or shape.recurrent or shape.said(True))
    assert all(layer_kinds.Shape(config_of(family)).parameters for family in FAMILIES)
