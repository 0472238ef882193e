"""In which numbers a card trains: bf16 where it is native, fp16 with fp32 adapters and a loss scaler below, fp32 by wish
and on processors without bfloat16 kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Precision:
    """load: dtype of the frozen base ("bf16", "fp16", "fp32"); bf16, fp16: the trainer's autocast; reason: for people."""

    load: str
    bf16: bool
    fp16: bool
    reason: str


def choose(capability: tuple[int, int] | None, wish: str = "auto") -> Precision:
    """Precision for a card of this compute capability (None: CPU). What cannot work is refused by `methods.check` before."""
    if wish == "fp32":
        return Precision("fp32", False, False, "fp32 everywhere, as asked")
    if capability is None:
        from helpers.model.loading import fast_bf16

        if wish == "auto" and not fast_bf16():
            return Precision("fp32", False, False, "fp32: this processor has no kernels for bfloat16")
        return Precision("bf16", True, False, "bf16 on the CPU, adapters and optimizer in fp32")
    if wish == "fp16" or capability < (8, 0):
        return Precision(
            "fp16",
            False,
            True,
            f"fp16 with loss scaling (compute capability {capability[0]}.{capability[1]}), adapters in fp32",
        )
    return Precision("bf16", True, False, "bf16, adapters and optimizer in fp32")


def keep_in_fp32(model: Any) -> int:
    """Put every trained weight in fp32; returns how many tensors moved. TRL turns the adapters of a 4-bit base to bf16:
    fp16's scaler cannot unscale such gradients, and at the end of a cosine an update is below bf16's last digit."""
    import torch

    moved = 0
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype != torch.float32:
            weight.data = weight.data.float()
            moved += 1
    return moved
