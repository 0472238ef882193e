"""A frozen base in FP8: its arithmetic on a CPU, beside the dense weights and beside products written out."""

import copy

import pytest
import torch

from helpers import compat
from helpers.errors import TunebookError
from helpers.model import fp8, fused_lora, loading, merging
from tests.conftest import random_llama

IDS = torch.tensor([[11, 250, 31, 77, 900, 4, 62, 7, 8, 1200] * 3])


def adapted(base, in_fp8, fused=True):
    """The model with a LoRA adapter whose B is not zero, in training."""
    from peft import LoraConfig, get_peft_model

    model = fp8.load(base, "fp8", dtype="fp32") if in_fp8 else loading.load_model(base, dtype="fp32")
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model, config).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    if fused:
        assert fused_lora.fuse_lora(model) == 14
    return model


def gradients(model):
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def apart(one, other):
    """Relative distance of two gradients, all tensors as one vector."""
    a, b = (torch.cat([grads[name].flatten() for name in sorted(one)]) for grads in (one, other))
    return float((a - b).norm() / b.norm())


def test_loss_and_lora_gradients_are_the_dense_ones_within_what_8_bits_lose(tiny_llama):
    dense_loss, dense = gradients(adapted(tiny_llama, False))
    loss, found = gradients(adapted(tiny_llama, True))
    assert loss == pytest.approx(dense_loss, rel=0.005) and loss != dense_loss
    assert 1e-4 < apart(found, dense) < 0.08


def test_a_product_and_its_gradient_are_those_of_the_quantised_numbers():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 48), torch.randn(2, 5, 64, requires_grad=True)
    layer = fp8.Fp8Linear.of(linear, "cpu")
    weight = fp8.dense(layer.weight, layer.fp8_scale)
    assert float((weight - linear.weight.data).norm() / linear.weight.data.norm()) < 0.03

    def rounded(values):
        return fp8.dense(*fp8.quantize(values))

    y, grad = layer(x), torch.randn(2, 5, 48) * 1e-7
    y.backward(grad)
    assert torch.allclose(y[0], rounded(x[0]) @ weight.t() + linear.bias, atol=1e-5)
    assert torch.allclose(copy.deepcopy(layer).eval()(x), x @ weight.t() + linear.bias, atol=1e-5)
    codes = layer.weight.view(fp8.E4M3).float()
    assert torch.allclose(x.grad[1], rounded(grad[1] * layer.fp8_scale) @ codes, atol=1e-12)
    exact = grad[1] @ linear.weight.data
    assert float((x.grad[1] - exact).norm() / exact.norm()) < 0.06


def test_a_token_is_what_it_is_alone_whatever_stands_beside_it():
    """Each row has its own scale: its codes, its products and its gradients know no other row, of any number."""
    torch.manual_seed(0)
    layer, rows = fp8.Fp8Linear.of(torch.nn.Linear(64, 48), "cpu"), torch.randn(21, 64)
    rows[7] *= 1e4
    given = rows.clone().requires_grad_(True)
    layer(given).backward(together := torch.randn(21, 48))
    for one in (0, 7, 20):
        alone = rows[one : one + 1].clone().requires_grad_(True)
        y = layer(alone)
        y.backward(together[one : one + 1])
        assert torch.allclose(y[0], layer(rows)[one], rtol=1e-5, atol=1e-5)
        assert torch.allclose(alone.grad[0], given.grad[one], rtol=1e-5, atol=1e-6)


def test_pytorch_multiplies_codes_and_scales_as_the_written_out_product():
    torch.manual_seed(0)
    (a, scale_a), (b, scale_b) = (fp8.quantize(torch.randn(rows, 64)) for rows in (5, 48))
    out = torch.empty(5, 48, dtype=torch.bfloat16)
    assert compat.fp8_product(a, scale_a, b, scale_b, out).data_ptr() == out.data_ptr()
    wanted = fp8.dense(a, scale_a) @ fp8.dense(b, scale_b).t()
    assert torch.allclose(out.float(), wanted, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("values", [[0.0] * 16, [1e-20] * 8 + [3e-20] * 8, [3e38] * 16])
def test_rows_of_zeros_and_of_extreme_numbers_keep_their_values(values):
    row = torch.tensor([values])
    assert torch.allclose(fp8.dense(*fp8.quantize(row)), row, rtol=0.07, atol=0)


def test_evaluation_takes_activations_as_they_come_and_the_adapter_off_is_the_base(tiny_llama, tmp_path):
    model = adapted(tiny_llama, True)
    base = fp8.load(tiny_llama, "fp8", dtype="fp32").eval()
    trained = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    merged = merging.merge(tiny_llama, tmp_path / "adapter", tmp_path / "merged", "fp8").path
    with torch.no_grad():
        found = model.eval()(IDS).logits
        wanted = loading.load_model(merged, dtype="fp32")(IDS).logits
        assert 5 * float((found - wanted).norm()) < float((trained - found).norm()) < 0.1 * float(found.norm())
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, base(IDS).logits)
    _, fused = gradients(model.train())
    _, plain = gradients(adapted(tiny_llama, True, fused=False))
    assert apart(fused, plain) < 0.02


def test_the_codes_are_the_same_after_loading_again_and_no_cast_touches_them(tiny_llama, tmp_path):
    from safetensors.torch import load_model, save_model

    first, again = (fp8.load(tiny_llama, "fp8", dtype="bf16") for _ in range(2))
    state = {n: t for n, t in first.state_dict().items() if "_proj" in n}
    assert len(state) == 28 and all(torch.equal(t, again.state_dict()[n]) for n, t in state.items())
    save_model(first, tmp_path / "model.safetensors")
    for layer in (m for m in again.modules() if isinstance(m, fp8.Fp8Linear)):
        layer.weight.zero_()
    load_model(again, tmp_path / "model.safetensors")
    again.model.layers.to(torch.bfloat16)
    layer = again.model.layers[0].mlp.down_proj
    assert torch.equal(layer.weight, state["model.layers.0.mlp.down_proj.weight"]) and layer.weight.dtype == torch.uint8


def test_layers_that_products_do_not_take_stay_in_16_bits_and_are_counted(tokenizer, tmp_path):
    folder = random_llama(tmp_path / "odd", tokenizer, hidden_size=64, intermediate_size=120)
    model = fp8.load(folder, "fp8", dtype="bf16")
    assert "8 linear layers and 6 in 16 bits" in model.in_fp8 and "model.layers.0.mlp.gate_proj" in model.in_fp8
    assert type(model.lm_head) is type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear
    _, found = gradients(model.requires_grad_(False).model.embed_tokens.requires_grad_(True) and model)
    assert len(found) == 1 and all(g.isfinite().all() for g in found.values())


def test_a_model_without_layers_for_fp8_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(
        TunebookError, match=r"takes none of the 4 linear layers of this model .* set quantize to 'none'"
    ):
        fp8.convert(model, torch.device("cpu"))


def test_a_merge_onto_fp8_is_the_base_that_training_saw(tiny_llama, tmp_path):
    merged = merging.merge(tiny_llama, None, tmp_path / "merged", "fp8").path
    layer = fp8.load(tiny_llama, "fp8", dtype="bf16").model.layers[1].self_attn.q_proj
    seen = fp8.dense(layer.weight, layer.fp8_scale).bfloat16()
    plain, found = (loading.load_model(folder, dtype="bf16").model for folder in (tiny_llama, merged))
    assert torch.equal(found.layers[1].self_attn.q_proj.weight, seen)
    assert not torch.equal(plain.layers[1].self_attn.q_proj.weight, seen)
    assert torch.equal(found.embed_tokens.weight, plain.embed_tokens.weight)
