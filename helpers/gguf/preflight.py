"""Will this model survive the export? Asked before training: architecture, tokenizer, added tokens, end of turn, disk, memory.

The tokenizer is converted for real, without weights, and read back by llama.cpp; that is remembered by its hash, so that only
the first stage of a run pays for it (about 10 s).
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import runs
from helpers.errors import TunebookError
from helpers.gguf import convert, fidelity, libraries, quantize, shapes

GIB = 2**30
PROCESS_GIB = 0.7  # a Python with torch and transformers and nothing loaded


@dataclass
class Report:
    """checks: (what, whether it is well, what was found); needs: step -> (disk, memory) in GiB; free_gib: of (disk, memory)."""

    model: str
    checks: list[tuple[str, bool, str]] = field(default_factory=list)
    needs: dict[str, tuple[float, float]] = field(default_factory=dict)
    free_gib: tuple[float, float] = (0.0, 0.0)

    @property
    def problems(self) -> list[str]:
        return [f"{what}: {found}" for what, good, found in self.checks if not good]

    @property
    def disk_gib(self) -> float:
        """Disk that the whole export takes at its fullest."""
        return sum(disk for disk, _ in self.needs.values())

    def require(self) -> Report:
        """Raises TunebookError with every problem; returns itself when there is none."""
        if self.problems:
            raise TunebookError(
                f"{self.model} could be trained but not exported to GGUF. "
                + " ".join(self.problems)
                + " Choose another base or fewer quantisations, or skip this check with export_check=False and keep the adapter."
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        return {
            "checks": [list(c) for c in self.checks],
            "needs_gib": {k: list(v) for k, v in self.needs.items()},
            "free_gib": list(self.free_gib),
        }

    def _repr_html_(self) -> str:
        from helpers.display import table

        checks = table(
            [(what, "yes" if good else "NO", found) for what, good, found in self.checks],
            ("fit for export", "", "found"),
        )
        sizes = table(
            [(step, f"{disk:.2f}", f"{memory:.2f}") for step, (disk, memory) in self.needs.items()]
            + [("free on this machine", f"{self.free_gib[0]:.1f}", f"{self.free_gib[1]:.1f}")],
            ("step", "disk, GiB", "memory, GiB"),
        )
        return checks + sizes

    def __repr__(self) -> str:
        return "\n".join(
            [f"{'ok ' if good else 'NO '} {what}: {found}" for what, good, found in self.checks]
            + [
                f"    {step}: {disk:.2f} GiB of disk, {memory:.2f} GiB of memory"
                for step, (disk, memory) in self.needs.items()
            ]
        )


def check(source: Any, params: Any = None, adapter: Path | None = None, where: Path | None = None) -> Report:
    """A `Report` on a model source (or folder). Nothing is raised for what is merely unfit: see `Report.require`.

    params: any stage's; `quantizations`, `fidelity_tokens` are taken from it when it has them, else the export's defaults. adapter: its
    tokenizer counts when it brings one. where: folder to be written to, for the free disk.
    """
    base = Path(getattr(source, "path", source))
    report = Report(str(getattr(source, "name", base)))
    config = _architecture(base, report)
    if config is None:
        return report
    tokenizer = adapter if adapter and (adapter / "tokenizer.json").is_file() else base
    _tokenizer(base, tokenizer, report)
    from helpers import params as parameters

    own = getattr(params, "stage", "") == "gguf"
    settings = params if own else parameters.resolve("gguf", {})
    _sizes(
        base,
        config,
        quantize.parse_types(settings.quantizations),
        settings.fidelity_tokens,
        where or runs.root(),
        report,
    )
    return report


# ---------------------------------------------------------------- the checks


def _architecture(base: Path, report: Report) -> Any:
    from helpers.model import merging

    try:
        config = merging.read_config(base)
        merging.shards(base)
    except TunebookError as error:
        report.checks.append(("weights", False, str(error)))
        return None
    name = (getattr(config.get_text_config(), "architectures", None) or config.architectures or ["unknown"])[0]
    known = name in convert.architectures()
    report.checks.append(
        (
            "architecture",
            known,
            f"{name} is known to the converter" if known else f"{name} is not known to llama.cpp's converter.",
        )
    )
    return config


def _tokenizer(base: Path, folder: Path, report: Report) -> None:
    """Convert the tokenizer alone and compare what llama.cpp reads with what it should; remembered by content."""
    from helpers.model import loading

    try:
        tokenizer = loading.load_tokenizer(folder)
    except TunebookError as error:
        report.checks.append(("tokenizer", False, str(error)))
        return
    model_file = base / "tokenizer.model"
    key = runs.hash_json(
        [
            loading.tokenizer_hash(tokenizer),
            loading.template_hash(tokenizer),
            runs.sha256_file(base / "config.json"),
            runs.sha256_file(model_file) if model_file.is_file() else "",
            libraries.CONVERTER,
            libraries.packaged().stat().st_size,
            shapes.TEXTS,
        ]
    )
    remembered = libraries.cache_folder() / "preflight" / f"{key}.json"
    try:
        found = json.loads(remembered.read_text())
    except (OSError, ValueError):
        found = _examine(base, folder, tokenizer, remembered.parent)
        if all(good for _, good, _ in found):  # what is wrong may be mended, and is looked at again
            runs.write_json(remembered, found)
    report.checks += [tuple(c) for c in found]


def _examine(base: Path, folder: Path, tokenizer: Any, work: Path) -> list[tuple[str, bool, str]]:
    import tempfile

    from helpers.gguf.llama_cpp import Vocabulary
    from helpers.model.loading import end_of_turn

    with tempfile.TemporaryDirectory(prefix=".vocabulary.", dir=_made(work)) as temporary:
        joined = Path(temporary) / "model"
        joined.mkdir()
        config = json.loads((base / "config.json").read_text())
        (config.get("text_config") or config)["vocab_size"] = max(
            (config.get("text_config") or config)["vocab_size"], len(tokenizer)
        )
        (joined / "config.json").write_text(json.dumps(config))
        tokenizer.save_pretrained(joined)
        if (base / "tokenizer.model").is_file():
            shutil.copyfile(base / "tokenizer.model", joined / "tokenizer.model")
        try:
            file = convert.convert_vocabulary(joined, Path(temporary) / "vocabulary.gguf")
            vocabulary = Vocabulary(file)
        except TunebookError as error:
            return [("tokenizer", False, str(error).replace(str(joined), str(folder)))]
        with vocabulary:
            template = _template(tokenizer)
            stops = (
                [_stops(vocabulary, tokenizer, end_of_turn)] if template[1] else []
            )  # without a template there are no turns
            return [_same_ids(vocabulary, tokenizer), _added(vocabulary, tokenizer), template, *stops]


def _same_ids(vocabulary: Any, tokenizer: Any) -> tuple[str, bool, str]:
    for text in shapes.TEXTS:
        mine, theirs = vocabulary.tokenize(text), tokenizer(text, add_special_tokens=False)["input_ids"]
        if mine != theirs:
            return (
                "tokenizer",
                False,
                f"llama.cpp reads {text[:30]!r} as {mine[:8]}, training reads {theirs[:8]}; the GGUF would see other tokens. "
                "Merges or normalisation got lost: keep the base's own tokenizer files.",
            )
    return (
        "tokenizer",
        True,
        f"converted for real; {len(shapes.TEXTS)} texts in many scripts give the same token ids in llama.cpp",
    )


def _added(vocabulary: Any, tokenizer: Any) -> tuple[str, bool, str]:
    tokens = tokenizer.added_tokens_decoder
    lost = [
        str(t)
        for i, t in tokens.items()
        if vocabulary.tokenize(str(t)) != tokenizer(str(t), add_special_tokens=False)["input_ids"]
    ]
    if lost:
        return (
            "added tokens",
            False,
            f"{len(lost)} of {len(tokens)} added tokens are not one token in llama.cpp, {lost[0]!r} first; add them with "
            "special=True and normalized=False.",
        )
    return ("added tokens", True, f"all {len(tokens)} are kept")


def _stops(vocabulary: Any, tokenizer: Any, end_of_turn: Any) -> tuple[str, bool, str]:
    try:
        token = end_of_turn(tokenizer)
    except TunebookError as error:
        return ("end of turn", False, str(error))
    text = tokenizer.convert_ids_to_tokens(token)
    good = vocabulary.is_end(token)
    return (
        "end of turn",
        good,
        f"{text} ends an answer in llama.cpp, too"
        if good
        else f"{text} ends a turn in the template, but llama.cpp would not stop there and answers would never end; make it the tokenizer's eos.",
    )


def _template(tokenizer: Any) -> tuple[str, bool, str]:
    if not tokenizer.chat_template:
        return (
            "chat template",
            False,
            "the tokenizer has none, so no runtime could know how to prompt the model; use an instruct model.",
        )
    text, why = shapes.render(tokenizer, shapes.QUESTION, None)
    if text is None:
        return (
            "chat template",
            False,
            f"it does not render a plain question ({why}); mend chat_template.jinja in the base's folder.",
        )
    skipped = [s for s, (m, t) in shapes.conversations().items() if shapes.render(tokenizer, m, t)[0] is None]
    return ("chat template", True, "renders in a sandbox" + (f"; it has no {', '.join(skipped)}" if skipped else ""))


# ---------------------------------------------------------------- sizes


def _sizes(base: Path, config: Any, kinds: list[str], tokens: int, where: Path, report: Report) -> None:
    from helpers.model import merging

    weights, largest = merging.count_weights(base)
    text = config.get_text_config()
    n16 = 2 * weights / GIB
    vocabulary_gib = 4 * max(tokens, 1) * text.vocab_size / GIB
    report.needs["merge into 16 bits"] = (n16, PROCESS_GIB + 10 * largest / GIB)
    report.needs["16-bit GGUF"] = (n16, PROCESS_GIB + 6 * largest / GIB)
    for kind in kinds:
        if kind not in convert.TYPES_16:
            report.needs[kind] = (weights * quantize.NOMINAL_BITS[kind] / 8 / GIB, 0.1 + 8 * largest / GIB)
    context = 2 * 2 * text.num_hidden_layers * getattr(text, "hidden_size", 0) * 4096 / GIB
    precision = 4 if 4.4 * weights / GIB < fidelity.available_gib() else 2
    report.needs["fidelity"] = (vocabulary_gib, PROCESS_GIB + max(precision * weights / GIB, n16 + context))
    report.free_gib = (shutil.disk_usage(_existing(where)).free / GIB, fidelity.available_gib())
    enough = report.disk_gib < report.free_gib[0]
    report.checks.append(
        (
            "disk",
            enough,
            f"{report.disk_gib:.2f} GiB of {report.free_gib[0]:.1f} GiB free"
            if enough
            else f"the export takes {report.disk_gib:.1f} GiB and {report.free_gib[0]:.1f} GiB are free; free some, or ask for fewer "
            "quantisations.",
        )
    )
    step, most = max(((s, m) for s, (_, m) in report.needs.items()), key=lambda entry: entry[1])
    fits = most < report.free_gib[1] or math.isinf(report.free_gib[1])
    report.checks.append(
        (
            "memory",
            fits,
            f"{most:.2f} GiB at most ({step}) of {report.free_gib[1]:.1f} GiB available"
            if fits
            else f"{step} takes {most:.1f} GiB and {report.free_gib[1]:.1f} GiB are available; close other programs or use a larger "
            "machine.",
        )
    )


def _existing(folder: Path) -> Path:
    return next(p for p in [folder, *folder.absolute().parents] if p.exists())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
