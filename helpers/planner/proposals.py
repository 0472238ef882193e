"""What is taken where nothing was named: the backend, CUDA graphs, and the peak learning rate published for a method,
rank and size of model; what an adapter can hold and 4 bits lose.

LoRA: 2e-4 up to 13 billion parameters, 1e-4 at 33 and 65 (QLoRA, arXiv:2305.14314, table 9), falling with the size of
the model, and ten times that of full tuning ("LoRA Without Regret", Thinking Machines, 2025): here 2e-4 · (8e9 /
parameters)^0.4, which is 1e-3 at 135 million. Preference training (ORPO, DPO, KTO, SimPO): 5e-6 to 8e-6 for an adapter
at 7B (ORPO, arXiv:2403.07691; the Alignment Handbook's zephyr-7b-dpo-qlora), a tenth for whole weights (Zephyr,
arXiv:2310.16944). With alpha fixed the best rate does not depend on the rank; with another alpha it goes by its inverse
root (the same report's invariances of Adam). Lion takes 3 to 10 times less (arXiv:2302.06675).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from helpers.errors import TunebookError
from helpers.model.layer_kinds import Shape
from helpers.planner.cost_model import CAPTURE_S, Card, Option

SMALLEST = 10**8  # parameters: below it the rate does not rise any more
FAR = 5.0  # a rate so many times off is warned about
PUBLISHED = {"sft": (2e-4, 0.4), "preference": (7e-6, 0.65)}  # (rate of LoRA at 8 billion parameters, fall with size)
EIGHT_BITS = "and held-out loss 0.9 % above 16 bits' (measured at 135M; three seeds, -2.5 to +4.5)"
SOURCE = {"sft": "QLoRA and LoRA Without Regret", "preference": "ORPO and the Alignment Handbook"}
UNSLOTH_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere", "phi3")


def choose_backend(asked: str, card: Card, model_type: str, params: Mapping[str, Any]) -> tuple[str, str]:
    """("hf" or "unsloth", why). auto: hf wherever its kernels run, Unsloth on older GPUs when it is installed."""
    method, loss = params.get("method", "auto"), params.get("loss", "sft")
    obstacles = {
        "Unsloth needs a GPU": card.capability is None,
        f"method {method} is not offered through Unsloth here": method not in ("auto", "qlora", "lora"),
        f"loss {loss} is not offered through Unsloth here": loss not in ("sft", "orpo"),
        f"Unsloth has no kernels for {model_type}": model_type not in UNSLOTH_MODELS,
        "DoRA is not offered through Unsloth here": params.get("dora"),
        "PiSSA and LoftQ are not offered through Unsloth here": params.get("init", "default") != "default",
        "Unsloth computes in 16 bits and precision is fp32": params.get("precision") == "fp32",
        "Unsloth is not installed": importlib.util.find_spec("unsloth") is None,
    }
    cannot = next((why for why, true in obstacles.items() if true), "")
    if asked == "unsloth" and cannot:
        raise TunebookError(f"backend is unsloth, but {cannot}; set backend to auto or hf.")
    if asked in ("hf", "unsloth"):
        return asked, f"Backend {asked}, as asked."
    if card.capability is not None and card.capability >= (8, 0):
        return "hf", "Backend hf: packed rows through variable-length FlashAttention are the fastest on this GPU."
    if cannot:
        return "hf", f"Backend hf: {cannot}."
    return "unsloth", "Backend unsloth: it has kernels for this GPU, and variable-length FlashAttention has none."


def propose(params: Any, parameters: int) -> tuple[float, str]:
    """(rate for a stage's parameters on a model of so many, rounded to one digit; why and by which source)."""
    kind = "sft" if params.stage == "sft" else "preference"
    at_8b, fall = PUBLISHED[kind]
    rate, what = (
        at_8b * (8e9 / max(parameters, SMALLEST)) ** fall,
        f"a LoRA of alpha {params.alpha}, rank {params.rank}",
    )
    if params.method in ("full", "freeze"):
        rate, what = rate / 10, f"method {params.method}"
    else:
        rate *= (32 / (params.alpha * params.rank**0.5 if params.rslora else params.alpha)) ** 0.5
    rate = float(f"{rate * (0.2 if params.optimizer == 'lion' else 1):.0e}")
    return rate, f"{what} on {parameters / 1e9:.2g} billion parameters, {kind} ({SOURCE[kind]})"


def used(params: Any, parameters: int) -> tuple[float, str]:
    """(rate that the job trains with, the line of the plan about it)."""
    rate, why = propose(params, parameters)
    if not params.learning_rate:
        return rate, f"Learning rate {rate:g}, proposed for {why}."
    times = max(params.learning_rate / rate, rate / params.learning_rate)
    side = "above" if params.learning_rate > rate else "below"
    warning = f"Warning: it is {times:.0f} times {side} the {rate:g} proposed for {why}." if times > FAR else ""
    return params.learning_rate, f"Learning rate {params.learning_rate:g}, as given. {warning}".strip()


def capacity(trained: int, tokens: int) -> str:
    """The plan's line about what an adapter of so many parameters can hold: about 2 bits each (Allen-Zhu and Li,
    arXiv:2404.05405), against about 1 bit a token that is learnt ("LoRA Without Regret")."""
    bits, verdict = 2 * max(trained, 1), "enough"
    if bits < tokens:
        verdict = f"too little to learn them by heart: raise rank {tokens / bits:.1f} times, or set method to 'full'"
    return (
        f"Adapter capacity: {trained:,} parameters × 2 bits against {tokens:,} tokens at most, 1 bit each: {verdict}."
    )


def four_bits(parameters: int) -> str:
    """What is known of a 4-bit base's cost in quality at a model's size."""
    if parameters < 1e9:
        found = "Measured at 135M on a CPU, 40 steps of text-to-SQL: held-out loss 0.326 on 4 bits and 0.250 on 16"
        return f"{found}, which took half the time."
    found = "no loss was found from 7 billion parameters (QLoRA, arXiv:2305.14314, table 4)"
    return f"What 4 bits cost in quality: {found if parameters > 6e9 else 'not measured at this size'}."


def graphed(asked: str, shape: Shape, card: Card, plain: Option, graphs: Option, tokens: float) -> tuple[Option, str]:
    """The option with its rows as CUDA graphs where that saves time in a run of so many tokens, and what to say."""
    s, saved = plain.setting, tokens / plain.tokens_per_s - tokens / graphs.tokens_per_s
    obstacles = {
        "there is no GPU": card.capability is None,
        "rows are padded, or attention goes document by document": s.padded or s.backend != "hf" or not s.flash,
        "several processes train together": s.shards > 1,
        "checkpointing and dropout keep random states on the host": s.recompute or s.params.dropout,
        "a token's experts are chosen on the host": shape.experts,
        f"they need {graphs.need_gib:.1f} GiB": not graphs.fits,
        f"they save {max(saved, 0):.0f} s of the run": asked == "auto" and saved < CAPTURE_S,
    }
    if asked == "off" or (asked == "auto" and card.capability is None):
        return plain, ""
    if why := next((why for why, true in obstacles.items() if true), ""):
        return plain, f"CUDA graphs: none, {why}."
    return graphs, f"CUDA graphs: they save {max(saved, 0):,.0f} s of launching kernels one by one."
