"""Adapted layers that read the same numbers: one product with all of their A, and PEFT's own arithmetic."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import silu

from helpers.model import fused_lora

GIVEN = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
NAMES = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


class Block(torch.nn.Module):
    """What an attention and an MLP do with their inputs. order: in which layers are called; apart: k reads its own."""

    def __init__(self, dtype=torch.float32, order="qkv", apart=False):
        super().__init__()
        sizes = {"q_proj": (24, 32), "k_proj": (24, 8), "v_proj": (24, 8), "gate_proj": (24, 40), "up_proj": (24, 40)}
        for name, (rows, columns) in {**sizes, "down_proj": (40, 24)}.items():
            setattr(self, name, torch.nn.Linear(rows, columns, bias=name == "k_proj", dtype=dtype))
        self.order, self.apart, self.config = order, apart, {"model_type": "none"}

    def forward(self, x):
        found = {}
        for letter in self.order:
            given = x * 2 if self.apart and letter == "k" else x
            found[letter] = getattr(self, f"{letter}_proj")(given)
        mixed = sum(value.square().mean() for value in found.values())
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x)).square().mean() + mixed


def pair(change=lambda model: None, **given):
    """(a model with PEFT's own forward, the same with the fused one, sizes of the groups that were computed)."""
    torch.manual_seed(0)
    own = get_peft_model(Block(**given), LoraConfig(target_modules=NAMES, **GIVEN)).train()
    change(own)
    fused = copy.deepcopy(own)
    assert fused_lora.fuse_lora(fused) == 6
    return own, fused


@pytest.fixture
def sizes(monkeypatch):
    apply, seen = fused_lora._LoraLinears.apply, []

    def counted(x, bases, *more):
        seen.append(len(bases))
        return apply(x, bases, *more)

    monkeypatch.setattr(fused_lora._LoraLinears, "apply", counted)
    return seen


def half_the_scale(model):
    model.base_model.model.k_proj.scaling["default"] /= 2


def dropped(model):
    model.base_model.model.v_proj.lora_dropout["default"] = torch.nn.Dropout(0.0)
    model.base_model.model.up_proj.lora_dropout["default"] = torch.nn.Dropout(1e-9)


@pytest.mark.parametrize(
    ("given", "change", "computed"),
    [
        ({}, None, [3, 2, 1]),
        ({"order": "vkq"}, None, [3, 2, 1]),
        ({"order": "q"}, None, [3, 2, 1]),  # layers that share another one's keys and values
        ({"apart": True}, None, [3, 1, 2, 1]),  # k reads something else than q and v
        ({}, half_the_scale, [1, 1, 1, 2, 1]),
        ({}, dropped, [3, 1, 1, 1]),
    ],
)
def test_layers_of_one_input_are_one_product_and_train_as_each_by_itself(given, change, computed, sizes):
    own, fused = pair(change or (lambda model: None), **given)
    for step in range(2):  # a second pass finds nothing of the first
        x = torch.randn(2, 5, 24)
        inputs = [x.clone().requires_grad_(True) for _ in range(2)]
        losses = [model(one) for model, one in zip((own, fused), inputs, strict=True)]
        for loss in losses:
            loss.backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
        assert (inputs[0].grad - inputs[1].grad).norm() < 1e-5 * inputs[0].grad.norm()
        for (name, a), b in zip(own.named_parameters(), fused.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                assert (a.grad - b.grad).norm() <= 1e-5 * a.grad.norm(), name
        assert sizes == computed * (step + 1)


def test_in_sixteen_bits_adapters_stay_in_fp32_and_inputs_without_gradient_need_none(sizes):
    own, fused = pair(dtype=torch.bfloat16)
    x = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for model in (own, fused):
            model(x).backward()
    assert sizes == [3, 2, 1]
    for (name, a), b in zip(own.named_parameters(), fused.named_parameters(), strict=True):
        if a.requires_grad:
            assert b[1].grad.dtype == torch.float32 and (a.grad - b[1].grad).norm() < 0.03 * a.grad.norm(), name


def test_nothing_of_a_pass_is_held_and_an_evaluation_is_the_models_own(sizes):
    _, fused = pair()
    x = torch.randn(1, 3, 24)
    fused(x)
    with torch.no_grad():
        fused(x)
    layers = [module for module in fused.modules() if hasattr(module, "_group")]
    assert sizes == [3, 2, 1] and len(layers) == 6
    assert all(not layer._group.made and layer._group.x is None for layer in layers)
