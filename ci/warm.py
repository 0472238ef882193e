"""What the kernel of the next notebook imports while the one before it is still at work."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util

from helpers import machine

HEAVY = {
    "data": ("helpers.data.prepare", "transformers.models.auto.tokenization_auto"),
    "sft": ("helpers.train.training", "helpers.train.trainers", "peft", "trl.trainer.sft_trainer"),
    "orpo": ("helpers.train.training", "helpers.train.trainers", "peft", "trl.trainer.sft_trainer"),
    "gguf": ("helpers.gguf.export", "helpers.model.merging", "peft", "transformers.models.auto.modeling_auto"),
    "eval": ("helpers.evaluate.evaluation", "helpers.report", "peft", "transformers.models.auto.modeling_auto"),
}


def libraries(stage: str, backend: str = "hf") -> None:
    """Import what `stage` will; nothing where Unsloth may train, which has to be imported before all others."""
    gpu = machine.gpu()
    later = backend != "hf" and gpu and gpu.capability < (8, 0) and importlib.util.find_spec("unsloth")
    for name in () if later or backend == "unsloth" else HEAVY[stage]:
        with contextlib.suppress(ImportError):  # the notebook will say it
            importlib.import_module(name)
