"""Unsloth as the second training backend: the same parameters, the same trainers, the same outputs.

Unsloth patches transformers and has to be imported before it, so `import_first` runs first thing in a training process
(`notebook.start` and `python -m helpers.train` call it). It is optional: its licences (Apache-2.0 with AGPL and LGPL
parts) stay with whoever installs it. Its statistics stay off and it makes no call home.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from helpers import runs
from helpers.errors import TunebookError
from helpers.model.loading import load_adapter, resolve_model
from helpers.planner import cost_model
from helpers.planner.plan import choose_backend

QUIET = {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_AUTO_INSTALL": "0"}
QUIET |= {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def decide(params: Any) -> str:
    """ "hf" or "unsloth": what the planner will choose, told by its own function before transformers is imported.

    The model type is read from config.json; torch is asked for the GPU only where all else speaks for Unsloth. Raises
    TunebookError for backend "unsloth" where it cannot train.
    """
    if params.backend == "hf" or (params.backend == "auto" and importlib.util.find_spec("unsloth") is None):
        return "hf"
    try:
        known = runs.load(params.run, "data", verify=False).data["model"]
        config = read_config(resolve_model(params.model).path if params.model else Path(known["path"]))
    except (TunebookError, OSError, KeyError):  # the job says what is missing when it is opened
        return params.backend.replace("auto", "hf")
    model_type = config.get("text_config", {}).get("model_type") or config.get("model_type", "")

    def chosen(card: cost_model.Card) -> str:
        return choose_backend(params.backend, card, model_type, params.as_dict())[0]

    if chosen(cost_model.card_named("T4")) == "hf":  # not even on the oldest GPU
        return "hf"
    return chosen(cost_model.card_named(params.plan_for) if params.plan_for else cost_model.card_here())


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    return json.loads((folder / "config.json").read_text())


def import_first(params: Any) -> bool:
    """Import Unsloth before transformers where these parameters will use it; True when it was imported.

    Raises TunebookError when transformers came first (Unsloth's patches would be missing from it), or when the import
    fails, with the reason.
    """
    if decide(params) == "hf":
        return False
    if "unsloth" in sys.modules:
        return True
    if "transformers" in sys.modules:
        raise TunebookError(
            "Unsloth has to be imported before transformers, which this process has loaded already; restart the kernel "
            "and run from the first cell, or set backend to hf."
        )
    os.environ.update(QUIET)
    try:
        import unsloth  # noqa: F401  it patches the libraries when it is imported
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        why = str(error).splitlines()[0][:200]
        raise TunebookError(
            f"Unsloth cannot be imported ({why}); set backend to hf, or install the versions in requirements.txt."
        ) from error
    return True


def load(source: Any, params: Any, adapter: Path | None = None) -> tuple[Any, list[str]]:
    """(model with its adapter, notes) for a job's source and parameters.

    The head's loss is `helpers.model.chunked_loss`, as in the other backend: the trainers do not see a difference.
    Activations are checkpointed and offloaded to host memory, Unsloth's own way.
    """
    if "unsloth" not in sys.modules:
        raise TunebookError("Unsloth has to be imported first; begin with notebook.start, or python -m helpers.train.")
    from unsloth import FastLanguageModel

    from helpers.model import chunked_loss

    config = read_config(source.path)
    longest = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    model, _ = FastLanguageModel.from_pretrained(
        str(source.path),
        max_seq_length=params.max_length if params.stage == "orpo" else int(longest or 4096),
        dtype=None,
        load_in_4bit=params.method == "qlora",
        trust_remote_code=False,
    )
    if adapter is not None:
        model = load_adapter(model, adapter, trainable=True)
        model = FastLanguageModel.for_training(model) or model
    else:
        modules = params.target_modules
        model = FastLanguageModel.get_peft_model(
            model,
            r=params.rank,
            lora_alpha=params.alpha,
            lora_dropout=params.dropout,
            bias="none",
            target_modules=TARGETS if modules == "all-linear" else [m.strip() for m in modules.split(",")],
            use_gradient_checkpointing="unsloth",
            random_state=params.seed,
            use_rslora=params.rslora,
        )
    if why := chunked_loss.can_fuse(model.get_base_model()):
        raise TunebookError(f"The Unsloth backend needs a plain output head, and {why}; set backend to hf.")
    chunked_loss.install(model.get_base_model())
    version = sys.modules["unsloth"].__version__
    note = f"Unsloth {version}: its kernels and offloaded activation checkpointing, cross-entropy without whole logits"
    return model, [note]
