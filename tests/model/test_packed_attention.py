"""Packed rows are the same training as rows apart: attention, fused arithmetic, recomputation."""

import copy

import pytest

from helpers import compat
from helpers.errors import TunebookError
from helpers.model import checkpointing, chunked_loss, fused_lora, packed_attention
from helpers.train import rows as training_rows


@pytest.fixture(scope="module")
def pair():
    """(packed and fused, transformers' own) models with the same weights and the same adapter, fp32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    packed_attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=packed_attention.SDPA,
    )
    ours = LlamaForCausalLM(config)
    theirs = copy.deepcopy(ours)
    theirs.set_attn_implementation("sdpa")
    wrapped = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        wrapped.append(
            get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
        )
    fused_lora.apply(wrapped[0])
    return wrapped


@pytest.fixture(scope="module")
def documents():
    import torch

    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(3, 500, (n,), generator=generator).tolist()} for n in (5, 17, 9, 30, 1, 2)]
    for row in rows:
        half = len(row["input_ids"]) // 2
        row["completion_mask"] = [0] * half + [1] * (len(row["input_ids"]) - half)
    return rows


def gradients(model, batches):
    """Loss per trained token over all batches, and the gradient of every adapter weight."""
    model.zero_grad()
    count = sum(int((b["labels"][..., 1:] != -100).sum()) for b in batches)
    total = 0.0
    for batch in batches:
        known = {k: v for k, v in batch.items() if k not in ("row_ids", "tokens")}
        loss = model(**known, use_cache=False, num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(one, other, bound):
    assert one[0] == pytest.approx(other[0], rel=bound)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, grad in one[1].items():
        assert (grad - other[1][name]).norm() <= bound * other[1][name].norm(), name


def test_packed_loss_and_gradients_are_those_of_padded_rows(pair, documents):
    apart = gradients(pair[1], [training_rows.RowCollator(0, "padded")([documents])])
    agree(gradients(pair[0], [training_rows.RowCollator(0)([documents])]), apart, 1e-4)
    agree(gradients(pair[0], [training_rows.RowCollator(0, "padded")([documents])]), apart, 1e-4)


def test_one_row_of_all_equals_a_row_each(pair, documents):
    whole = gradients(pair[0], [training_rows.RowCollator(0)([documents])])
    agree(gradients(pair[0], [training_rows.RowCollator(0)([[d]]) for d in documents]), whole, 1e-4)


@pytest.mark.parametrize(
    ("layers", "offload", "tile"),
    [(2, False, 0), ("all", False, 0), ("all", True, 0), ("all", True, 16), (0, False, 16)],
)
def test_recomputing_changes_no_gradient(pair, documents, layers, offload, tile):
    batch = [training_rows.RowCollator(0)([documents])]
    checkpointing.set_recompute(pair[0], 0)
    plain = gradients(pair[0], batch)
    try:
        assert checkpointing.set_recompute(pair[0], layers, offload, tile) == {"all": 3}.get(layers, layers)
        agree(gradients(pair[0], batch), plain, 1e-5)
    finally:
        checkpointing.set_recompute(pair[0], 0)


def test_token_logps_are_the_log_softmax_of_the_logits(pair, documents):
    import torch

    batch = training_rows.RowCollator(0)([documents])
    with torch.no_grad():
        found = pair[0](**batch, token_logps=True).logps[0]
        logits = pair[0](**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[0].float()
    target = chunked_loss.shifted(batch["labels"])[0]
    expected = logits.log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0] * (target != -100)
    assert torch.allclose(found, expected, atol=1e-4)
    sums = chunked_loss.per_document(found[None], batch["document_lengths"])
    assert torch.allclose(
        sums, torch.stack([part.sum() for part in expected.split(batch["document_lengths"])]), atol=1e-3
    )


def test_log_probability_gradients_take_each_tokens_own_weight():
    import torch

    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    target, scale = torch.tensor([3, -100, 5, 49, 0, 7, -100]), torch.randn(7)
    (chunked_loss.token_logps(hidden, weight, target) * scale).sum().backward()
    ours = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    plain = (hidden @ weight.t()).log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0] * (target != -100)
    (plain * scale).sum().backward()
    assert torch.allclose(ours[0], hidden.grad, atol=1e-5) and torch.allclose(ours[1], weight.grad, atol=1e-5)


def test_padded_generation_is_unchanged_by_the_packed_attention(pair):
    import torch

    ids, mask = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    answers = []
    for model in pair:
        model.eval()
        answers.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False))
        model.train()
    assert torch.equal(*answers)


def test_a_model_that_drops_the_boundaries_is_caught(pair):
    from helpers.train.rows import check_boundaries

    check_boundaries(pair[0])
    body = pair[0].get_base_model().model
    own = body.forward
    body.forward = lambda **kw: own(**{k: v for k, v in kw.items() if k not in ("cu_seq_lens_q", "document_lengths")})
    try:
        with pytest.raises(TunebookError, match="see each other"):
            check_boundaries(pair[0])
    finally:
        body.forward = own


def test_four_bit_lora_is_the_arithmetic_of_its_dense_weights():
    import bitsandbytes as bnb
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft import LoraConfig, get_peft_model

    class Net(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    four = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    model = Net(four)
    model.is_loaded_in_4bit = True
    model.config = {"model_type": "none"}
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], init_lora_weights=False))
    assert fused_lora.fuse_lora(wrapped) == 1
    compat.keep_four_bit_layout(wrapped)
    before = wrapped.base_model.model.layer.base_layer.weight.data.clone()
    with torch.no_grad():
        wrapped.eval()(torch.randn(2, 5, 128, dtype=torch.bfloat16))  # an evaluation must not repack the weights
    wrapped.train()
    assert torch.equal(wrapped.base_model.model.layer.base_layer.weight.data, before)
    x = torch.randn(3, 5, 128, requires_grad=True)
    y = wrapped(x)
    y.square().sum().backward()
    inner = wrapped.base_model.model.layer
    a, b = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    dense = dequantize_4bit(inner.base_layer.weight.data.view(-1, 1), inner.base_layer.weight.quant_state).float()
    z = x.detach().requires_grad_(True)
    la, lb = a.detach().requires_grad_(True), b.detach().requires_grad_(True)
    expected = z @ dense.t() + 2.0 * (z @ la.t()) @ lb.t()
    expected.square().sum().backward()
    for ours, plain in ((y, expected), (x.grad, z.grad), (a.grad, la.grad), (b.grad, lb.grad)):
        assert (ours - plain).norm() < 1e-4 * plain.norm()


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((7, 5), packed_attention.SDPA),
        (None, packed_attention.SDPA),
        ((8, 0), packed_attention.FLASH),
        ((9, 0), packed_attention.FLASH),
    ],
)
def test_the_kernel_follows_the_card_and_says_why(capability, name):
    choice = packed_attention.choose(capability)
    assert choice.name == name and choice.packed and choice.reason


def test_soft_capped_attention_is_not_packed():
    from transformers import Gemma2Config

    choice = packed_attention.choose((9, 0), Gemma2Config())
    assert not choice.packed and "soft-capped" in choice.reason


@pytest.mark.parametrize("offload", [None, False, True], ids=["kept", "recomputed", "offloaded"])
def test_dropout_in_the_fused_path_is_pefts_with_the_same_mask(documents, offload):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    packed_attention.register()
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation=packed_attention.SDPA,
    )
    models = []
    for fused in (True, False):
        torch.manual_seed(0)
        adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.4, init_lora_weights=False)
        model = get_peft_model(LlamaForCausalLM(config), adapter).train()
        notes = fused_lora.apply(model, fused_lora=fused)
        assert fused == any("fused LoRA arithmetic in 14 layers" in note for note in notes)
        models.append(model)
    if offload is not None:
        checkpointing.set_recompute(models[0], "all", offload)
    batch, found = [training_rows.RowCollator(0)([documents])], []
    for model in models:
        torch.manual_seed(7)
        found.append(gradients(model, batch))
    agree(*found, 1e-4)
    torch.manual_seed(8)
    assert gradients(models[0], batch)[0] != pytest.approx(found[0][0], rel=1e-4)
    models[0].eval()
    assert models[0](**batch[0]).loss.item() == pytest.approx(models[1].eval()(**batch[0]).loss.item(), rel=1e-5)


def test_a_gpu_plays_one_without_flash_attention(monkeypatch):
    from helpers.model import packed_attention

    assert packed_attention.choose((9, 0)).name == packed_attention.FLASH
    monkeypatch.setenv("TUNEBOOK_ATTENTION", "sdpa")
    found = packed_attention.choose((9, 0))
    assert found.name == packed_attention.SDPA and found.packed and "TUNEBOOK_ATTENTION is sdpa" in found.reason
