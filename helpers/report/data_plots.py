"""The two pictures of the data stage, for the notebook and the report."""

from __future__ import annotations

from typing import Any


def lengths(encoded: dict[str, Any]) -> Any:
    """Histogram of row lengths in tokens (matplotlib figure), with max_length and the proposed one marked."""
    import matplotlib.pyplot as plt
    import numpy as np

    from helpers.data.lengths import expanded

    values, found = expanded(encoded["histogram"]), encoded["lengths"]
    figure, axes = plt.subplots(figsize=(7.5, 3.2))
    top = max(int(values.max()) if len(values) else 1, 1)
    axes.hist(values, bins=np.linspace(0, top, 61), color="#4c78a8")
    axes.axvline(
        encoded["max_length"],
        color="#d62728",
        label=f"max_length {encoded['max_length']:,}: {found['over']:,} rows over",
    )
    axes.axvline(
        found["proposed_max_length"],
        color="#2ca02c",
        linestyle="--",
        label=f"proposed {found['proposed_max_length']:,} (99 % of rows whole)",
    )
    axes.set_xlim(0, max(top, min(encoded["max_length"], 2 * top)) * 1.03)
    axes.set_xlabel("tokens in a row")
    axes.set_ylabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    plt.close(figure)
    return figure
