"""What a GPU can hold and do, measured where it was measured and from data sheets elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

from helpers import machine
from helpers.errors import TunebookError
from helpers.planner.cost_model import CONTEXT_GIB


@dataclass(frozen=True)
class Card:
    """A GPU, or the CPU in its place. total_gib: memory that a job can have. tflops: 16-bit matrix products on random
    data. gb_s: copy bandwidth, bytes read plus written. host_gb_s: to and from host memory. spread: half-width of a
    time estimate, as a share of it. host_gib: host memory for offloaded layer inputs; 0: not known, not limited.
    """

    name: str
    capability: tuple[int, int] | None
    total_gib: float
    tflops: float
    gb_s: float
    host_gb_s: float
    spread: float
    host_gib: float = 0.0


# H200 and H100: measured (790 TFLOP/s on an 8192³ bf16 product, 4.3 and 3.0 TB/s copied). Others: data sheet × what the
# H200 reaches of its own (0.80 of matrix rate, 0.90 of bandwidth), a third of the matrix rate again off T4 and L4,
# whose 70 W hold their clocks down. Host memory: of Colab's machines (12.7, 53 and 83.5 GB).
CARDS = {
    card.name: card
    for card in (
        Card("T4", (7, 5), 14.6, 28, 280, 10, 0.40, 11.8),
        Card("L4", (8, 9), 22.0, 60, 270, 20, 0.35, 49.4),
        Card("A100-40", (8, 0), 39.4, 250, 1400, 20, 0.25, 77.8),
        Card("A100-80", (8, 0), 79.2, 250, 1800, 20, 0.25, 77.8),
        Card("H100", (9, 0), 79.1, 790, 3000, 45, 0.15),
        Card("H200", (9, 0), 139.8, 790, 4300, 45, 0.15),
    )
}
CPU = Card("CPU", None, 0.0, 0.08, 20, 20, 0.50)


def named(name: str) -> Card:
    """The GPU of that name. Raises TunebookError with the known names."""
    for known, card in CARDS.items():
        if known.lower() == name.strip().lower():
            return card
    raise TunebookError(f"There are no figures for the GPU {name!r}; plan_for takes one of {', '.join(CARDS)}.")


def here() -> Card:
    """The first visible GPU, or the CPU, with the memory that this process can have now: without what other programs
    hold or a container does not allow."""
    import psutil

    host = machine.free_memory_gib() + psutil.Process().memory_info().rss / 2**30
    found, free = machine.gpu(), machine.free_gpu_gib()
    if found is None or free is None:
        return replace(CPU, total_gib=host)
    # Asking has made the CUDA context, which every estimate counts once more.
    total = min(found.total_gib * machine.gpu_share(), free + CONTEXT_GIB)
    words = found.name.replace("-", " ").split()
    for card in CARDS.values():
        if card.name.split("-")[0] in words and abs(card.total_gib - found.total_gib) < 0.2 * card.total_gib:
            return replace(card, name=found.name, total_gib=total, host_gib=host)
    # A GPU without figures: rated by its compute capability, with wide bars.
    like = CARDS["T4" if found.capability < (8, 0) else "A100-40" if found.capability < (9, 0) else "H100"]
    return replace(like, name=found.name, capability=found.capability, total_gib=total, spread=0.5, host_gib=host)
