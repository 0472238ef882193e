"""Is the GGUF file the model that was trained? Measured in the llama.cpp runtime, against the merged model in high precision.

Four gates: token ids, rendered prompt, logits, stopping. The trained model's side is computed here, once. Each quantised file's unpacked
weights are then run in the same model, so that what the smaller weights cost and what the runtime's arithmetic costs are told apart;
the files themselves are measured one after another in a process without torch (helpers/gguf/probes.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from helpers import machine
from helpers.errors import TunebookError
from helpers.gguf import dequantised, shapes

# Largest mean KL divergence in nats and smallest top-1 agreement. f16 is the proof that the chain is right; the others are two to three
# times what SmolLM2-135M shows (93 % of first choices kept by q8_0 on 250 tokens), which loses more to each type than larger models do.
BUDGETS = {
    "f16": (1e-4, 0.995),
    "bf16": (2e-3, 0.98),
    "q8_0": (0.02, 0.88),
    "q6_k": (0.05, 0.85),
    "q5_k_m": (0.15, 0.75),
    "q5_k_s": (0.15, 0.75),
    "q4_k_m": (0.25, 0.65),
    "q4_k_s": (0.3, 0.65),
    "q4_0": (0.4, 0.6),
    "q3_k_m": (0.5, 0.5),
    "q3_k_s": (0.8, 0.4),
    "q2_k": (2.0, 0.2),
}


@dataclass
class Result:
    """What was found about one file. KL in nats a token; agreement and shares from 0 to 1; failed: gate -> sentence.

    weights_kl: of the same weights unpacked, in the trained model's own arithmetic; runtime_kl: what is left of the divergence without it.
    """

    type: str
    tokens: int = 0
    mean_kl: float = 0.0
    p99_kl: float = 0.0
    top1: float = 0.0
    perplexity: float = 0.0
    reference_perplexity: float = 0.0
    weights_kl: float | None = None
    runtime_kl: float | None = None
    token_texts: int = 0
    prompt_shapes: list[str] = field(default_factory=list)
    skipped_shapes: dict[str, str] = field(default_factory=dict)
    answers: int = 0
    same_answers: int = 0
    stopped: int = 0
    reference_stopped: int = 0
    task_score: float | None = None
    task_count: int = 0  # questions behind it
    failed: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Reference:
    """The merged model in float32 (bfloat16 where that does not fit the memory), its log-probabilities and answers on held-out text.

    merged: the model folder; rows: token ids of held-out conversations; prompts: token ids to answer; conversations: messages of the job, for
    the prompt gate. Log-probabilities are kept in one file on disk, 4 bytes x tokens x vocabulary, until `close`.
    """

    def __init__(
        self,
        merged: Path,
        rows: Sequence[Sequence[int]],
        prompts: Sequence[Sequence[int]] = (),
        max_tokens: int = 64,
        work: Path | None = None,
        conversations: Sequence[list[dict]] = (),
    ):
        import numpy as np

        from helpers.model.loading import load_tokenizer

        self.tokenizer = load_tokenizer(merged)
        self.rows, self.prompts, self.max_tokens = (
            [list(map(int, r)) for r in rows],
            [list(map(int, p)) for p in prompts],
            max_tokens,
        )
        if not any(len(r) > 1 for r in self.rows):
            raise TunebookError(
                "There is no held-out text of two tokens or more to compare on; prepare the data with an evaluation part."
            )
        self.folder = tempfile.TemporaryDirectory(prefix=".fidelity.", dir=work)
        self.model = _load(merged)
        self._places: dequantised.Places | None = None
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        count = sum(len(r) - 1 for r in self.rows)
        kept = np.memmap(Path(self.folder.name) / "logprobs.f32", np.float32, "w+", shape=(count, self.vocabulary))
        for at, row in self._by_row():
            kept[at : at + len(row) - 1] = logprobs(self.model, row).cpu().numpy()
        self.answers = self._answer()
        following = np.concatenate([np.asarray(r[1:], dtype=np.int64) for r in self.rows])
        loss = -float(np.mean(kept[np.arange(count), following], dtype=np.float64))
        self.perplexity = math.exp(min(loss, 700.0))
        kept.flush()
        self._write(conversations)

    def weights_kl(self, file: Path, source: Path) -> float | None:
        """Mean KL divergence of the trained model with the weights of `file`, unpacked, in nats a token.

        source: the 16-bit GGUF that `file` was quantised from. None where the trained model is not in float32, or its weights are not
        matrices that the converter took over row by row. The model's own weights are gone afterwards.
        """
        if next(self.model.parameters()).dtype.itemsize < 4:
            return None
        self._places = self._places or dequantised.Places(self.model, source)
        if not self._places.fill(file):
            return None
        kept = self.open()
        total = sum(
            float(divergence(kept[at : at + len(row) - 1], logprobs(self.model, row)).sum())
            for at, row in self._by_row()
        )
        return max(total / len(kept), 0.0)

    def free(self) -> None:
        """Give the model's memory back; what the files are measured against is on disk."""
        self.model = self._places = None

    def _by_row(self) -> Iterator[tuple[int, list[int]]]:
        """(place of its first log-probabilities, token ids) of each row."""
        at = 0
        for row in self.rows:
            yield at, row
            at += len(row) - 1

    def _answer(self) -> list[tuple[list[int], bool]]:
        """A greedy answer a prompt without the token that ended it, and whether it ended by itself."""
        import torch

        if not self.prompts:
            return []
        ends, pad, width = _ends(self.model, self.tokenizer), self.tokenizer.pad_token_id, max(map(len, self.prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in self.prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in self.prompts], device=self.model.device)
        made = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.max_tokens,
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=pad,
        )[:, width:].tolist()
        stops = [next((i for i, token in enumerate(row) if token in ends), None) for row in made]
        return [(row[:stop], stop is not None) for row, stop in zip(made, stops, strict=True)]

    def _write(self, conversations: Sequence[list[dict]]) -> None:
        """All that the measuring process needs to know about the trained model's side."""
        encode = lambda text, special: self.tokenizer(text, add_special_tokens=special)["input_ids"]
        texts = [
            *shapes.TEXTS,
            *shapes.added_token_texts(self.tokenizer),
            *(self.tokenizer.decode(r) for r in self.rows[:8]),
        ]
        wanted = []
        held_out = {f"held-out {i + 1}": (c, None) for i, c in enumerate(conversations)}
        for shape, (messages, tools) in {**shapes.conversations(), **held_out}.items():
            text, why = shapes.render(self.tokenizer, messages, tools)
            wanted.append(
                {
                    "shape": shape,
                    "messages": messages,
                    "tools": tools,
                    "text": text,
                    "why": why,
                    "ids": encode(text, False) if text is not None else [],
                }
            )
        (Path(self.folder.name) / "reference.json").write_text(
            json.dumps(
                {
                    "rows": self.rows,
                    "prompts": self.prompts,
                    "answers": self.answers,
                    "max_tokens": self.max_tokens,
                    "vocabulary": self.vocabulary,
                    "perplexity": self.perplexity,
                    "bos": self.tokenizer.bos_token_id,
                    "bos_text": self.tokenizer.bos_token or "",
                    "texts": [{"text": t, "plain": encode(t, False), "special": encode(t, True)} for t in texts],
                    "conversations": wanted,
                }
            )
        )

    def open(self) -> Any:
        """Natural log-probabilities of the trained model, float32 tensor (tokens, vocabulary), memory-mapped."""
        import numpy as np
        import torch

        count = sum(len(r) - 1 for r in self.rows)
        return torch.from_numpy(
            np.memmap(Path(self.folder.name) / "logprobs.f32", np.float32, "c", shape=(count, self.vocabulary))
        )

    def close(self) -> None:
        self.folder.cleanup()


def measure(
    reference: Reference, path: Path, kind: str, weights_kl: float | None = None, library: str | Path = ""
) -> Result:
    """Compare one GGUF file with the reference. weights_kl: what `Reference.weights_kl` found for it."""
    settings = {
        "reference": reference.folder.name,
        "path": str(path),
        "kind": kind,
        "budget": BUDGETS[kind],
        "library": str(library),
    }
    done = subprocess.run(
        [sys.executable, "-m", "helpers.gguf.probes", json.dumps(settings)],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=machine.PROJECT,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise TunebookError(f"{path.name} could not be measured: {said[-1][:400]}")
    result = Result(**json.loads(lines[-1]))
    if weights_kl is not None:
        result.weights_kl, result.runtime_kl = weights_kl, max(result.mean_kl - weights_kl, 0.0)
    return result


def require(results: Sequence[Result]) -> None:
    """Raises TunebookError that names every file and gate that failed."""
    broken = [f"{r.type}: {gate} ({why})" for r in results for gate, why in r.failed.items()]
    if broken:
        raise TunebookError(
            "The exported files are not the model that was trained. "
            + "; ".join(broken)
            + ". The files stay for inspection and "
            "nothing reads them; export again, or allow it with fidelity_gates=False after reading fidelity.json."
        )


# ---------------------------------------------------------------- numbers


def logprobs(model: Any, row: Sequence[int]) -> Any:
    """Natural log-probabilities of what follows each token of `row` but the last: float32 tensor (len(row) - 1, vocabulary)."""
    import torch

    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([row[:-1]], device=model.device)).logits[0].float(), -1)


def divergence(wanted: Any, got: Any) -> Any:
    """Kullback-Leibler divergence a token, nats, of log-probabilities (tokens, vocabulary): `got` from `wanted`."""
    import torch

    width = min(wanted.shape[1], got.shape[1])  # a padded vocabulary may differ in rows that no text reaches
    pieces = zip(wanted[:, :width].split(128), got[:, :width].split(128), strict=True)
    return torch.cat(
        [torch.nn.functional.kl_div(g, w.to(g.device), log_target=True, reduction="none").sum(-1) for w, g in pieces]
    )


def _load(merged: Path) -> Any:
    """The merged model in float32 or, where that does not fit, in 16 bits; in main memory where even those don't fit the card."""
    from helpers.model.loading import load_model

    size = sum(f.stat().st_size for f in merged.glob("*.safetensors")) / 2**30
    card = machine.gpu()
    device = "cpu" if card is None or 1.2 * size + 1 > card.total_gib else ""
    room = available_gib() if device else card.total_gib
    return load_model(merged, dtype="fp32" if 2.2 * size < room else "bf16", device=device).eval()


def available_gib() -> float:
    """Memory that new programs can have, in GiB."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20
    except (OSError, StopIteration):
        return machine.total_memory_gib()


def _ends(model: Any, tokenizer: Any) -> set[int]:
    from helpers.model.loading import end_of_turn

    ends = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    with contextlib.suppress(TunebookError):  # a base model's template has none
        found.add(end_of_turn(tokenizer))
    return {i for i in found if i is not None}
