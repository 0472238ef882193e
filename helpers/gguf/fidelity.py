"""Is the GGUF file the model that was trained? Measured in llama.cpp, against the merged model in high precision.

Four gates: token ids, rendered prompt, logits, stopping. The trained model's side is computed here, once. Each
quantised file's weights are also run unpacked, in 16 bits, so that what the smaller weights cost and what the runtime's
arithmetic with them costs are distinguished, and a tensor that rounding alone cannot explain is named. The divergence
is what llama.cpp's own perplexity tool computes, with the trained model as the reference instead of another GGUF: sum
over the vocabulary of p (ln p - ln q), p the trained model's next-token distribution, in nats a token.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from helpers import display, plots
from helpers.data.rendering import openai_form
from helpers.errors import TunebookError
from helpers.gguf import convert, header, probes
from helpers.gguf.convert import quantize
from helpers.gguf.runner import GgufModel
from helpers.gguf.trained import Merge, answers, logprobs, placement
from helpers.model.loading import load_model, load_tokenizer
from helpers.model.packed_attention import common_length
from helpers.tasks.questions import Decoding

CLOSE = 0.1  # mean KL, nats a token, up to which a file's answers are practically the merged model's
# What a file may differ by for the runtime's own rounding: 8-bit activations cost SmolLM2-135M 0.003 to 0.010 nats.
RUNTIME_KL = 0.015
# A top-1 token counts as changed when the reference preferred it by more than this; a tie may break the other way.
TIE_NATS = 1e-2
FEW = 0.02  # a task score this far below the best counts as good as the best, however many questions there were


@dataclass
class Result:
    """What was found about one file. bytes: None for one that is not kept. KL in nats a token; shares from 0 to 1;
    failed: gate -> what was found.

    weights_kl: of the same weights unpacked, in 16-bit arithmetic; runtime_kl: the rest.
    """

    type: str
    bytes: int | None = None
    bits_per_weight: float | None = None
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
        """For JSON: a figure that is NaN or infinite is null."""
        bad = {name for name, value in vars(self).items() if isinstance(value, float) and not display.finite(value)}
        return asdict(self) | dict.fromkeys(bad)


class Reference:
    """The merged model in float32 (bfloat16 where that does not fit): log-probabilities and answers on held-out text.

    rows: token ids of held-out conversations; prompts: token ids to answer; conversations: messages and tools of the
    job as its template takes them, for the prompt gate. Log-probabilities are kept in one file on disk, 4 bytes x
    tokens x vocabulary, until `close`.
    """

    def __init__(
        self,
        merged: Path,
        rows: Sequence[Sequence[int]],
        prompts: Sequence[Sequence[int]] = (),
        max_tokens: int = 64,
        work: Path | None = None,
        conversations: Sequence[tuple[list[dict], str | None]] = (),
    ):
        import numpy as np
        import torch

        self.tokenizer, self.max_tokens, self._turn = load_tokenizer(merged), max_tokens, threading.Lock()
        self.rows, self.prompts = [list(r) for r in rows if len(r) > 1], [list(p) for p in prompts]
        if not self.rows:
            raise TunebookError(
                "There is no text of two tokens or more to compare on; prepare the data with an evaluation part."
            )
        self.folder = tempfile.TemporaryDirectory(prefix="fidelity.", dir=work)
        size = sum(f.stat().st_size for f in merged.glob("*.safetensors")) / 2**30
        self.model: Any = load_model(merged, **placement(size)).eval()
        self.foreign: dict[Path, str] = {}
        following = torch.tensor([token for row in self.rows for token in row[1:]])
        shape = (len(following), self.model.get_input_embeddings().weight.shape[0])
        self.file = Path(self.folder.name) / "logprobs.npy"
        kept = np.lib.format.open_memmap(self.file, "w+", np.float32, shape)
        self.logprobs = torch.from_numpy(kept)
        for place, row in self._by_row():
            self.logprobs[place] = logprobs(self.model, row).cpu()
        kept.flush()
        loss = -float(self.logprobs[torch.arange(len(following)), following].double().mean())
        self.perplexity = math.exp(min(loss, 700.0))
        self.answers = answers(self.model, self.tokenizer, self.prompts, max_tokens)
        asked = ((messages, json.loads(tools) if tools else None) for messages, tools in conversations)
        held_out = {f"held-out {i + 1}": one for i, one in enumerate(asked)}
        every: dict[str, Any] = {**probes.conversations(), **held_out}
        self.conversations = every if self.tokenizer.chat_template else {}
        self.texts = [*probes.token_texts(self.tokenizer), *(self.tokenizer.decode(r) for r in self.rows[:8])]

    def weights_kl(self, file: Path, source: Path, threads: int = 0) -> float:
        """Mean KL, nats a token, of the weights of `file`, unpacked by llama.cpp's own code and run in 16 bits.

        source: the 16-bit GGUF that `file` was quantised from; a tensor that is not of it is kept in `foreign`.
        """
        import numpy as np

        unpacked = quantize(file, Path(self.folder.name) / f"{file.stem}.16.gguf", "f16", again=True).path
        self.foreign[file] = _foreign_tensor(file, unpacked, source)
        with closing(GgufModel(unpacked, threads=threads)) as model:
            kl = np.array(model.ask("compare", self.rows, str(self.file)))[:, 0]
        unpacked.unlink()
        return max(float(kl.mean()), 0.0)

    def close(self) -> None:
        self.folder.cleanup()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text as training reads it; special: with the model's own BOS."""
        with self._turn:  # a tokenizer that several threads ask raises "Already borrowed"
            return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def _by_row(self) -> Iterator[tuple[slice, list[int]]]:
        """(place of its log-probabilities, token ids) of each row."""
        at = 0
        for row in self.rows:
            yield slice(at, at + len(row) - 1), row
            at += len(row) - 1


def measure(
    reference: Reference, file: Path | GgufModel, kind: str, weights_kl: float | None = None, threads: int = 0
) -> Result:
    """Compare one GGUF file, or one that is loaded, with the reference. weights_kl: what `Reference.weights_kl` found
    for it."""
    if isinstance(file, Path):
        with closing(GgufModel(file, threads=threads)) as model:
            return measure(reference, model, kind, weights_kl)
    result = Result(kind, reference_perplexity=reference.perplexity, weights_kl=weights_kl)
    gates = {"token ids": _token_ids, "prompt": _prompts, "logits": _logits, "stopping": _stopping}
    result.failed = {name: why for name, gate in gates.items() if (why := gate(file, reference, result))}
    if why := reference.foreign.get(file.path, ""):
        result.failed["weights"] = why
    return result


def _foreign_tensor(file: Path, unpacked: Path, source: Path) -> str:
    """The tensor of a quantised file that is not the 16-bit file's: rounding costs it several times what it costs the
    others of its type (at most 2.5 times in blocks of 32, however its values are spread)."""
    import numpy as np

    ours, theirs = header.open_tensors(unpacked), header.open_tensors(source)
    errors: dict[str, dict[str, float]] = {}
    for name, kind in ((t.name, t.tensor_type.name) for t in header.check(file).tensors):
        now, was = (held[name].data.reshape(-1, held[name].data.shape[-1]) for held in (ours, theirs))
        step = max(1, len(was) // 4096)
        now, was = now[::step].astype(np.float32), was[::step].astype(np.float32)
        if kind not in ("F32", "F16", "BF16") and was.any():
            errors.setdefault(kind, {})[name] = float(np.linalg.norm(now - was) / np.linalg.norm(was))
    for kind, found in errors.items():
        usual, (name, worst) = float(np.median(list(found.values()))), max(found.items(), key=lambda one: one[1])
        if worst > 4 * usual:
            far, near = display.percent(worst), display.percent(usual)
            return f"{name} differs from the 16-bit file's by {far}, where {kind} costs others {near}"
    return ""


def _token_ids(model: GgufModel, reference: Reference, result: Result) -> str:
    result.token_texts = len(reference.texts)
    for text in reference.texts:
        plain, special = reference.encode(text), reference.encode(text, True)
        for add_special, theirs in ((False, plain), (True, special)):
            mine = model.tokenize(text, add_special)
            # where the template writes the BOS itself, the two differ by it; the prompt gate counts it
            if mine != theirs and not (add_special and special == plain):
                at = common_length([mine, theirs])
                near = slice(max(0, at - 1), at + 3)
                return f"{text[:40]!r} is read as {mine[near]} from token {at} on, the trained model had {theirs[near]}"
    return ""


def _prompts(model: GgufModel, reference: Reference, result: Result) -> str:
    """One conversation through the trained tokenizer's template and llama.cpp's server: one text, one list of ids."""
    bos, bos_text = reference.tokenizer.bos_token_id, reference.tokenizer.bos_token or ""
    for shape, (messages, tools) in reference.conversations.items():
        text, why = probes.render(reference.tokenizer, messages, tools)
        if text is None:
            result.skipped_shapes[shape] = why
            continue
        try:
            got = model.ask("apply_template", openai_form(messages), tools)
        except TunebookError as error:
            return f"for {shape} llama.cpp says: {str(error)[:160]}"
        mine, ids = model.tokenize(got, add_special=True), reference.encode(text)
        if mine[:1] == [bos] and ids[:1] != [bos]:
            mine = mine[1:]
        got, text = got.removeprefix(bos_text), text.removeprefix(bos_text)  # the runtime may write it as a token
        if mine != ids or got != text:
            at = common_length([got, text])
            near = slice(max(0, at - 12), at + 24)
            return f"for {shape} it reads {got[near]!r} where the training had {text[near]!r}"
        result.prompt_shapes.append(shape)
    return ""


def _logits(model: GgufModel, reference: Reference, result: Result) -> str:
    import numpy as np

    kl, lost, nats = np.array(model.ask("compare", reference.rows, str(reference.file))).T
    result.tokens, result.mean_kl, result.p99_kl = len(kl), max(float(kl.mean()), 0.0), float(np.quantile(kl, 0.99))
    result.top1, result.perplexity = float((lost < TIE_NATS).mean()), math.exp(min(-float(nats.mean()), 700.0))
    if result.weights_kl is not None:
        result.runtime_kl = max(result.mean_kl - result.weights_kl, 0.0)
    most, least = budget(result)
    if math.isfinite(result.mean_kl) and result.mean_kl <= most and result.top1 >= least:
        return ""
    costs = "" if result.weights_kl is None else f", where its weights alone cost {result.weights_kl:.2g}"
    agreement = f"top-1 agreement {display.percent(result.top1)} (at least {display.percent(least)})"
    return f"mean KL {result.mean_kl:.3g} (at most {most:.3g}{costs}), {agreement} over {result.tokens} tokens"


def budget(result: Result) -> tuple[float, float]:
    """(mean KL at most, top-1 agreement at least) of a file: what its type may cost a model of 135M, or less where this
    model's own unpacked weights cost less. Tokens that change go with the root of the KL."""
    allowed = convert.TYPES[result.type]
    if result.weights_kl is None:
        return allowed.kl, allowed.top1
    most = min(allowed.kl, 2 * result.weights_kl + RUNTIME_KL)
    return most, max(allowed.top1, 1 - (1 - allowed.top1) * math.sqrt(most / allowed.kl))


def _stopping(model: GgufModel, reference: Reference, result: Result) -> str:
    """Greedy answers, all at once as the trained model gave them."""
    made, theirs = model.generate(reference.prompts, Decoding(reference.max_tokens)), reference.answers
    result.answers, result.stopped = len(made), sum(m.stopped for m in made)
    result.same_answers = sum(m.text == text for m, (text, _) in zip(made, theirs, strict=True))
    result.reference_stopped = sum(stopped for _, stopped in theirs)
    # The classic failure is a file that runs on where the trained model stops; one answer in four may differ.
    if result.reference_stopped - result.stopped <= max(1, len(made) // 4):
        return ""
    return (
        f"{result.stopped} of {len(made)} answers end by themselves within {reference.max_tokens} tokens, "
        f"{result.reference_stopped} do in the trained model"
    )


def require(results: Sequence[Result], merges: Sequence[Merge] = ()) -> None:
    """Raises TunebookError that names every file and gate that failed, and the merge where it did."""
    broken = [f"{m.name}: {m.failed}" for m in merges if m.chosen and m.failed]
    broken += [f"{r.type}: {gate} ({why})" for r in results for gate, why in r.failed.items()]
    if broken:
        raise TunebookError(
            f"The exported files are not the model that was trained. {'; '.join(broken)}. The files stay for "
            "inspection and nothing reads them; export again, or read fidelity.json and set fidelity_gates=False."
        )


# ---------------------------------------------------------------- size against what it costs


def recommend(results: Sequence[Result]) -> dict[str, str]:
    """{"type", "why"}: the smallest file that passes its gates, diverges little and does the task as the best does.

    "As well" allows for chance: with few questions two files differ by a standard error of their difference for no
    reason.
    """
    sound = [r for r in results if r.bytes and not r.failed]
    if not sound:
        return {"type": "", "why": "No file passes its gates."}
    near = [r for r in sound if r.mean_kl <= CLOSE] or sound
    best = max((r.task_score for r in near if r.task_score is not None), default=0.0)

    def as_good(result: Result) -> bool:
        chance = (2 * best * (1 - best) / result.task_count) ** 0.5 if result.task_count else 0.0
        return result.task_score is None or result.task_score >= best - max(FEW, chance)

    found = min(filter(as_good, near), key=lambda r: r.bytes or 0)
    why = f"the smallest file with a mean KL of at most {CLOSE} nats a token (or of all, where none has)"
    if best > 0:
        score = f"{display.percent(found.task_score, 0)} of {found.task_count} questions"
        why += f" and a task score ({score}) that chance could bring down from the best ({display.percent(best, 0)})"
    return {"type": found.type, "why": f"{why}; {display.size(found.bytes)}, mean KL {found.mean_kl:.3g}"}


def table(results: Sequence[Result], merges: Sequence[Merge], text: str) -> display.Html:
    """What was measured: the trained model and its merges, then a row a file; under it the recommendation."""
    measured = [
        {
            "file": m.name,
            "mean KL": "" if m.onto == "trained" else f"{m.mean_kl:.2g}",
            "same top-1": "" if m.onto == "trained" else display.percent(m.top1),
            "task score": "" if m.task_score is None else display.percent(m.task_score, 0),
            "gates": "" if m.onto == "trained" else ("FAILED" if m.chosen else "too far") if m.failed else "passed",
        }
        for m in merges
    ]
    rows = [
        {
            "file": r.type,
            "size": display.size(r.bytes) if r.bytes else "not kept",
            "bits/weight": f"{r.bits_per_weight:.2f}" if r.bytes else "16",
            "token ids": "differ" if "token ids" in r.failed else f"{r.token_texts} texts equal",
            "prompts": "differ" if "prompt" in r.failed else f"{len(r.prompt_shapes)} equal",
            "mean KL": f"{r.mean_kl:.2g}",
            "99 % KL": f"{r.p99_kl:.2g}",
            "of it weights": "" if r.weights_kl is None else f"{r.weights_kl:.2g}",
            "same top-1": display.percent(r.top1),
            "perplexity": f"{r.perplexity:.2f} ({r.reference_perplexity:.2f})",
            "answers equal": f"{r.same_answers} of {r.answers}",
            "stopped": f"{r.stopped} of {r.answers}",
            "task score": "" if r.task_score is None else display.percent(r.task_score, 0),
            "gates": "FAILED: " + ", ".join(r.failed) if r.failed else "passed",
        }
        for r in results
    ]
    best, head = recommend(results), list(rows[0])
    last = f"Recommended: {best['type']}, {best['why']}." if best["type"] else best["why"]
    shown = display.shown([[row.get(name, "") for name in head] for row in measured + rows], head)
    against = "Merges are compared with the trained model, files with the merge that is kept."
    return shown + display.said(f"Compared on {text}.", against * bool(merges), last)


def figure(results: Sequence[Result]) -> Any:
    """Size against divergence; the table has the task scores."""
    kept = [r for r in results if r.bytes]
    points = [plots.FilePoint(r.type, r.bytes or 0, r.mean_kl, r.weights_kl, budget(r)[0]) for r in kept]
    return plots.file_sizes(points)
