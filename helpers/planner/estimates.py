"""A plan as a person reads it and a manifest keeps it; `helpers.planner.plan` makes them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from helpers import display
from helpers.planner.cost_model import Card, Setting, Shape

MEMORY_SPREAD = 0.07  # half-width of an estimate of the peak, as a share of it
PROBED_SPREAD = (0.03, 0.08)  # of memory and of time, once a probing step has measured them
HEADER = (
    *("", "backend", "base", "row tokens", "accumulation", "activation checkpointing", "peak GiB", "tokens/s", "time"),
)


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
    offloaded_gib: float = 0.0  # host memory that layer inputs take

    @property
    def recompute_text(self) -> str:
        s = self.setting
        if not s.recompute:
            return "none"
        where = f", inputs in host memory ({self.offloaded_gib:.1f} GiB)" if s.offload else ""
        return f"{s.recompute} layers{where}" + (f", MLP by {s.tile_mlp}" if s.tile_mlp else "")


@dataclass(frozen=True, repr=False)
class Plan:
    """The chosen setting, its costs with error bars, the reasons, and what else was weighed."""

    card: Card
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
    errors: dict[str, Any] = field(default_factory=dict)

    @property
    def setting(self) -> Setting:
        return self.option.setting

    @property
    def row_tokens(self) -> int:
        return self.option.setting.row_tokens

    @property
    def accumulation(self) -> int:
        return self.option.accumulation

    @property
    def recompute(self) -> int:
        return self.option.setting.recompute

    @property
    def reason(self) -> str:
        return " ".join(self.reasons)

    @property
    def peak_gib(self) -> float:
        return self.option.peak_gib * self.memory_scale

    @property
    def tokens_per_s(self) -> float:
        return self.option.tokens_per_s / self.time_scale

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Training time: expected, shortest, longest."""
        expected = self.tokens / max(self.tokens_per_s, 1e-9)
        spread = PROBED_SPREAD[1] if self.measured else self.option.spread
        return expected, expected * (1 - spread), expected * (1 + spread)

    def correct(self, peak_gib: float | None = None, tokens_per_s: float | None = None) -> Plan:
        """The plan after a probing step that allocated `peak_gib` at most and ran at `tokens_per_s`.

        Keeps the relative errors of the estimate ((predicted − measured) / measured) in `.errors`.
        """
        errors, memory_scale, time_scale = dict(self.errors), self.memory_scale, self.time_scale
        if peak_gib:
            errors["peak_gib"] = round(self.peak_gib / peak_gib - 1, 4)
            memory_scale *= peak_gib / self.peak_gib
        if tokens_per_s:
            errors["tokens_per_s"] = round(self.tokens_per_s / tokens_per_s - 1, 4)
            time_scale *= self.tokens_per_s / tokens_per_s
        return replace(self, errors=errors, memory_scale=memory_scale, time_scale=time_scale, measured=True)

    def shortened(self, steps: int) -> Plan:
        """The plan for fewer (or more) optimizer steps of the same kind."""
        return replace(self, steps=steps, tokens=round(self.tokens * steps / self.steps))

    def compared_with(self, peak_gib: float | None = None, tokens_per_s: float | None = None) -> Plan:
        """The plan compared with the whole run: `.errors` has those of the first estimate and, under `after_probe`,
        those that the probing step left."""
        first = replace(self, memory_scale=1.0, time_scale=1.0, errors={}).correct(peak_gib, tokens_per_s)
        if not self.measured:
            return first
        after = replace(self, errors={}).correct(peak_gib, tokens_per_s).errors
        return replace(first, errors={**first.errors, **({"after_probe": after} if after else {})})

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        of_plan = ("backend", "attention", "accumulation", "world_size", "batch_size", "steps", "errors", "reason")
        of_setting = ("row_tokens", "recompute", "offload", "tile_mlp", "quantize")
        return {
            "card": self.card.name,
            **{name: getattr(self, name) for name in of_plan},
            **{name: getattr(self.setting, name) for name in of_setting},
            "peak_gib": round(self.peak_gib, 3),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "seconds": [round(s, 1) for s in self.seconds],
            "probed": self.measured,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The table: the chosen setting first, then the alternatives."""
        return [
            self._row(o) for o in (self.option, *self.alternatives) if o is self.option or o.setting != self.setting
        ]

    def _row(self, option: Option) -> tuple[str, ...]:
        speed = option.tokens_per_s / self.time_scale
        return (
            "chosen" if option is self.option else "fits" if option.fits else "does not fit",
            option.setting.backend,
            "4-bit" if option.setting.quantize == "nf4" else "16-bit",
            f"{option.setting.row_tokens:,}",
            f"{option.accumulation}",
            option.recompute_text,
            f"{option.peak_gib * self.memory_scale:.1f}",
            f"{speed:,.0f}",
            display.duration(self.tokens / speed),
        )

    def headline(self) -> str:
        expected, shortest, longest = map(display.duration, self.seconds)
        spread = PROBED_SPREAD[0] if self.measured else MEMORY_SPREAD
        return (
            f"{self.card.name}: {self.tokens:,} tokens in {self.steps:,} steps of {self.batch_size} rows, {expected} "
            f"({shortest} to {longest}), {self.tokens_per_s:,.0f} tokens/s, peak {self.peak_gib:.1f} GiB "
            f"({self.peak_gib * (1 - spread):.1f} to {self.peak_gib * (1 + spread):.1f}) of {self.card.total_gib:.1f}, "
            f"{'measured by a probing step' if self.measured else 'predicted'}."
        )

    def __str__(self) -> str:
        return "\n".join([self.headline(), *self.reasons, "", display.text_table(self.rows(), HEADER)])

    __repr__ = __str__  # a notebook's plain text: the dataclass's own would print every layer

    def _repr_html_(self) -> str:
        about = f"<p><b>{display.escape(self.headline())}</b></p><p>{display.escape(self.reason)}</p>"
        return about + display.table(self.rows(), HEADER)
