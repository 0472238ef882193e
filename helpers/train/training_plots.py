"""The pictures of a training run, drawn from its log.jsonl."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours: told apart by every kind of colour vision.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"


def smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start (as Adam's): the first point is the first value."""
    out, mean = [], 0.0
    for step, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**step))
    return out


def series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one logged number; lines without it, or where it is not a number, are skipped."""
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    return [s for s, _ in found], [v for _, v in found]


def _axes(count: int, title: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg") if not matplotlib.get_backend().lower().startswith("module://") else None
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(1, count, figsize=(4.2 * count, 3.2), layout="constrained")
    plt.close(figure)  # a notebook shows what a cell returns; pyplot would show it a second time
    figure.suptitle(title, fontsize=11)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def loss(lines: list[dict[str, Any]], title: str = "Training") -> Any:
    """Loss (raw, smoothed, held out), learning rate with gradient norm, and tokens/s: a matplotlib figure."""
    figure, (left, middle, right) = _axes(3, title)
    steps, values = series(lines, "loss")
    left.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1, label="each step")
    left.plot(steps, smoothed(values), color=BLUE, linewidth=2, label="smoothed")
    steps, values = series(lines, "eval_loss")
    left.plot(steps, values, "o-", color=ORANGE, markersize=4, label="held out")
    left.set_ylabel("loss (nats a token)")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    steps, values = series(lines, "grad_norm")
    middle.plot(steps, values, color=GREY, linewidth=1)
    middle.set_ylabel("gradient norm", color=GREY)
    rate = middle.twinx()
    rate.plot(*series(lines, "learning_rate"), color=GREEN, linewidth=2)
    rate.set_ylabel("learning rate", color=GREEN)
    rate.set_ylim(bottom=0)
    rate.spines["top"].set_visible(False)
    steps, values = series(lines, "tokens_per_s")
    right.plot(steps, values, color=BLUE, linewidth=1)
    right.set_ylabel("tokens a second")
    right.set_ylim(bottom=0)
    return figure


def margins(lines: list[dict[str, Any]], title: str = "Preferences") -> Any:
    """Log-odds, margin and accuracy, each step and on held-out pairs: a matplotlib figure."""
    figure, axes = _axes(3, title)
    panels = (
        ("log_odds_chosen", "log odds, chosen over rejected"),
        ("rewards/margins", "margin (beta x log-probability)"),
        ("rewards/accuracies", "share of pairs with chosen ahead"),
    )
    for ax, (name, label) in zip(axes, panels, strict=True):
        steps, values = series(lines, name)
        ax.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1, label="each step")
        ax.plot(steps, smoothed(values), color=BLUE, linewidth=2, label="smoothed")
        ax.plot(*series(lines, f"eval_{name}"), "o-", color=ORANGE, markersize=4, label="held out")
        ax.set_title(label, fontsize=9)
        if name == "rewards/accuracies":
            ax.set_ylim(0, 1.02)
        else:
            ax.axhline(0, color=GREY, linewidth=0.8)
    axes[0].legend(frameon=False)
    return figure
