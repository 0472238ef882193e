"""What a GPU can hold and do, measured where it was measured and from data sheets elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

from helpers import machine
from helpers.errors import TunebookError


@dataclass(frozen=True)
class Card:
    """total_gib: memory that PyTorch sees. tflops: 16-bit matrix products on random data. gb_s: copy bandwidth, bytes read
    plus written. host_gb_s: to and from main memory. spread: half-width of a time estimate, as a share of it.
    host_gib: main memory of its machine, where layer inputs can wait; 0: not known, not limited.
    """

    name: str
    capability: tuple[int, int] | None
    total_gib: float
    tflops: float
    gb_s: float
    host_gb_s: float
    spread: float
    host_gib: float = 0.0

    @property
    def dtype(self) -> str:
        """bf16 where the tensor cores have it."""
        return "bf16" if self.capability is None or self.capability >= (8, 0) else "fp16"


# H200 and H100: measured (790 TFLOP/s on an 8192³ bf16 product, 4.3 and 3.0 TB/s copied). Others: data sheet × the share
# that the H200 reaches of its own (0.80 of matrix rate, 0.90 of bandwidth), a third of the matrix rate again off T4 and L4,
# whose 70 W hold their clocks down. Main memory: of Colab's machines (12.7, 53 and 83.5 GB).
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
    """The card of that name. Raises TunebookError with the known names."""
    for known, card in CARDS.items():
        if known.lower() == name.strip().lower():
            return card
    raise TunebookError(f"There are no figures for the card {name!r}; plan_for takes one of {', '.join(CARDS)}.")


def here() -> Card:
    """The first visible GPU with its real memory (or the limit set on this process) and this machine's, or the CPU."""
    found = machine.gpu()
    if found is None:
        return replace(CPU, total_gib=machine.total_memory_gib())
    total = found.total_gib * memory_fraction()
    for label in ("T4", "L4", "A100-40", "A100-80", "H100", "H200"):
        card = CARDS[label]
        family = label.split("-")[0]
        if (
            f" {family}" in f" {found.name}".replace("-", " ")
            and abs(card.total_gib - found.total_gib) < 0.2 * card.total_gib
        ):
            return replace(card, name=found.name, total_gib=total, host_gib=machine.total_memory_gib())
    # An unknown card: rated by its compute capability, with wide bars.
    like = (
        CARDS["T4"] if found.capability < (8, 0) else CARDS["A100-40"] if found.capability < (9, 0) else CARDS["H100"]
    )
    return replace(
        like,
        name=found.name,
        capability=found.capability,
        total_gib=total,
        spread=0.5,
        host_gib=machine.total_memory_gib(),
    )


def memory_fraction() -> float:
    """Share of the card that this process may take (`torch.cuda.set_per_process_memory_fraction`)."""
    import torch

    ask = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return float(ask()) if ask is not None and torch.cuda.is_available() else 1.0
