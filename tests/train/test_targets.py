"""What "all-linear" adapts: every linear layer and the experts, no router, and what a reload gives back."""

import pytest
import torch

from ci.model_families import config_of
from helpers import params as parameters
from helpers.errors import TunebookError
from helpers.model import chunked_loss, fused_lora, loading
from helpers.train import methods

BASE = loading.ModelSource("base", None, "", "folder")
HELD = {  # what is adapted in the second layer and the first, besides attention
    "DeepSeek-V3": ("0.mlp.gate_proj", "1.mlp.shared_experts.up_proj", "1.mlp.experts"),
    "GLM-4.5": ("0.mlp.down_proj", "1.mlp.shared_experts.down_proj", "1.mlp.experts"),
    "Ernie 4.5 MoE": ("0.mlp.up_proj", "1.mlp.shared_experts.gate_proj", "1.mlp.experts"),
    "Qwen2 MoE": ("1.mlp.shared_expert.up_proj", "1.mlp.experts"),
    "LFM2 MoE": ("0.feed_forward.w1", "0.conv.out_proj", "1.feed_forward.experts"),
    "Granite 4 hybrid": ("0.shared_mlp.input_linear", "0.mamba.in_proj", "1.block_sparse_moe.experts"),
    "Jamba": ("0.feed_forward.up_proj", "0.mamba.in_proj", "1.feed_forward.experts"),
    "Gemma 3n text": ("0.mlp.gate_proj", "1.altup.modality_router", "1.laurel.linear_left"),
    "GPT-2": ("0.attn.c_attn", "1.mlp.c_proj"),
    "Laguna": ("0.mlp.up_proj", "1.mlp.shared_experts.up_proj", "1.mlp.experts"),
    "ModernBERT decoder": ("0.attn.q_proj", "1.mlp.Wi"),
    "RWKV": ("0.attention.key", "1.feed_forward.receptance"),
    "Zamba 2": ("0.mamba.in_proj", "1.linear", "3.mamba_decoder.mamba.in_proj"),
}
NEVER = ("mlp.gate", "shared_expert_gate", "feed_forward.router", "mamba.out_proj", "mamba.x_proj", "lm_head")
NEVER += ("shared_transformer.self_attn.q_proj", "1.attention")  # shared by two layers; no stack of experts


def model_of(family):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family)).float()


def adapted(model):
    names = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    return {name.replace(".base_layer", "") for name in names}


@pytest.mark.parametrize("family", HELD)
def test_all_linear_adapts_dense_layers_beside_experts_and_no_router(family, tmp_path):
    params = parameters.resolve("sft", {"run": "r", "rank": 2})
    model = methods._new_adapter(model_of(family), params, BASE, [])
    found = adapted(model)
    assert all(any(name.endswith(wanted) for name in found) for wanted in HELD[family]), found
    assert not any(name.endswith(NEVER) for name in found), found
    assert len({m.r["default"] for m in model.modules() if hasattr(m, "lora_A")}) == 1
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.requires_grad):
            weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path)
    again, ids = loading.load_adapter(model_of(family), tmp_path), torch.arange(3, 20)[None]
    assert adapted(again) == found
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, use_cache=False).logits
        assert torch.equal(again.eval()(input_ids=ids, use_cache=False).logits, expected)


def test_targets_that_a_kernel_reads_past_are_refused():
    params = parameters.resolve("sft", {"run": "r", "target_modules": "in_proj,out_proj"})
    with pytest.raises(TunebookError, match=r"PEFT cannot adapt in_proj,out_proj .*'out_proj' is incompatible"):
        methods._new_adapter(model_of("Mamba 2"), params, BASE, [])


def test_a_model_that_adds_to_a_layers_output_in_place_trains_through_the_fused_path():
    model = methods._new_adapter(model_of("Falcon"), parameters.resolve("sft", {"run": "r", "dropout": 0.0}), BASE, [])
    assert "fused LoRA arithmetic in 8 layers" in " ".join(fused_lora.apply(model))
    assert chunked_loss.can_fuse(model.get_base_model()) == ""
    ids = torch.arange(3, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad.abs().sum() for n, p in model.named_parameters() if "lora_B" in n]
    assert len(grads) == 8 and all(grad > 0 for grad in grads)
