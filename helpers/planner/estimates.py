"""A plan as a person reads it and a manifest keeps it; `helpers.planner.plan` makes them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from helpers.planner import gpus
from helpers.planner.cost_model import Setting, Shape

MEMORY_SPREAD = 0.07


@dataclass(frozen=True)
class Option:
    """One setting with what it would need and take."""

    setting: Setting
    accumulation: int
    peak_gib: float
    need_gib: float
    tokens_per_s: float
    fits: bool
    spread: float  # half-width of the time estimate, as a share of it
    offloaded_gib: float = 0.0  # main memory that layer inputs wait in

    @property
    def recompute_text(self) -> str:
        s = self.setting
        if not s.recompute:
            return "none"
        where = f", inputs in main memory ({self.offloaded_gib:.1f} GiB)" if s.offload else ""
        return f"{s.recompute} layers{where}" + (f", MLP by {s.tile_mlp}" if s.tile_mlp else "")


@dataclass(frozen=True, repr=False)
class Plan:
    """The chosen setting, its costs with error bars, the reasons, and what else was weighed."""

    card: gpus.Card
    shape: Shape
    option: Option
    batch_size: int
    world_size: int
    steps: int
    tokens: int
    attention: str
    packed: bool
    backend: str
    reasons: tuple[str, ...]
    alternatives: tuple[Option, ...]
    memory_scale: float = 1.0
    time_scale: float = 1.0
    measured: bool = False
    errors: dict = field(default_factory=dict)

    row_tokens = property(lambda self: self.option.setting.row_tokens)
    accumulation = property(lambda self: self.option.accumulation)
    recompute = property(lambda self: self.option.setting.recompute)
    offload = property(lambda self: self.option.setting.offload)
    tile_mlp = property(lambda self: self.option.setting.tile_mlp)
    quantize = property(lambda self: self.option.setting.quantize)
    capability = property(lambda self: self.card.capability)
    peak_gib = property(lambda self: self.option.peak_gib * self.memory_scale)
    tokens_per_s = property(lambda self: self.option.tokens_per_s / self.time_scale)
    reason = property(lambda self: " ".join(self.reasons))

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Training time: expected, shortest, longest."""
        middle = self.tokens / max(self.tokens_per_s, 1e-9)
        spread = 0.08 if self.measured else self.option.spread
        return middle, middle * (1 - spread), middle * (1 + spread)

    @property
    def peak_range_gib(self) -> tuple[float, float]:
        spread = 0.03 if self.measured else MEMORY_SPREAD
        return self.peak_gib * (1 - spread), self.peak_gib * (1 + spread)

    def correct(self, peak_gib: float | None = None, tokens_per_s: float | None = None) -> Plan:
        """The plan after a probing step that allocated `peak_gib` at most and ran at `tokens_per_s`.

        Keeps the relative errors of the estimate ((predicted − measured) / measured) in `.errors`.
        """
        errors, changes = dict(self.errors), {"measured": True}
        if peak_gib:
            errors["peak_gib"] = round(self.peak_gib / peak_gib - 1, 4)
            changes["memory_scale"] = self.memory_scale * peak_gib / self.peak_gib
        if tokens_per_s:
            errors["tokens_per_s"] = round(self.tokens_per_s / tokens_per_s - 1, 4)
            changes["time_scale"] = self.time_scale * self.tokens_per_s / tokens_per_s
        return replace(self, errors=errors, **changes)

    def shortened(self, steps: int) -> Plan:
        """The plan for fewer (or more) optimizer steps of the same kind."""
        return replace(self, steps=steps, tokens=round(self.tokens * steps / self.steps))

    def held_against(self, peak_gib: float | None = None, tokens_per_s: float | None = None) -> Plan:
        """The plan beside what the whole run came to: `.errors` then has those of the first estimate and, under `after_probe`,
        those that the probing step left."""
        first = replace(self, memory_scale=1.0, time_scale=1.0, errors={}).correct(peak_gib, tokens_per_s)
        after = replace(self, errors={}).correct(peak_gib, tokens_per_s).errors if self.measured else {}
        return replace(first, errors={**first.errors, **({"after_probe": after} if after else {})})

    def as_dict(self) -> dict:
        """Plain values for the manifest."""
        return {
            "card": self.card.name,
            "backend": self.backend,
            "attention": self.attention,
            "row_tokens": self.row_tokens,
            "accumulation": self.accumulation,
            "world_size": self.world_size,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "recompute": self.recompute,
            "offload": self.offload,
            "tile_mlp": self.tile_mlp,
            "quantize": self.quantize,
            "peak_gib": round(self.peak_gib, 3),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "seconds": [round(s, 1) for s in self.seconds],
            "probed": self.measured,
            "errors": self.errors,
            "reason": self.reason,
        }

    def rows(self) -> list[tuple]:
        """The table: the chosen setting first, then the alternatives."""
        out = []
        for option in (self.option, *(o for o in self.alternatives if o.setting != self.option.setting)):
            s = option.setting
            speed = option.tokens_per_s / self.time_scale
            verdict = "chosen" if option is self.option else "fits" if option.fits else "does not fit"
            out.append(
                (
                    verdict,
                    s.backend,
                    "4-bit" if s.quantize == "nf4" else "16-bit",
                    f"{s.row_tokens:,}",
                    f"{option.accumulation}",
                    option.recompute_text,
                    f"{option.peak_gib * self.memory_scale:.1f}",
                    f"{speed:,.0f}",
                    duration(self.tokens / speed),
                )
            )
        return out

    HEADER = ("", "backend", "base", "row tokens", "accumulation", "recomputed", "peak GiB", "tokens/s", "time")

    def headline(self) -> str:
        middle, low, high = self.seconds
        lowest, highest = self.peak_range_gib
        measured = "measured by a probing step" if self.measured else "predicted"
        return (
            f"{self.card.name}: {self.tokens:,} tokens in {self.steps:,} steps of {self.batch_size} rows, {duration(middle)} "
            f"({duration(low)} to {duration(high)}), {self.tokens_per_s:,.0f} tokens/s, peak {self.peak_gib:.1f} GiB "
            f"({lowest:.1f} to {highest:.1f}) of {self.card.total_gib:.1f}, {measured}."
        )

    def __str__(self) -> str:
        rows = [self.HEADER, *self.rows()]
        widths = [max(len(str(r[i])) for r in rows) for i in range(len(self.HEADER))]
        lines = ["  ".join(str(c).ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        return "\n".join([self.headline(), *self.reasons, "", *lines])

    __repr__ = __str__  # a notebook's plain text: the dataclass's own would print every layer

    def _repr_html_(self) -> str:
        from html import escape

        from helpers.display import table

        return f"<p><b>{escape(self.headline())}</b></p><p>{escape(self.reason)}</p>" + table(self.rows(), self.HEADER)


def duration(seconds: float) -> str:
    """Seconds for people: "42 s", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan_dict(plan: Plan) -> dict:
    """The plan and its alternatives as plain values."""
    return {
        **plan.as_dict(),
        "alternatives": [
            {
                **asdict(o.setting),
                "peak_gib": round(o.peak_gib, 2),
                "fits": o.fits,
                "tokens_per_s": round(o.tokens_per_s),
            }
            for o in plan.alternatives
        ],
    }
