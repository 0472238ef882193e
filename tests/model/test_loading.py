"""Every model, adapter and hub that cannot be loaded ends in one message that says why and what to do."""

import errno
import json
import shutil
import warnings

import httpx
import pytest
from huggingface_hub import errors

from helpers import machine
from helpers.errors import TunebookError
from helpers.model import loading, offline, weights

# ---------------------------------------------------------------- the hub


def answer(kind, status, **more):
    return kind("said the hub", response=httpx.Response(status, request=httpx.Request("GET", "https://hub/x")), **more)


def behind(error):
    """As huggingface_hub raises it when it finds nothing on the disk either."""
    outer = errors.LocalEntryNotFoundError("an error happened while trying to locate the files")
    outer.__cause__ = error
    return outer


FAILURES = {
    "gated": (lambda: answer(errors.GatedRepoError, 403), "accept its terms"),
    "not there": (lambda: answer(errors.RepositoryNotFoundError, 404), "check the spelling"),
    "no such revision": (lambda: answer(errors.RevisionNotFoundError, 404), "check the spelling"),
    "token refused": (lambda: answer(errors.HfHubHTTPError, 401), "does not accept your token"),
    "asked too often": (lambda: behind(answer(errors.HfHubHTTPError, 429)), "HTTP 429"),
    "the hub's own failure": (lambda: behind(answer(errors.HfHubHTTPError, 500)), r"failed on .*HTTP 500"),
    "disk full": (lambda: OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    "read-only cache": (lambda: PermissionError(errno.EACCES, "Permission denied"), "HF_HOME"),
    "slow": (lambda: behind(httpx.ReadTimeout("timed out")), "did not answer in time"),
    "offline": (lambda: behind(errors.OfflineModeIsEnabled("offline")), "HF_HUB_OFFLINE"),
    "no network": (lambda: behind(httpx.ConnectError("no route")), "No hub is reachable"),
}


def failing(monkeypatch, make):
    import huggingface_hub

    def download(name, local_files_only=False, **options):
        raise errors.LocalEntryNotFoundError("not here") if local_files_only else make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


@pytest.mark.parametrize("failure", FAILURES)
def test_each_failure_of_the_hub_has_its_own_message(failure, monkeypatch):
    make, words = FAILURES[failure]
    failing(monkeypatch, make)
    with pytest.raises(TunebookError, match=words) as refused:
        loading.resolve_model("somebody/some-model")
    assert "huggingface-cli" not in str(refused.value)
    if failure != "no network":
        assert "No hub is reachable" not in str(refused.value)


def test_a_gated_model_is_told_how_to_log_in(monkeypatch):
    failing(monkeypatch, FAILURES["gated"][0])
    with pytest.raises(TunebookError, match="hf auth login"):
        loading.resolve_model("somebody/some-model")


def test_the_default_model_comes_from_its_copy_only_when_the_hub_is_not_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(offline, "folder", lambda: tmp_path / "none")
    monkeypatch.setattr(offline, "convert", lambda: tmp_path)
    failing(monkeypatch, FAILURES["the hub's own failure"][0])
    assert loading.resolve_model(loading.DEFAULT_MODEL).origin == "wheel"
    assert "HTTP 500" in capsys.readouterr().out
    failing(monkeypatch, FAILURES["disk full"][0])
    with pytest.raises(TunebookError, match="No space left"):
        loading.resolve_model(loading.DEFAULT_MODEL)


# ---------------------------------------------------------------- the folder


def damaged(base, to, change):
    """A copy of a model or adapter folder after `change(its tensors)`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, to)
    (file,) = to.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return to


def test_missing_and_mismatched_tensors_of_a_base_are_refused_by_name(tiny_llama, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    lost = damaged(tiny_llama, tmp_path / "lost", lambda tensors: tensors.pop(name))
    with pytest.raises(TunebookError, match=f"lacks {name}"):
        loading.load_model(lost)

    def narrow(tensors):
        tensors[name] = tensors[name][:, :100].contiguous()

    with pytest.raises(TunebookError, match=name):
        loading.load_model(damaged(tiny_llama, tmp_path / "narrow", narrow))


def test_broken_folders_are_one_message_each(tiny_llama, tmp_path):
    spoilt = {
        "config.json": ["{", "[]", '{"model_type": 3}', '{"model_type": "llama", "hidden_size": "wide"}', ""],
        "model.safetensors": ["", "no weights at all, but longer than a header's eight bytes"],
        "tokenizer.json": ["{", "{}", ""],
    }
    for number, (file, text) in enumerate((f, t) for f, texts in spoilt.items() for t in texts):
        folder = tmp_path / str(number)
        shutil.copytree(tiny_llama, folder)
        (folder / file).write_text(text)
        with pytest.raises(TunebookError, match=str(folder)):
            loading.load_tokenizer(folder) if file == "tokenizer.json" else loading.load_model(folder)
    truncated = tmp_path / "truncated"
    shutil.copytree(tiny_llama, truncated)
    whole = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TunebookError, match="cannot be loaded"):
        loading.load_model(truncated)


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(loading.load_model(tiny_llama, dtype="fp32"), config).save_pretrained(folder)
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(saved | {"base_model_name_or_path": "somebody/base"}))
    return folder


def test_an_adapter_is_loaded_whole_or_refused_by_name(tiny_llama, adapter, tmp_path):
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's of another base's name, a red box in a notebook
        model = loading.load_adapter(loading.load_model(tiny_llama, dtype="fp32"), adapter, trainable=True)
    assert model.peft_config["default"].base_model_name_or_path == "somebody/base"
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == tensors.keys() and all((trained[n] == tensors[n]).all() for n in tensors)
    name = sorted(tensors)[0]
    lost = damaged(adapter, tmp_path / "lost", lambda tensors: tensors.pop(name))
    stranger = damaged(
        adapter, tmp_path / "stranger", lambda t: t.update({name.replace("layers.0", "layers.7"): t[name].clone()})
    )
    for folder in (lost, stranger):
        with pytest.raises(TunebookError, match=r"layers\.[07]\..*missing or belongs to no layer"):
            loading.load_adapter(loading.load_model(tiny_llama, dtype="fp32"), folder)
    odd = tmp_path / "odd"
    shutil.copytree(adapter, odd)
    config = json.loads((odd / "adapter_config.json").read_text())
    for change in ({"r": "many"}, {"peft_type": "NOBODY_KNOWS"}, {"target_modules": ["no_such_layer"]}):
        (odd / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(TunebookError, match=str(odd)):
            loading.load_adapter(loading.load_model(tiny_llama, dtype="fp32"), odd)


def test_fp32_becomes_bf16_only_where_nobody_asked_for_it_and_aloud(tiny_llama, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(loading, "fast_bf16", lambda: False)
    monkeypatch.setattr(machine, "gpu", lambda: None)
    assert loading.load_model(tiny_llama).dtype == torch.float32 and not capsys.readouterr().out
    monkeypatch.setattr(machine, "free_memory_gib", lambda: 0.01)
    assert loading.load_model(tiny_llama).dtype == torch.bfloat16
    assert "loaded in bf16" in capsys.readouterr().out
    assert loading.load_model(tiny_llama, dtype="fp32").dtype == torch.float32


@pytest.mark.parametrize("kind", ["recurrent_gemma", "xlstm", "cpmant"])
def test_what_transformers_computes_wrong_is_refused_before_any_weight_is_read(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(TunebookError, match=f"The model of type {kind} "):
        loading.load_config(tmp_path)


@pytest.mark.parametrize("spoilt", [{"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, {"hidden_act": "spiral"}])
def test_a_config_that_cannot_be_built_is_one_message_before_any_weight_is_read(narrow_llama, tmp_path, spoilt):
    base = shutil.copytree(narrow_llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config.pop("rope_parameters", None)
    (base / "config.json").write_text(json.dumps(config | spoilt))
    with pytest.raises(TunebookError, match=r"The model in .*base cannot be loaded \('?spiral'?\); this transformers"):
        loading.check_shapes(weights.Weights(base), loading.load_config(base))


def test_padding_is_never_an_ordinary_word():
    """A tokenizer whose padding, end and unknown token are one, and that knows the word "reserved"."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0, "reserved": 1, "a": 2}
    one = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "</s>")
    backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    alone = PreTrainedTokenizerFast(tokenizer_object=backend, **one)
    loading.mend_padding(alone)
    assert alone.pad_token_id == 3 and alone.pad_token == "<|pad|>" and alone.decode([1]) == "reserved"
    backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    spare = PreTrainedTokenizerFast(tokenizer_object=backend, **one, extra_special_tokens=["<|reserved_7|>"])
    loading.mend_padding(spare)
    assert spare.pad_token == "<|reserved_7|>"
