"""Activation checkpointing in families whose layers return tuples, take more by position, or hold experts."""

import pytest
import torch

from ci.model_families import config_of
from helpers.model import checkpointing, packed_attention


@pytest.mark.parametrize("family", ["Llama 4 text", "Bamba", "gpt-oss", "GPT-2", "Bloom", "Falcon", "MPT", "LFM2 MoE"])
def test_gradients_are_the_same_with_every_grade_of_checkpointing(family):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_of(family)
    config._attn_implementation = packed_attention.choose(None, config).name
    model = AutoModelForCausalLM.from_config(config).float().train()
    for module in model.modules():
        module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
    ids = torch.randint(3, 600, (1, 40))

    def gradients():
        model.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradients()
    for how in (("all", False, 0), ("all", True, 0), ("all", True, 16)):
        assert checkpointing.set_recompute(model, *how) == len(checkpointing.decoder_layers(model))
        assert (gradients() - expected).norm() < 1e-4 * expected.norm(), how
