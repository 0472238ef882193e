"""Unsloth as the second training backend: the same parameters, the same trainers, the same outputs.

Unsloth patches transformers and has to be imported before it, so `early_import` runs first thing in a training process
(`notebook.start` and `python -m helpers.train` call it). It is optional: its licences (Apache-2.0 with AGPL and LGPL parts)
stay with whoever installs it. Its statistics stay off and it makes no call home.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

from helpers import machine
from helpers.errors import TunebookError

QUIET = {
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_AUTO_INSTALL": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


def wanted(params: dict[str, Any]) -> bool:
    """True when these parameters will train through Unsloth on this machine; imports no transformers to find out."""
    asked = params.get("backend", "auto")
    if asked == "hf" or importlib.util.find_spec("unsloth") is None:
        return False
    if asked == "unsloth":
        return True
    card = machine.gpu()
    plain = (
        params.get("method") in ("qlora", "lora")
        and not params.get("dora")
        and params.get("init", "default") == "default"
    )
    return card is not None and card.capability < (8, 0) and plain and params.get("loss", "orpo") == "orpo"


def early_import(params: dict[str, Any]) -> bool:
    """Import Unsloth before transformers where these parameters will use it; True when it was imported.

    Raises TunebookError when transformers came first (Unsloth's patches would be missing from it), or when the import
    fails, with the reason.
    """
    if not wanted(params):
        return False
    if "unsloth" in sys.modules:
        return True
    if "transformers" in sys.modules:
        raise TunebookError(
            "Unsloth has to be imported before transformers, which this process has loaded already; restart the kernel and run from "
            "the first cell, or set backend to hf."
        )
    os.environ.update(QUIET)
    if machine.gpu() is None:
        raise TunebookError(
            "backend is unsloth, but Unsloth needs a GPU and there is none here; set backend to auto or hf."
        )
    try:
        import unsloth  # noqa: F401  it patches the libraries when it is imported
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        raise TunebookError(
            f"Unsloth cannot be imported ({str(error).splitlines()[0][:200]}); set backend to hf, or install the versions in requirements.txt."
        ) from error
    return True


def load(source: Any, params: Any, adapter: Any = None) -> tuple[Any, list[str]]:
    """(model with its adapter, notes) for a job's source and parameters.

    The head's loss is `helpers.model.chunked_loss`, as in the other backend, so that the trainers do not see a difference:
    SFT reads `.loss`, ORPO `.logps`. Hidden states are recomputed and wait in main memory, Unsloth's own way.
    """
    if "unsloth" not in sys.modules:
        raise TunebookError(
            "Unsloth is not imported; start the job through notebook.start or python -m helpers.train, which import it first."
        )
    import torch
    from unsloth import FastLanguageModel

    from helpers.model import chunked_loss

    path = str(getattr(source, "path", source))
    model, _ = FastLanguageModel.from_pretrained(
        path,
        max_seq_length=getattr(params, "max_length", 0) or longest(path),
        dtype=None,
        load_in_4bit=params.method == "qlora",
        trust_remote_code=False,
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        model = FastLanguageModel.for_training(model) or model
    else:
        modules = params.target_modules
        targets = (
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            if modules in ("", "all-linear")
            else [m.strip() for m in modules.split(",")]
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=params.rank,
            lora_alpha=params.alpha,
            lora_dropout=params.dropout,
            bias="none",
            target_modules=targets,
            use_gradient_checkpointing="unsloth",
            random_state=params.seed,
            use_rslora=params.rslora,
        )
    causal = model.get_base_model()
    notes = [f"Unsloth {sys.modules['unsloth'].__version__}: its kernels and offloaded recomputation"]
    why = chunked_loss.can_fuse(causal)
    if why:
        raise TunebookError(f"The Unsloth backend needs a plain output head, and {why}; set backend to hf.")
    chunked_loss.install(causal)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.float32)
    return model, [*notes, "cross-entropy without whole logits"]


def longest(path: str) -> int:
    """Longest context of the model in a folder, from its config.json."""
    import json
    from pathlib import Path

    config = json.loads((Path(path) / "config.json").read_text())
    return int(
        config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings") or 4096
    )
