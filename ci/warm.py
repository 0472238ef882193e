"""What the kernel of the next notebook imports while the one before it is still at work."""

from __future__ import annotations

import contextlib
import importlib

from helpers.errors import TunebookError
from helpers.planner import cost_model
from helpers.planner.proposals import UNSLOTH_MODELS, choose_backend

TRAINING = ("helpers.train.training", "helpers.train.trainers", "peft", "trl.trainer.sft_trainer")
HEAVY = {
    "data": ("helpers.data.prepare", "transformers.models.auto.tokenization_auto"),
    "sft": TRAINING,
    "orpo": TRAINING,
    "gguf": ("helpers.gguf.export", "helpers.model.merging", "peft", "transformers.models.auto.modeling_auto"),
    "eval": ("helpers.evaluate.evaluation", "helpers.report", "peft", "transformers.models.auto.modeling_auto"),
}


def libraries(stage: str, backend: str = "hf") -> None:
    """Import what `stage` will; nothing where Unsloth may train, which has to be imported before all others."""
    try:  # the model is not known yet: as for one that Unsloth has kernels for
        chosen, _ = choose_backend(backend, cost_model.card_here(), min(UNSLOTH_MODELS), {})
    except TunebookError:  # the notebook will say it
        return
    for name in HEAVY[stage] if chosen == "hf" else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
