"""The model that was trained, adapter on the base as training saw it, and what merging it costs.

An adapter learns beside the errors of its base in 4 bits or FP8. Merged onto the 16-bit weights it meets others, so the
merge onto what those unpack to is measured too, and the nearer one kept.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import cache, display, machine
from helpers.data import vocabulary
from helpers.model import loading, merging
from helpers.model.stop_tokens import stop_tokens
from helpers.runs import Manifest

# What a merge may differ from the model that was trained: the rounding of its weights to 16 bits.
MERGE_KL, MERGE_TOP1 = 0.02, 0.9


@dataclass
class Merge:
    """A merge beside the model that was trained. onto: "16bit", "nf4" or "fp8", "trained" for that model itself; KL in
    nats a token; task_score: where the run has test questions and a database."""

    onto: str
    tokens: int = 0
    mean_kl: float = 0.0
    top1: float = 1.0
    task_score: float | None = None
    task_count: int = 0
    chosen: bool = False

    @property
    def failed(self) -> str:
        """Why it is not the model that was trained; "" where it is."""
        if math.isfinite(self.mean_kl) and self.mean_kl <= MERGE_KL and self.top1 >= MERGE_TOP1:
            return ""
        share, least = display.percent(self.top1), display.percent(MERGE_TOP1, 0)
        found = f"mean KL {self.mean_kl:.3g} (at most {MERGE_KL:g}), top-1 {share} (at least {least})"
        return f"{found} over {self.tokens} tokens; set merge_onto to 'auto'"

    @property
    def name(self) -> str:
        return NAMES[self.onto] + ", kept" * self.chosen


NAMES = {"trained": "trained", "16bit": "merged onto 16 bits", "nf4": "merged onto 4 bits, unpacked"}
NAMES |= {"fp8": "merged onto FP8, unpacked"}


def saw(manifest: Manifest) -> str:
    """How a training stage saw its base: in 4-bit NormalFloat ("nf4"), "fp8" or "16bit"."""
    if manifest.data.get("method") == "qlora" or manifest.data.get("merge_onto") == "nf4":
        return "nf4"
    return "fp8" if manifest.data.get("quantize") == "fp8" else "16bit"


def load(base: Any, adapter: Path, tokenizer: Any, saw: str, dtype: str = "auto", device: str = "") -> Any:
    """The adapter on its base as training saw it: "nf4", "fp8" or "16bit".

    Not merged, but in fp32 on a CPU: there one matrix gives the same sums, and is what 4 bits unpack to in every pass.
    """
    import torch
    from transformers.utils import logging

    from helpers.model import fp8

    if loading.quantizer(loading.load_config(base)):  # as it unpacks, whatever kernels this machine has
        with tempfile.TemporaryDirectory(dir=cache.folder()) as folder:
            merged = merging.merge(base, adapter, Path(folder) / "merged", "nf4").path
            return loading.load_model(merged, dtype=dtype, device=device).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))  # as in merging: many small tensors
    try:
        double, quantize = merging.double_quant(adapter), "none" if saw == "16bit" else saw
        model = fp8.load(base, quantize, double, device, dtype=dtype)
        alone = model.device.type == "cpu" and saw != "fp8"
        if saw == "nf4" and alone:
            logging.set_verbosity_error()
            model = model.dequantize(model.dtype)
    finally:
        torch.set_num_threads(threads)
    vocabulary.fit(model, tokenizer)
    wrapped = loading.load_adapter(model, adapter)
    if alone and model.dtype == torch.float32:
        return wrapped.merge_and_unload().eval()
    found = wrapped.get_base_model().eval()
    found.tie_weights = lambda *_, **__: None  # lm-eval ties anew, and would not find an embedding in its adapter
    return found


def compare(
    models: Mapping[str, Callable[[], Any]],
    rows: Sequence[Sequence[int]],
    score: Callable[[Any], tuple[float | None, int]],
) -> list[Merge]:
    """Each merge against the model that was trained, the nearest one chosen.

    models: "trained", then the merges, each loaded when it is its turn; rows: token ids of held-out text; score: a
    model's task score and how many questions it counts.
    """
    import torch

    wanted: list[Any] = []
    merges: list[Merge] = []
    for onto, load_it in models.items():
        model = load_it()
        found = [logprobs(model, row).cpu() for row in rows]
        merge = Merge(onto, sum(map(len, found)))
        merge.task_score, merge.task_count = score(model)
        if wanted:
            merge.mean_kl = max(float(torch.cat(list(map(divergence, wanted, found))).mean()), 0.0)
            same = [(a.argmax(1) == b.argmax(1)).float() for a, b in zip(wanted, found, strict=True)]
            merge.top1 = float(torch.cat(same).mean())
        wanted = wanted or found
        merges.append(merge)
        del model, found
    # Of two alike the one onto 16 bits, whose base is everybody's.
    min(merges[1:], key=lambda m: (round(m.mean_kl, 3), m.onto != "16bit")).chosen = True
    return merges


# ---------------------------------------------------------------- what models say


def logprobs(model: Any, row: Sequence[int]) -> Any:
    """Natural log-probabilities of what follows each token but the last: float32 (len(row) - 1, vocabulary)."""
    import torch

    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([row[:-1]], device=model.device)).logits[0].float(), -1)


def divergence(wanted: Any, got: Any) -> Any:
    """Kullback-Leibler divergence a token, nats, of log-probabilities (tokens, vocabulary): `got` from `wanted`."""
    import torch

    width = min(wanted.shape[1], got.shape[1])  # a padded vocabulary may differ in rows that no text reaches
    pieces = zip(wanted[:, :width].split(128), got[:, :width].split(128), strict=True)
    kl = torch.nn.functional.kl_div
    return torch.cat([kl(g, w.to(g.device), log_target=True, reduction="none").sum(-1) for w, g in pieces])


def answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], limit: int) -> list[tuple[str, bool]]:
    """A greedy answer of at most `limit` tokens to each prompt, and whether it ended by itself."""
    import torch

    if not prompts:
        return []
    ends = stop_tokens(tokenizer, model.generation_config.eos_token_id)
    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    how = {"max_new_tokens": limit, "do_sample": False, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    with torch.inference_mode():
        made = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :].tolist()
    texts = tokenizer.batch_decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [(text.strip(), not set(ends).isdisjoint(row)) for text, row in zip(texts, made, strict=True)]


def placement(size_gib: float) -> dict[str, Any]:
    """dtype and device for a model of that many GiB in 16 bits: float32, bfloat16 where that does not fit; the GPU, or
    the CPU where it has no room."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    room = machine.free_gpu_gib() or 0.0
    on_gpu = 1.2 * size_gib + 1 < room
    room = room if on_gpu else machine.free_memory_gib()
    return {"dtype": "fp32" if 2.2 * size_gib < room else "bf16", "device": "" if on_gpu else "cpu"}
