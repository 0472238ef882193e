"""Which families' rows may be packed: told from the config, and proven on the model in both layouts."""

import contextlib
import copy

import pytest
import torch

from ci.model_families import FAMILIES, config_of
from helpers.errors import TunebookError
from helpers.model import fp8, packed_attention
from helpers.train.rows import RowCollator, check_boundaries

PADDED = {
    "linear_attention": (
        *("Qwen3-Next", "Qwen3.5 text", "Granite 4 hybrid", "Nemotron-H", "Bamba", "Jamba", "Mamba 2", "Mamba"),
        *("Falcon Mamba", "MiniMax", "OLMo hybrid", "Qwen3.5 MoE text", "Zamba 2"),
    ),
    "conv": ("LFM2", "LFM2 MoE"),
    "hybrid": ("Falcon-H1",),
    "no boundaries": ("Bloom", "StableLM", "Falcon", "MPT", "BioGPT", "GPT-J", "Nemotron", "RWKV", "XGLM"),
    "attention": ("Gemma 2", "gpt-oss", "Llama 4 text", "VaultGemma", "Granite with sinks", "DeepSeek-V3.2"),
}
WINDOWED = ("Mistral", "Ministral", "Qwen2", "StarCoder 2", "Cohere 2", "Gemma 3", "OLMo 3", "EXAONE 4", "Phi-3")
STATES = [family for kind in ("linear_attention", "conv", "hybrid") for family in PADDED[kind]] + ["Kimi-Linear"]


def model_of(family, attention=None, scale=1.0):
    from transformers import AutoModelForCausalLM

    packed_attention.register()
    torch.manual_seed(0)
    config = config_of(family)
    config._attn_implementation = attention or packed_attention.choose(None, config).name
    model = AutoModelForCausalLM.from_config(config).float()
    for name, weight in model.named_parameters():
        if scale != 1 and any(part in name for part in ("mamba", "conv", "linear_attn", "mixer")):
            weight.data *= scale if weight.dim() > 1 else 1.0
    return model


def loss_of(model, rows, collator):
    batch = collator([rows])
    known = ("input_ids", "attention_mask", "position_ids", "prefix_length", "suffix_index", *packed_attention.ROW_KEYS)
    labels = batch["labels"]
    logits = model(**{k: v for k, v in batch.items() if k in known}, use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def documents():
    draw = torch.Generator().manual_seed(1)
    prompt, *tails = (torch.randint(3, 600, (n,), generator=draw).tolist() for n in (40, 30, 7, 19))
    return [{"input_ids": prompt + t, "labels": [-100] * 40 + t} for t in tails]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_packed_where_that_is_exact_and_padded_elsewhere(family):
    """Against transformers' eager attention, one document at a time; a window is shorter than the rows."""
    chosen = packed_attention.choose(None, config_of(family))
    padded = [*STATES, *PADDED["no boundaries"], *PADDED["attention"]]
    assert chosen.packed == (family not in padded), chosen.reason
    ours, plain, rows = model_of(family).eval(), model_of(family, "eager").eval(), documents()
    layouts = [RowCollator(0, "padded")]
    if chosen.packed:
        ours.set_attn_implementation(packed_attention.SHARED)
        layouts = [RowCollator(0, "packed", True), RowCollator(0, "packed"), *layouts]
    with torch.no_grad():
        expected = sum(loss_of(plain, [row], RowCollator(0, "padded")).item() for row in rows)
        for collator in layouts:
            assert loss_of(ours, rows, collator).item() == pytest.approx(expected, rel=2e-5), collator


@pytest.mark.parametrize(("kind", "families"), PADDED.items())
def test_the_reason_names_the_layers(kind, families):
    for family in families:
        assert kind in packed_attention.choose((9, 0), config_of(family)).reason


@pytest.mark.parametrize("family", [*WINDOWED, "Granite 4", "OPT", "GPT-2"])
def test_the_guard_lets_exact_rows_pass(family):
    check_boundaries(model_of(family, packed_attention.SHARED).train(), shared=True)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("family", STATES)
def test_the_guard_catches_a_state_however_weak(family, scale):
    model = model_of(family, packed_attention.SHARED, scale)
    with pytest.raises(TunebookError, match="see each other"):
        check_boundaries(model)


@pytest.mark.parametrize("family", ["Bloom", "gpt-oss", "Llama 4 text", "StableLM"])
def test_the_guard_catches_an_attention_of_another_kind(family):
    model = model_of(family, {"Bloom": "eager", "StableLM": "sdpa"}.get(family, packed_attention.SHARED))
    with pytest.raises(TunebookError, match="see each other"):
        check_boundaries(model, shared=family != "Bloom")


@pytest.mark.parametrize("family", ["Qwen3-Next", "LFM2", "Falcon-H1", "Llama 4 text", "StableLM"])
def test_a_base_in_fp8_hides_no_leak_from_the_guard(family):
    model = model_of(family, "sdpa" if family == "StableLM" else packed_attention.SHARED, 0.3)
    fp8.convert(model, model.device)
    with pytest.raises(TunebookError, match="see each other"):
        check_boundaries(model, shared=family not in STATES)


def test_the_guard_takes_no_rounding_to_fp8_for_a_leak(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    packed_attention.register()
    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 10, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=600, initializer_range=0.15, **size)
    config._attn_implementation = packed_attention.SHARED
    model = LlamaForCausalLM(config).bfloat16()
    fp8.convert(model, model.device)
    check_boundaries(model, shared=True)
    assert fp8.Fp8Linear.rounds
    monkeypatch.setattr(fp8, "unrounded", contextlib.nullcontext)
    with pytest.raises(TunebookError, match="see each other"):
        check_boundaries(model, shared=True)


def test_the_guard_catches_a_lost_prefix_and_leaves_the_model_as_it_was():
    model = model_of("GPT-2", packed_attention.SHARED)
    before = copy.deepcopy(model.state_dict())
    own = model.transformer.forward
    model.transformer.forward = lambda **kw: own(**{k: v for k, v in kw.items() if k != "prefix_length"})
    check_boundaries(model.eval())
    with pytest.raises(TunebookError, match="see each other"):
        check_boundaries(model, shared=True)
    assert not model.training and model.transformer.h[0].attn.attn_dropout.p == 0.1
    assert model.config._attn_implementation == packed_attention.SHARED
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
