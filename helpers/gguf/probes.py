"""Measure one GGUF file in the llama.cpp runtime against what the trained model said; the process behind `fidelity.measure`.

Kullback-Leibler divergence as llama.cpp's own perplexity tool defines it, with the trained model as the reference instead of
another GGUF: sum over the vocabulary of p (ln p - ln q), p the trained model's next-token distribution, in nats a token.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import TunebookError
from helpers.gguf.fidelity import Result
from helpers.gguf.llama_cpp import LlamaCpp

if TYPE_CHECKING:
    import numpy as np

# A first choice counts as changed only when the reference preferred it by more than this: a tie broken the other way is no error.
TIE_NATS = 1e-2


def measure(settings: dict[str, Any]) -> Result:
    reference = json.loads((Path(settings["reference"]) / "reference.json").read_text())
    reference["logprobs"] = _open(reference, Path(settings["reference"]))
    result = Result(
        settings["kind"],
        reference_perplexity=reference["perplexity"],
        reference_stopped=sum(s for _, s in reference["answers"]),
    )
    room = sum(len(p) + reference["max_tokens"] for p in reference["prompts"])
    context = -(-(max(room, *map(len, reference["rows"])) + 8) // 256) * 256
    with LlamaCpp(
        settings["path"], context=context, parallel=max(len(reference["prompts"]), 1), library=settings["library"]
    ) as runtime:
        _token_ids(runtime, reference, result)
        _prompts(runtime, reference, result)
        _logits(runtime, reference, result, settings["budget"])
        _answers(runtime, reference, result)
    return result


def _token_ids(runtime: LlamaCpp, reference: dict, result: Result) -> None:
    result.token_texts = len(reference["texts"])
    for entry in reference["texts"]:
        for special, theirs in ((False, entry["plain"]), (True, entry["special"])):
            mine = runtime.tokenize(entry["text"], add_special=special)
            if special and mine != theirs and theirs == entry["plain"]:
                continue  # the template writes the BOS itself; the prompt gate counts it
            if mine != theirs:
                at = next(
                    (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
                    min(len(mine), len(theirs)),
                )
                result.failed["token ids"] = (
                    f"{entry['text'][:40]!r} is read as {mine[max(0, at - 1) : at + 3]} from token {at} on where the trained "
                    f"model had {theirs[max(0, at - 1) : at + 3]}"
                )
                return


def _prompts(runtime: LlamaCpp, reference: dict, result: Result) -> None:
    """The same conversation through the trained tokenizer's template and through llama.cpp's server: one text, one list of ids."""
    bos, bos_text = reference["bos"], reference["bos_text"]
    for entry in reference["conversations"]:
        wanted, shape = entry["text"], entry["shape"]
        if wanted is None:
            result.skipped_shapes[shape] = entry["why"]
            continue
        try:
            got = runtime.apply_template(entry["messages"], tools=entry["tools"])
        except TunebookError as error:
            result.failed["prompt"] = f"for {shape} llama.cpp says: {str(error)[:160]}"
            return
        mine = runtime.tokenize(got, add_special=True)
        if mine[:1] == [bos] and entry["ids"][:1] != [bos]:
            mine = mine[1:]
        got, wanted = (
            t.removeprefix(bos_text) if bos_text else t for t in (got, wanted)
        )  # the runtime may write it as a token instead
        if mine != entry["ids"] or got != wanted:
            at = next(
                (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted))
            )
            near = slice(max(0, at - 12), at + 24)
            result.failed["prompt"] = f"for {shape} it reads {got[near]!r} where the training had {wanted[near]!r}"
            return
        result.prompt_shapes.append(shape)


def _logits(runtime: LlamaCpp, reference: dict, result: Result, budget: list[float]) -> None:
    import numpy as np

    kl, same, loss, at = [], [], 0.0, 0
    following = np.concatenate([np.asarray(r[1:], dtype=np.int64) for r in reference["rows"]])
    for row in reference["rows"]:
        for logits in runtime.iter_logits(row[:-1]):
            theirs = reference["logprobs"][at : at + len(logits)]
            width = min(theirs.shape[1], logits.shape[1])  # a padded vocabulary may differ in rows that no text reaches
            mine = _log_softmax(logits[:, :width])
            theirs = np.asarray(theirs[:, :width])
            kl.append(np.einsum("tv,tv->t", np.exp(theirs), theirs - mine))
            rows, chosen = np.arange(len(mine)), mine.argmax(1)
            same.append(theirs.max(1) - theirs[rows, chosen] < TIE_NATS)
            loss -= float(mine[rows, following[at : at + len(mine)]].sum())
            at += len(logits)
    divergence = np.concatenate(kl)
    result.tokens = len(divergence)
    result.mean_kl, result.p99_kl = float(max(divergence.mean(), 0.0)), float(np.quantile(divergence, 0.99))
    result.top1, result.perplexity = float(np.concatenate(same).mean()), math.exp(min(loss / len(divergence), 700.0))
    most, least = budget
    if not math.isfinite(result.mean_kl) or result.mean_kl > most or result.top1 < least:
        result.failed["logits"] = (
            f"mean KL {result.mean_kl:.3g} (at most {most:g}), top-1 agreement {result.top1:.1%} (at least {least:.1%}) "
            f"over {result.tokens} tokens"
        )


def _answers(runtime: LlamaCpp, reference: dict, result: Result) -> None:
    """Greedy answers, all at once as the trained model gave them."""
    limit = reference["max_tokens"]
    made = runtime.generate(reference["prompts"], max_tokens=limit)
    result.answers = len(made)
    result.same_answers = sum(m.token_ids == ids for m, (ids, _) in zip(made, reference["answers"], strict=True))
    result.stopped = sum(m.finish == "stop" for m in made)
    # A file that runs on where the trained model stops is the classic failure; one answer in four may differ by rounding alone.
    if result.reference_stopped - result.stopped > max(1, len(made) // 4):
        result.failed["stopping"] = (
            f"{result.stopped} of {len(made)} answers end by themselves within {limit} tokens, "
            f"{result.reference_stopped} do in the trained model"
        )


def _open(reference: dict, folder: Path) -> np.ndarray:
    import numpy as np

    count = sum(len(r) - 1 for r in reference["rows"])
    return np.memmap(folder / "logprobs.f32", np.float32, "r", shape=(count, reference["vocabulary"]))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """(rows, vocabulary) -> natural log-probabilities, float32."""
    import numpy as np

    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(measure(json.loads(sys.argv[1])))))
    except TunebookError as error:
        raise SystemExit(str(error)) from None
