"""A merged model is base and adapter together, for every kind of adapter; what does not fit is refused."""

import json
import shutil

import pytest

from helpers.errors import TunebookError

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks by pattern": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}},
    "head": {"target_modules": [*LINEAR, "lm_head"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "trained tokens": {"trainable_token_indices": [5, 9, 300]},
}


def load(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(base, folder, **settings):
    """A LoRA adapter with random weights on `base`; returns its logits on fixed tokens."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    chosen = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(load(base), LoraConfig(**chosen)).eval()
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.requires_grad and p.dim() > 1):
            weight.add_(torch.randn_like(weight) * 0.05)
        model.save_pretrained(folder)
        return model(tokens()).logits


def tokens():
    import torch

    ids = torch.randint(5, 40000, (1, 40), generator=torch.Generator().manual_seed(3))
    ids[0, 3] = 300
    return ids


def divergence(wanted, got):
    from torch.nn.functional import kl_div

    return kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean().item()


@pytest.fixture(scope="module")
def sharded(tiny_llama, tmp_path_factory):
    """The tiny Llama in several shards."""
    folder = tmp_path_factory.mktemp("sharded")
    from helpers.model.loading import load_model

    load_model(tiny_llama).save_pretrained(folder, max_shard_size="8MB")
    for file in tiny_llama.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(tiny_llama / "chat_template.jinja", folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def plain(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    make_adapter(tiny_llama, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_answers_as_base_and_adapter_do(kind, sharded, tmp_path):
    import torch

    from helpers.model import merging

    wanted = make_adapter(sharded, tmp_path / "adapter", **KINDS[kind])
    made = merging.merge(sharded, tmp_path / "adapter", tmp_path / "merged")
    with torch.inference_mode():
        apart = divergence(wanted, load(sharded)(tokens()).logits)
        together = divergence(wanted, load(made.path)(tokens()).logits)
    assert apart > 0.01 and together < 1e-4 * max(1, apart)
    assert {f.name for f in made.path.glob("*.safetensors")} == {f.name for f in sharded.glob("*.safetensors")}


@pytest.mark.parametrize("double", [True, False])
def test_a_merge_onto_nf4_is_the_base_that_training_saw(tiny_llama, plain, tmp_path, double):
    import torch
    from peft import PeftModel

    from helpers.model import merging
    from helpers.model.loading import load_model

    def merged(name, double, onto):
        adapter = shutil.copytree(plain, tmp_path / name / "adapter")
        (adapter.parent / "manifest.json").write_text(json.dumps({"params": {"double_quant": double}}))
        return load(merging.merge(tiny_llama, adapter, tmp_path / name / "merged", onto=onto).path)(tokens()).logits

    with torch.inference_mode():
        base = load_model(tiny_llama, "nf4", double, dtype="fp32")
        trained = PeftModel.from_pretrained(base, plain).eval()(tokens()).logits.float()
        onto_nf4, otherwise, onto_16 = (
            divergence(trained, merged(*how))
            for how in (("nf4", double, "nf4"), ("otherwise", not double, "nf4"), ("plain", double, "16bit"))
        )
    assert onto_nf4 < 0.2 * onto_16 and onto_nf4 < otherwise


def spoil(folder, to, edit):
    """A copy of an adapter with its tensors edited."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    tensors = load_file(to / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, to / "adapter_model.safetensors")
    return to


def test_spoilt_adapters_are_refused_and_nothing_is_left(tiny_llama, plain, tmp_path):
    from helpers.model import merging

    def nan(tensors):
        tensors[sorted(tensors)[0]][0, 0] = float("nan")

    def narrow(tensors):
        key = next(k for k in tensors if "lora_A" in k)
        tensors[key] = tensors[key][:, :100].contiguous()

    truncated = tmp_path / "truncated"
    shutil.copytree(plain, truncated)
    data = (truncated / "adapter_model.safetensors").read_bytes()
    (truncated / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    pickled = tmp_path / "pickled"
    shutil.copytree(plain, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    cases = {
        spoil(plain, tmp_path / "nan", nan): "NaN or infinity",
        spoil(plain, tmp_path / "narrow", narrow): "does not fit the base",
        spoil(plain, tmp_path / "lost", lambda t: t.pop(sorted(t)[0])): "lacks",
        truncated: "damaged",
        pickled: "pickled",
    }
    for folder, words in cases.items():
        with pytest.raises(TunebookError, match=words):
            merging.merge(tiny_llama, folder, tmp_path / "out" / "merged")
        assert not list((tmp_path / "out").glob("*")), folder


def test_a_base_that_is_only_quantised_or_unknown_is_refused(tiny_llama, plain, tmp_path):
    from helpers.model import merging

    for change, words in (
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "16-bit weights"),
        ({"model_type": "nobody_knows"}, "no architecture"),
    ):
        folder = tmp_path / words
        shutil.copytree(tiny_llama, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(TunebookError, match=words):
            merging.merge(folder, plain, tmp_path / "merged")


@pytest.mark.parametrize(
    "named, written",
    [
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": "float16"}, {"dtype": "float16"}),
    ],
)
def test_the_merged_folder_keeps_the_bases_own_files_but_for_what_training_changed(
    sharded, tokenizer, tmp_path, named, written
):
    """An own tokenizer class and settings that transformers would leave out, as Phi-4 and Nemotron-H have."""
    from helpers.data.vocabulary import add_tokens
    from helpers.model import loading, merging

    base = tmp_path / "base"
    shutil.copytree(sharded, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"layers_block_type": ["x"]} | named))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.6}))
    make_adapter(base, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    plain = merging.merge(base, tmp_path / "adapter", tmp_path / "plain").path
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        found, ours = ((folder / name).read_text() for folder in (plain, base))
        assert json.loads(found) == json.loads(ours) | (written if name == "config.json" else {}), name

    own = loading.load_tokenizer(base)
    (number,) = add_tokens(None, own, "<|done|>")
    own.eos_token, own.chat_template = "<|done|>", "{{ messages[0]['content'] }}<|done|>"
    make_adapter(base, tmp_path / "tuned")
    own.save_pretrained(tmp_path / "tuned")
    merged = merging.merge(base, tmp_path / "tuned", tmp_path / "merged").path
    found = {name: json.loads((merged / f"{name}.json").read_text()) for name in ("config", "generation_config")}
    assert found["config"]["vocab_size"] == number + 1 and found["config"]["eos_token_id"] == number
    assert found["config"]["layers_block_type"] == ["x"]
    assert found["generation_config"] == {"eos_token_id": [number, 2], "temperature": 0.6}
    settings = json.loads((merged / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "GPT2Tokenizer" and settings["eos_token"] == "<|done|>"
    again = loading.load_tokenizer(merged)
    assert loading.tokenizer_hash(again) == loading.tokenizer_hash(own) and again.eos_token_id == number
    assert again.chat_template == own.chat_template
    weight = load(merged).get_input_embeddings().weight
    assert (weight[number] - weight[:number].mean(0)).abs().max() < 1e-3, "a row that was not trained never wins"
