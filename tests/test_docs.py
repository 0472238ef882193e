"""The commands that README and docs/ show: each one's program, options, files, recipes and parameters are real."""

import argparse
import contextlib
import importlib
import io
import re
import shlex

import pytest
import short_run

from ci import pipeline
from helpers import __main__ as tunebook
from helpers import parameter, params, runs
from helpers.errors import TunebookError
from tests.conftest import PROJECT

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")), PROJECT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
# Programs that are not ours: which of their words are files of this project is checked all the same.
OTHERS = {"git", "ollama", "vllm", "open-webui"}
MADE = re.compile(
    r"^(?:runs/|out\.ipynb|/|merged$|Modelfile$|llama3_lora_sft\.yaml|their\.yaml)"
)  # by a run, or one's own


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(page):
    """Every command of a page's bash blocks as words, without its comment, redirections and environment."""
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s&&\s|\s\|\s", line):
                words = shlex.split(part, comments=True)
                while words and re.match(r"^[A-Z_]+=|^export$|^time$", words[0]):
                    words = words[1:]
                if words:
                    yield words


EVERY = [pytest.param(words, id=f"{page.stem}: {' '.join(words)[:70]}") for page in PAGES for words in commands(page)]


class Parsed(Exception):
    """A command line was understood."""


def understood(program, words):
    """What a command's own parser made of the words; the command ends there."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, arguments=None, namespace=None):
        raise Parsed(parse(self, arguments, namespace))

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        try:
            program(words)
        except Parsed as found:
            return found.args[0]
        except SystemExit:
            raise ValueError(said.getvalue()) from None
    raise AssertionError(f"{program} parsed nothing")


def check_run(words):
    """ci/pipeline.py's options, and every parameter with its value."""
    options = pipeline.arguments(words)
    folder = parameter.recipe_folder(options.recipe or "cpu")
    pipeline.resolve(folder, options.single, options.run or "default")
    for number in filter(None, (options.first, options.last)):
        pipeline._stage(number)


@pytest.mark.parametrize("words", EVERY)
def test_a_command_that_is_shown_is_one_that_runs(words):
    program, *rest = words
    for word in words:
        path = word.split("::")[0]
        named = "/" in path and "://" not in path and not path.startswith((".venv/", "user/", "your-name/", "-"))
        if named and not MADE.search(path) and path.count("/") and re.search(r"\.\w+$|^tests/", path):
            assert (PROJECT / path).exists(), f"{path} is not in the project"
    if program == "bash":
        assert (PROJECT / rest[0]).is_file()
        if rest[0] == "ci/run.sh":
            check_run(rest[1:])
    elif program == ".venv/bin/tunebook" and rest[0] == "run":
        check_run(rest[1:])
    elif program == ".venv/bin/tunebook":
        assert rest[0] in tunebook.COMMANDS
        module = importlib.import_module(tunebook.MODULES.get(rest[0], f"helpers.{rest[0]}"))
        given = understood(module.main, rest[1:])
        if rest[0] == "check":
            parameter.recipe_folder(rest[1])
        assert given is not None
    elif program == ".venv/bin/papermill":
        notebook = PROJECT / rest[0]
        stage = next(s for s in params.STAGES if notebook.stem.endswith(pipeline.runs.FOLDERS[s]))
        files = [rest[i + 1] for i, word in enumerate(rest) if word == "-f"]
        given = {rest[i + 1]: rest[i + 2] for i, word in enumerate(rest) if word == "-p"}
        for file in files:
            params.resolve(stage, parameter.read_file(PROJECT / file))
        params.resolve(stage, given)
    elif program == ".venv/bin/torchrun":
        at = rest.index("-m")
        assert importlib.util.find_spec(rest[at + 1]), rest[at + 1]
        understood(importlib.import_module("helpers.train.__main__").main, rest[at + 2 :])
    else:
        assert program in OTHERS or program.startswith(".venv/bin/"), f"{program}: is it ours? Then check it here"


@pytest.mark.parametrize(
    "words",
    [
        ["bash", "ci/run.sh", "--recpie", "cpu"],
        ["bash", "ci/run.sh", "--recipe", "cpuu"],
        ["bash", "ci/run.sh", "-p", "sft.rnk", "3"],
        ["bash", "ci/run.sh", "-p", "sft.rank", "none"],
        ["bash", "ci/run.sh", "-p", "data.dataset", "docs/no-such.csv"],
        ["bash", "ci/run.sh", "--from", "06"],
        [".venv/bin/tunebook", "sevre", "first"],
        [".venv/bin/tunebook", "serve", "first", "--prot", "8080"],
        [".venv/bin/papermill", "notebooks/02_qlora_sft.ipynb", "out.ipynb", "-p", "rnk", "3"],
    ],
)
def test_a_command_with_a_misspelt_word_is_found(words, capsys):
    with pytest.raises((TunebookError, SystemExit, ValueError, AssertionError)):
        test_a_command_that_is_shown_is_one_that_runs(words)


def test_the_readmes_own_data_becomes_rows_to_train_and_to_ask(tmp_path, monkeypatch):
    """The command itself, as far as notebook 01."""
    (words,) = (words for words in commands(PROJECT / "README.md") if "docs/tickets.csv" in words)
    done = short_run.pipeline(tmp_path, *words[2:], "--to", "01")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    monkeypatch.setenv("TUNEBOOK_RUNS", str(tmp_path))
    written = runs.load("tickets", "data").metrics["written"]
    assert written["train"] > 200 and written["test"] > 20, written


def test_every_page_is_linked_and_every_link_leads_somewhere():
    linked = set()
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
                linked.add((page.parent / target).resolve())
    assert {p.resolve() for p in (PROJECT / "docs").glob("*.md")} <= linked


def test_the_chinese_readme_has_the_commands_of_the_readme():
    english, chinese = (list(commands(PROJECT / name)) for name in ("README.md", "docs/README.zh-CN.md"))
    assert chinese == english
    text = (PROJECT / "docs/README.zh-CN.md").read_text(encoding="utf-8")
    assert sum("一" <= c <= "鿿" for c in text) > 600


def test_the_readmes_picture_is_small():
    (picture,) = re.findall(r"^!\[[^\]]+\]\((docs/[^)]+\.(?:png|svg))\)", (PROJECT / "README.md").read_text(), re.M)
    assert (PROJECT / picture).stat().st_size < 200_000
