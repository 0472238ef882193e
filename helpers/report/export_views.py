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
    import matplotlib.pyplot as plt

    by_type = {r.type: r for r in results}
    shown = [(f, by_type[f.type]) for f in sorted(files, key=lambda f: f.bytes) if f.type in by_type]
    scored = [(f, r) for f, r in shown if r.task_score is not None]
    picture, axes = plt.subplots(
        1, 2 if scored else 1, figsize=(10 if scored else 5.5, 3.8), squeeze=False, layout="constrained"
    )
    left, size = axes[0][0], lambda f: f.bytes / 2**20
    left.plot(
        [size(f) for f, _ in shown],
        [max(r.mean_kl, 1e-7) for _, r in shown],
        color="#2a6f97",
        marker="o",
        label="file in llama.cpp",
    )
    weights = [(size(f), max(r.weights_kl, 1e-7)) for f, r in shown if r.weights_kl is not None]
    if weights:
        left.plot(*zip(*weights, strict=True), color="#e07a1f", marker="x", linestyle="", label="its weights alone")
    allowed = [BUDGETS[f.type][0] for f, _ in shown]
    left.plot(
        [size(f) for f, _ in shown], allowed, color="#999999", marker="_", markersize=14, linestyle="", label="allowed"
    )
    for f, r in shown:
        left.annotate(f.type, (size(f), max(r.mean_kl, 1e-7)), textcoords="offset points", xytext=(6, 6), fontsize=9)
    left.set(
        yscale="log",
        xlabel="size, MiB",
        ylabel="mean KL divergence, nats a token",
        title="What the smaller file changes",
    )
    left.legend(fontsize=8, frameon=False)
    if scored:
        from helpers.evaluate.statistics import wilson

        right = axes[0][1]
        for f, r in scored:
            low, high = (
                wilson(r.task_score * r.task_count, r.task_count) if r.task_count else (r.task_score, r.task_score)
            )
            right.plot([size(f)] * 2, [100 * low, 100 * high], color="#2a6f97", linewidth=1.5)
            right.plot(size(f), 100 * r.task_score, color="#2a6f97", marker="o")
            right.annotate(f.type, (size(f), 100 * r.task_score), textcoords="offset points", xytext=(6, 6), fontsize=9)
        right.set(
            xlabel="size, MiB",
            ylabel=f"right, % of {max(r.task_count for _, r in scored)} questions (95 % interval)",
            title="What it still can do",
            ylim=(0, 105),
        )
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.margins(x=0.15)
    plt.close(picture)
    return picture
