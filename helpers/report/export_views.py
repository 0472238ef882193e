"""Size against what it costs: the table, the plot and the recommendation that close the export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from helpers.gguf.fidelity import BUDGETS, Result
from helpers.gguf.quantize import Quantised

CLOSE = 0.1  # mean KL, nats a token, up to which a file's answers are practically the merged model's
FEW = 0.02  # a task score this far below the best counts as good as the best, however many questions there were


def recommend(files: Sequence[Quantised], results: Sequence[Result]) -> dict[str, str]:
    """{"type", "why"}: the smallest file that passes its gates, diverges little and does the task as well as the best.

    "As well" allows for chance: with few questions two files differ by a standard error of their difference for no reason.
    """
    by_type = {r.type: r for r in results}
    sound = [(f, by_type[f.type]) for f in files if f.type in by_type and not by_type[f.type].failed]
    if not sound:
        return {"type": "", "why": "No file passes its gates."}
    near = [(f, r) for f, r in sound if r.mean_kl <= CLOSE] or sound
    scored = [r for _, r in near if r.task_score is not None]
    best = max((r.task_score for r in scored), default=0.0)
    kept = [(f, r) for f, r in near if r.task_score is None or r.task_score >= best - allowed_below(best, r.task_count)]
    file, result = min(kept, key=lambda pair: pair[0].bytes)
    why = f"the smallest file with a mean KL of at most {CLOSE} nats a token (or of all, where none has)"
    if best > 0:
        why += f" and a task score ({result.task_score:.0%} of {result.task_count} questions) that chance could bring down from the best ({best:.0%})"
    return {"type": file.type, "why": f"{why}; {file.bytes / 2**20:.0f} MiB, mean KL {result.mean_kl:.3g}"}


def allowed_below(best: float, questions: int) -> float:
    """How far below the best score a file may be: one standard error of the difference of two such shares, at least `FEW`."""
    return max(FEW, (2 * best * (1 - best) / questions) ** 0.5 if questions else 0.0)


def table(files: Sequence[Quantised], results: Sequence[Result], merge_check: dict[str, float] | None = None) -> Any:
    """What was measured, a row a file; under it what the merge itself cost, and the recommendation."""
    from helpers.display import Html
    from helpers.display import table as draw

    sizes = {f.type: f for f in files}
    head = (
        "file",
        "MiB",
        "bits/weight",
        "token ids",
        "prompts",
        "mean KL",
        "99 % KL",
        "of it weights",
        "same first choice",
        "perplexity",
        "answers equal",
        "stopped",
        "task score",
        "gates",
    )
    rows = []
    for r in results:
        file = sizes.get(r.type)
        rows.append(
            (
                r.type,
                f"{file.bytes / 2**20:.0f}" if file else "not kept",
                f"{file.bits_per_weight:.2f}" if file else "16",
                "differ" if "token ids" in r.failed else f"{r.token_texts} texts equal",
                "differ" if "prompt" in r.failed else f"{len(r.prompt_shapes)} equal",
                f"{r.mean_kl:.2g}",
                f"{r.p99_kl:.2g}",
                "" if r.weights_kl is None else f"{r.weights_kl:.2g}",
                f"{r.top1:.1%}",
                f"{r.perplexity:.2f} ({r.reference_perplexity:.2f})",
                f"{r.same_answers} of {r.answers}",
                f"{r.stopped} of {r.answers}",
                "" if r.task_score is None else f"{r.task_score:.0%}",
                "FAILED: " + ", ".join(r.failed) if r.failed else "passed",
            )
        )
    best = recommend(files, results)
    sentence = f"Recommended: {best['type']}, {best['why']}." if best["type"] else best["why"]
    if merge_check:
        sentence = (
            f"Adapter and base against the merged model: mean KL {merge_check['mean_kl']:.2g}, same first choice {merge_check['top1']:.1%} "
            f"over {merge_check['tokens']} tokens. {sentence}"
        )
    import html

    text = "\n".join(" | ".join(map(str, r)) for r in [head, *rows])
    return Html(draw(rows, head) + f"<p><b>{html.escape(sentence)}</b></p>", f"{text}\n{sentence}")


def figure(files: Sequence[Quantised], results: Sequence[Result]) -> Any:
    """Size against divergence (left) and, where it was measured, against the task score (right)."""
    from helpers import plots
    from helpers.evaluate.statistics import wilson

    by_type = {r.type: r for r in results}
    points = []
    for file in files:
        if (r := by_type.get(file.type)) is not None:
            score = None
            if r.task_score is not None:
                score = (
                    r.task_score,
                    *(wilson(r.task_score * r.task_count, r.task_count) if r.task_count else [r.task_score] * 2),
                )
            points.append(plots.FilePoint(file.type, file.bytes, r.mean_kl, r.weights_kl, BUDGETS[file.type][0], score))
    return plots.file_sizes(points, max((r.task_count for r in results), default=0))
