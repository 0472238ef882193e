"""Model and adapter folders are read by their headers: packed weights as what they stand for, broken ones by name."""

import json
import random
import shutil

import pytest

from helpers.errors import TunebookError
from helpers.model import loading, merging, weights
from tests.conftest import random_llama

PACKINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def pack(base, folder, tokenizer, kind="nf4"):
    """`base` as bitsandbytes saves it in 4 or 8 bits."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"dtype": torch.bfloat16, "quantization_config": BitsAndBytesConfig(**PACKINGS[kind])}
    AutoModelForCausalLM.from_pretrained(base, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model):
    import torch

    with torch.inference_mode():
        return model(torch.arange(5, 45)[None]).logits.float()


def edit(folder, to, change):
    """A copy of a folder with one safetensors file after `change(its tensors)`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    (file,) = to.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, file, metadata={"format": "pt"})
    return to


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A random Llama with an output layer of its own."""
    folder = tmp_path_factory.mktemp("base") / "model"
    size = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False, "initializer_range": 0.08}
    return random_llama(folder, tokenizer, **size)


@pytest.mark.parametrize("kind", PACKINGS)
def test_packed_weights_load_count_and_unpack_as_what_they_stand_for(kind, base, tokenizer, tmp_path):
    import torch

    packed = pack(base, tmp_path / kind, tokenizer, kind)
    plain, held = weights.Weights(base), weights.Weights(packed)
    assert weights.count_weights(packed) == weights.count_weights(base)
    assert {n: held.shape(n) for n in held.entries} == {n: plain.shape(n) for n in plain.entries}
    assert len(held.states) == 14 and held.stored_bytes < plain.stored_bytes
    model = loading.load_model(packed, dtype="fp32")
    merged = merging.merge(packed, None, tmp_path / "merged", "nf4").path
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    difference = logits(loading.load_model(merged, dtype="fp32")) - logits(model)
    assert difference.square().mean().sqrt() < 0.02 * logits(model).std()
    merging.check_parent(base, packed)
    with pytest.raises(TunebookError, match=r"16-bit weights.*model_16bit"):
        merging.merge(packed, None, tmp_path / "other")

    def tune(tensors):
        draw = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if tensor.dim() > 1:
                noise = torch.randn(tensor.shape, generator=draw) * tensor.float().std() * 0.02
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)

    with pytest.raises(TunebookError, match=r"not what the base .* was quantised from: the weights of .* differ"):
        merging.check_parent(edit(base, tmp_path / "tuned", tune), packed)
    with pytest.raises(TunebookError, match="is not quantised"):
        merging.check_parent(base, base)


def test_a_16_bit_model_of_another_shape_is_no_parent(base, tokenizer, tmp_path):
    packed = pack(base, tmp_path / "packed", tokenizer)
    wide = random_llama(tmp_path / "wide", tokenizer, hidden_size=64, intermediate_size=192, tie_word_embeddings=False)
    with pytest.raises(TunebookError, match=r"mlp\..*_proj.weight is \[.*192.* there and \[.*128"):
        merging.check_parent(wide, packed)
    short = random_llama(tmp_path / "tied", tokenizer, hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
    with pytest.raises(TunebookError, match=r"lm_head.weight is missing there"):
        merging.check_parent(short, packed)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4"])
def test_another_quantiser_is_named(method, base, tmp_path):
    folder = tmp_path / method
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    for door in (loading.load_model, loading.load_config):
        with pytest.raises(TunebookError, match=f"quantised by {method.upper()}.*name the 16-bit model"):
            door(folder)


def test_an_endless_model_is_refused_before_it_is_built(base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**12}))
    with pytest.raises(TunebookError, match="num_hidden_layers is 1000000000000"):
        loading.load_model(tmp_path / "model")


def test_a_fingerprint_is_of_weights_config_and_tokenizer(base, tmp_path):
    known = weights.fingerprint(base)

    def nudge(tensors):
        tensors["model.norm.weight"] += 1

    assert weights.fingerprint(edit(base, tmp_path / "tuned", nudge)) != known
    same, tokens, config = (tmp_path / name for name in ("same", "tokens", "config"))
    for folder in (same, tokens, config):
        shutil.copytree(base, folder)
    (tokens / "tokenizer.json").write_text((base / "tokenizer.json").read_text().replace("<jupyter_", "<notebook_"))
    found = json.loads((base / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(found | {"transformers_version": "4.1", "_name_or_path": "x"}))
    (config / "config.json").write_text(json.dumps(found | {"rms_norm_eps": 1e-3}))
    assert weights.fingerprint(same) == known
    assert known not in (weights.fingerprint(tokens), weights.fingerprint(config))


# ---------------------------------------------------------------- broken folders


@pytest.fixture(scope="module")
def sharded(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    loading.load_model(base, dtype="bf16").save_pretrained(folder, max_shard_size="5MB")
    for file in base.glob("*token*"):
        shutil.copy(file, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_other_weights_in_the_folder_do_not_count(sharded, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    before = weights.count_weights(folder)
    shutil.copy(next(folder.glob("*.safetensors")), folder / "consolidated.safetensors")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"pickle")
    assert weights.count_weights(folder) == before
    assert not list(merging.merge(folder, None, tmp_path / "merged").path.glob("consolidated*"))
    for shard in weights.shards(folder):
        shard.unlink()
    with pytest.raises(TunebookError, match=r"it has consolidated.safetensors.*choose a copy"):
        loading.load_model(folder)


def test_a_missing_a_misplaced_and_a_truncated_tensor_are_named(sharded, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"

    def index(table):
        (folder / weights.INDEX).write_text(json.dumps({"weight_map": table}))

    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    table = json.loads((folder / weights.INDEX).read_text())["weight_map"]
    index(table | {"model.layers.7.mlp.up_proj.weight": table[name]})
    with pytest.raises(TunebookError, match=rf"lacks model.layers.7.mlp.up_proj.weight, which .* in {table[name]}"):
        loading.load_model(folder)
    index(table | {name: "../elsewhere.safetensors"})
    with pytest.raises(TunebookError, match="is not a file's name"):
        loading.load_model(folder)
    index(table | {name: "model-00009.safetensors"})
    with pytest.raises(TunebookError, match=r"model-00009.safetensors, which"):
        loading.load_model(folder)
    index(table)
    file = folder / table[name]
    entry = weights.header(file)[name]
    file.write_bytes(file.read_bytes()[: entry.start + 10])
    with pytest.raises(TunebookError, match=r"truncated: \S+ ends at byte"):
        loading.resolve_model(str(folder))


FIELDS = ["r", "lora_alpha", "target_modules", "peft_type", "modules_to_save", "rank_pattern", "alpha_pattern"]
FIELDS += ["lora_bias", "trainable_token_indices", "megatron_config", "layer_replication", "task_type", "use_dora"]
FIELDS += ["target_parameters", "layers_to_transform", "exclude_modules"]
HOSTILE = [None, "x", -1, 0, 1.5, [], {}, True, 10**12, [[]], "true", {"a": 1}]


def break_json(draw, file, fields):
    """One field of a JSON file gets a value of another kind, or the file is no JSON."""
    value = json.loads(file.read_text())
    if draw.random() < 0.15:
        file.write_text(draw.choice(["", "{", "[]", "null", "3", '{"a": NaN', "\x00"]))
        return
    value[draw.choice(fields or sorted(value))] = draw.choice(HOSTILE)
    file.write_text(json.dumps(value))


def break_tensors(draw, file):
    """Delete, rename, reshape or cut off what the file holds."""
    from safetensors.torch import load_file, save_file

    way = draw.choice(["cut", "empty", "noise", "delete", "rename", "reshape", "kind"])
    content = file.read_bytes()
    if way in ("cut", "empty", "noise"):
        at = draw.randrange(1, len(content))
        noise = bytes(draw.randrange(256) for _ in range(64))
        file.write_bytes({"cut": content[:at], "empty": b"", "noise": content[:8] + noise + content[72:]}[way])
        return
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    if way == "rename":
        tensors[draw.choice([f"x.{name}", name.replace("0", "9"), name + "_"])] = tensor
    elif way == "reshape":
        tensors[name] = draw.choice([tensor[:-1].contiguous(), tensor[None], tensor.reshape(-1)[:1].clone()])
    elif way == "kind":
        tensors[name] = tensor.long()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def small(tokenizer, tmp_path_factory):
    """(base, adapter) of a few kilobytes, so that hundreds can be broken."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small")
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(loading.load_model(folder / "model"), lora).save_pretrained(folder / "adapter")
    return folder / "model", folder / "adapter"


@pytest.mark.parametrize("seed", range(4))
def test_a_broken_folder_loads_or_is_one_message(seed, small, tmp_path):
    model, adapter = small
    draw = random.Random(seed)
    outcomes = {"loaded": 0, "refused": 0}
    for number in range(40):
        folder = tmp_path / str(number)
        broken_adapter = number % 2
        shutil.copytree(adapter if broken_adapter else model, folder)
        if draw.random() < 0.5:
            break_tensors(draw, next(folder.glob("*.safetensors")))
        else:
            fields = FIELDS if broken_adapter else []
            break_json(draw, next(folder.glob("*config.json")), fields)
        try:
            if broken_adapter:
                loading.load_adapter(loading.load_model(model), folder)
                merging.merge(model, folder, tmp_path / "merged")
            else:
                loading.resolve_model(str(folder))
                loading.load_model(folder)
            outcomes["loaded"] += 1
        except TunebookError as refused:
            assert str(folder) in str(refused), refused
            outcomes["refused"] += 1
        shutil.rmtree(folder)
    assert outcomes["refused"] > 10 and outcomes["loaded"] > 2
