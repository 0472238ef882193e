"""Will this model survive the export? Asked before training: architecture, tokenizer, end of turn, disk, memory.

The tokenizer is converted for real, without weights, and read back by llama.cpp; the answer is cached by content, so
that only the first stage of a run pays for it (about 10 s).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import cache, display, machine, runs
from helpers import params as parameters
from helpers.data import vocabulary
from helpers.errors import TunebookError
from helpers.gguf import convert, libraries, probes
from helpers.gguf.runner import GgufModel
from helpers.model import loading, merging, weights
from helpers.model.stop_tokens import end_of_turn

GIB = 2**30
PROCESS_GIB = 0.7  # a Python with torch and transformers and nothing loaded
WINDOW = "sliding window"
Check = tuple[str, bool, str]


@dataclass
class Report:
    """checks: (what, whether it is well, what was found); needs: step -> (disk, memory) in GiB; free_gib: of both."""

    model: str
    checks: list[Check] = field(default_factory=list)
    needs: dict[str, tuple[float, float]] = field(default_factory=dict)
    free_gib: tuple[float, float] = (0.0, 0.0)

    @property
    def problems(self) -> list[str]:
        return [f"{what}: {found}" for what, good, found in self.checks if not good]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a GGUF file cannot keep of a model that exports well all the same."""
        return tuple(f"Warning: {what} of {found}." for what, _, found in self.checks if what == WINDOW)

    @property
    def disk_gib(self) -> float:
        """Disk that the whole export takes at its fullest."""
        return sum(disk for disk, _ in self.needs.values())

    def require(self) -> Report:
        """Raises TunebookError with every problem; returns itself when there is none."""
        if self.problems:
            raise TunebookError(
                f"{self.model} could be trained but not exported to GGUF. {' '.join(self.problems)} Choose another "
                "base or fewer quantisations, or skip this check with export_check=False and keep the adapter."
            )
        return self

    def shown(self) -> display.Html:
        """The checks, and below them what every step needs."""
        checks = [(what, "yes" if good else "NO", found) for what, good, found in self.checks]
        sizes = [(s, *map(display.number, need)) for s, need in [*self.needs.items(), ("free here", self.free_gib)]]
        below = display.shown(sizes, ("step", "disk, GiB", "memory, GiB"))
        return display.shown(checks, ("fit for export", "", "found")) + below


def check(
    source: Any,
    params: Any = None,
    adapter: Path | None = None,
    where: Path | None = None,
    tokenizer: Path | None = None,
) -> Report:
    """A `Report` on a model source (or folder). Nothing is raised for what is merely unfit: see `Report.require`.

    params: of the export when they are known, else its defaults count. adapter: its tokenizer counts when it brings
    one, then that of the folder `tokenizer`. where: folder to be written to, for the free disk.
    """
    base = Path(getattr(source, "path", source))
    report = Report(str(getattr(source, "name", base)))
    try:
        config = loading.load_config(base)
        counted = weights.count_weights(base)
    except TunebookError as error:
        report.checks.append(("weights", False, str(error)))
        return report
    own = adapter if adapter and (adapter / "tokenizer.json").is_file() else tokenizer or base
    report.checks += _tokenizer(base, own, config.get_text_config().vocab_size)
    _sizes(counted, config.get_text_config(), params or parameters.GgufParams(), where or runs.root(), report)
    return report


# ---------------------------------------------------------------- the tokenizer


def _tokenizer(base: Path, folder: Path, rows: int) -> list[Check]:
    """Convert the folder that a merge would write, its weights by name and shape, and compare what llama.cpp reads with
    what it should; cached by content. rows: of the base's embedding."""
    with tempfile.TemporaryDirectory() as temporary:
        joined = Path(temporary) / "model"
        joined.mkdir()
        try:
            tokenizer, llama_cpp = loading.load_tokenizer(folder), libraries.for_running()
            more = loading.grown(tokenizer, base)
            wanted = max(rows, len(tokenizer)) if more else rows
            merging.write_settings(base, joined, tokenizer, rows=wanted)
            held = weights.Weights(base)
            shapes = [(name, list(held.shape(name))) for name in sorted(held.entries)]
            runs_in = [Path(convert.__file__).with_name(n).read_text() for n in ("convert.py", "converter_process.py")]
            made_of = cache.content_hash(joined), llama_cpp.stat().st_mtime_ns, libraries.CONVERTER, probes.TEXTS
            key = cache.key(*made_of, shapes, runs_in)
            seen = cache.Answers("preflight", key)
            if kept := seen.get("checks"):
                return [(what, good, found) for what, good, found in kept]
            if lost := vocabulary.without_rows(loading.load_tokenizer(base, mended=False), rows):
                return [("tokenizer", False, lost)]
            for shard in [] if held.states else held.base.glob("*.safetensors*"):
                if wanted > rows and shard.suffix == ".safetensors":
                    weights.stand_in(shard, joined / shard.name, rows, wanted)
                else:
                    (joined / shard.name).symlink_to(shard.resolve())
            file = convert.convert(joined, joined.with_suffix(".gguf"), only_vocabulary=True)
            with closing(GgufModel(file, only_vocabulary=True)) as read_back:
                checks = [*_compared(read_back, tokenizer)]
            if window := convert.lost_window(joined, file):
                lost = (
                    f"{window:,} tokens, and llama.cpp runs this architecture without one: in a longer context its file"
                )
                set_it = f"set context_length to {window} in notebook 04"
                checks.append((WINDOW, True, f"{lost} is another model than was trained; {set_it}"))
        except TunebookError as error:
            return [("conversion", False, str(error).replace(str(joined), str(folder)))]
    if all(good for _, good, _ in checks):  # what is wrong may be mended, and is looked at again
        seen.put("checks", checks)
    return checks


def _compared(llama_cpp: GgufModel, tokenizer: Any) -> Iterator[Check]:
    """Token ids, added tokens, template and end of turn in llama.cpp against the trained tokenizer's."""

    def differing(texts: list[str]) -> list[tuple[str, list[int], list[int]]]:
        both = [(t, llama_cpp.tokenize(t), tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
        return [(text, mine, theirs) for text, mine, theirs in both if mine != theirs]

    found = f"{len(probes.TEXTS)} texts in many scripts give the same token ids in llama.cpp"
    wrong = differing(probes.TEXTS)
    for text, mine, theirs in wrong[:1]:
        found = (
            f"llama.cpp reads {text[:30]!r} as {mine[:8]}, training reads {theirs[:8]}. Merges or normalisation got "
            "lost: keep the base's own tokenizer files."
        )
    yield "tokenizer", not wrong, found
    added = [str(t) for t in tokenizer.added_tokens_decoder.values()]
    lost = differing(added)
    found = f"{len(lost)} of {len(added)} are not one token in llama.cpp, {lost[0][0]!r} first; " if lost else ""
    found += "add them with special=True and normalized=False." if lost else f"all {len(added)} are kept"
    yield "added tokens", not lost, found
    if not tokenizer.chat_template:
        yield "chat template", True, "none: the model completes plain text"
        ends = tokenizer.eos_token_id in (None, *llama_cpp.ends())
        said = f"{tokenizer.eos_token} ends a text" if tokenizer.eos_token else "the tokenizer has no end of sequence"
        yield "end of a text", ends, said + ", but llama.cpp would not stop there" * (not ends)
        return
    shapes = {shape: probes.render(tokenizer, *asked) for shape, asked in probes.conversations().items()}
    plain, why = shapes["one question"]
    try:
        if plain is None:
            raise TunebookError(
                f"it does not render a question ({why}); mend chat_template.jinja in the base's folder."
            )
        token = end_of_turn(tokenizer)
    except TunebookError as error:
        yield "chat template", False, str(error)
        return
    skipped = ", ".join(shape for shape, (text, _) in shapes.items() if text is None)
    yield "chat template", True, "renders in a sandbox" + (f"; it has no {skipped}" if skipped else "")
    ends = token in llama_cpp.ends()
    no = "ends a turn in the template, but llama.cpp would not stop there; make it the tokenizer's eos."
    said = "ends an answer in llama.cpp, too" if ends else no
    yield "end of turn", ends, f"{tokenizer.convert_ids_to_tokens(token)} {said}"


# ---------------------------------------------------------------- sizes


def _sizes(counted: tuple[int, int], text: Any, params: Any, where: Path, report: Report) -> None:
    """counted: weights of the model and of its largest tensor; text: the config of the language model."""
    weights, largest = counted
    n16, largest_gib = 2 * weights / GIB, largest / GIB
    folder = next(p for p in [where, *where.absolute().parents] if p.exists())
    disk, memory = report.free_gib = (shutil.disk_usage(folder).free / GIB, machine.free_memory_gib())
    small = [kind for kind in convert.parse_types(params.quantizations) if kind not in convert.TYPES_16]
    context = 2 * 2 * text.num_hidden_layers * text.hidden_size * 4096 / GIB
    model = (4 if 4.4 * weights / GIB < memory else 2) * weights / GIB
    kept = 4 * max(params.fidelity_tokens, 1) * text.vocab_size / GIB
    report.needs = {
        "merge into 16 bits": (n16, PROCESS_GIB + 10 * largest_gib),
        "16-bit GGUF": (n16, PROCESS_GIB + 6 * largest_gib),
        **{kind: (weights * convert.TYPES[kind].bits / 8 / GIB, 0.1 + 8 * largest_gib) for kind in small},
        "fidelity": (kept + n16 * bool(small), PROCESS_GIB + max(model, n16 + context)),
    }
    step, most = max(((s, m) for s, (_, m) in report.needs.items()), key=lambda entry: entry[1])
    found = f"{report.disk_gib:.2f} GiB of {disk:.1f} GiB free."
    advice = "" if report.disk_gib < disk else " Free some, or ask for fewer quantisations."
    report.checks.append(("disk", not advice, found + advice))
    found = f"{most:.2f} GiB at most ({step}) of {memory:.1f} GiB available."
    advice = "" if most < memory else " Close other programs or use a larger machine."
    report.checks.append(("memory", not advice, found + advice))
