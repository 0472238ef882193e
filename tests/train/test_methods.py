"""Which backend trains, and that Unsloth stays out of the way unless it is asked for."""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys

import pytest

from helpers import machine
from helpers import params as parameters
from helpers.errors import TunebookError
from helpers.planner import cost_model, proposals
from helpers.train import methods


def pick(card, backend="auto", installed=True, monkeypatch=None, model="llama", **values):
    monkeypatch.setattr(
        proposals.importlib.util,
        "find_spec",
        lambda name: importlib.machinery.ModuleSpec(name, None) if installed else None,
    )
    return proposals.choose_backend(
        backend, cost_model.CPU if card == "CPU" else cost_model.card_named(card), model, {"method": "qlora", **values}
    )


def test_auto_takes_unsloth_only_on_cards_without_the_kernels(monkeypatch):
    assert pick("T4", monkeypatch=monkeypatch)[0] == "unsloth"
    for card in ("L4", "A100-40", "H200"):
        name, why = pick(card, monkeypatch=monkeypatch)
        assert name == "hf" and "FlashAttention" in why
    assert pick("T4", installed=False, monkeypatch=monkeypatch) == ("hf", "Backend hf: Unsloth is not installed.")
    assert pick("CPU", monkeypatch=monkeypatch)[0] == "hf"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"method": "full"}, "method full"),
        ({"dora": True}, "DoRA"),
        ({"init": "loftq"}, "PiSSA and LoftQ"),
        ({"loss": "dpo"}, "loss dpo"),
        ({"model": "mamba"}, "mamba"),
        ({"precision": "fp32"}, "precision is fp32"),
    ],
)
def test_unsloth_is_refused_where_it_cannot_work(monkeypatch, values, reason):
    with pytest.raises(TunebookError, match=reason):
        pick("T4", backend="unsloth", monkeypatch=monkeypatch, **values)
    assert pick("T4", monkeypatch=monkeypatch, **values)[0] == "hf"


def test_nothing_imports_unsloth_or_torch_by_itself():
    code = (
        "import helpers.train.training, helpers.train.__main__, helpers.notebook, sys; "
        "print(sorted({'torch', 'transformers', 'unsloth'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def given(**values):
    return parameters.resolve("sft", {"run": "r", "method": "qlora", **values})


@pytest.fixture
def installed(monkeypatch, data):
    """A machine with a T4 where Unsloth is installed, and a finished data stage for a Llama."""
    spec = importlib.machinery.ModuleSpec("unsloth", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    monkeypatch.setattr(cost_model, "card_here", lambda: cost_model.card_named("T4"))
    return data


def test_backend_hf_and_machines_without_unsloth_need_no_early_import(data):
    assert not methods.import_first(given(backend="hf"))
    assert not methods.import_first(given())


def test_a_late_import_is_a_message(installed):
    assert "transformers" in sys.modules
    for backend in ("auto", "unsloth"):
        with pytest.raises(TunebookError, match="restart the kernel"):
            methods.import_first(given(backend=backend))


@pytest.mark.parametrize(
    ("values", "kind"),
    [({}, "mamba"), ({"method": "full"}, "llama"), ({"dora": True}, "llama"), ({"precision": "fp32"}, "llama")],
)
def test_unsloth_is_not_imported_for_a_job_that_the_planner_gives_to_the_other_backend(
    installed, narrow_llama, values, kind, tmp_path
):
    """transformers would be patched, and here the import itself would be refused."""
    config = json.loads((narrow_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    assert methods.decide(given(model=str(tmp_path), **values)) == "hf"
    assert not methods.import_first(given(model=str(tmp_path), **values))


def test_the_decision_before_the_import_is_the_planners(installed, monkeypatch, narrow_llama):
    from helpers.planner.plan import plan

    for card in ("T4", "L4", "H100"):
        monkeypatch.setattr(cost_model, "card_here", lambda card=card: cost_model.card_named(card))
        assert methods.decide(given()) == plan(given(), [100] * 20, narrow_llama).backend
