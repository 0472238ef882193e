"""Which backend trains, and that Unsloth stays out of the way unless it is asked for."""

import subprocess
import sys

import pytest

from helpers import machine
from helpers.errors import TunebookError
from helpers.planner import gpus
from helpers.planner import plan as planner
from helpers.train import unsloth_backend


def pick(card, backend="auto", installed=True, monkeypatch=None, model="llama", **values):
    import importlib.machinery

    monkeypatch.setattr(
        planner.importlib.util,
        "find_spec",
        lambda name: importlib.machinery.ModuleSpec(name, None) if installed else None,
    )
    return planner.choose_backend(
        backend, gpus.CPU if card == "CPU" else gpus.named(card), model, {"method": "qlora", **values}
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
        ({"loss": "dpo"}, "loss dpo"),
        ({"model": "mamba"}, "mamba"),
    ],
)
def test_unsloth_is_refused_where_it_cannot_work(monkeypatch, values, reason):
    with pytest.raises(TunebookError, match=reason):
        pick("T4", backend="unsloth", monkeypatch=monkeypatch, **values)
    assert pick("T4", monkeypatch=monkeypatch, **values)[0] == "hf"


def test_nothing_imports_unsloth_or_torch_by_itself():
    code = (
        "import helpers.train.unsloth_backend, helpers.train.distributed, helpers.planner.plan, helpers.model.packed_attention, sys; "
        "print(sorted({'torch', 'transformers', 'unsloth'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_backend_hf_and_machines_without_unsloth_need_no_early_import(monkeypatch):
    assert not unsloth_backend.early_import({"backend": "hf", "method": "qlora"})
    monkeypatch.setattr(unsloth_backend.importlib.util, "find_spec", lambda name: None)
    assert not unsloth_backend.wanted({"backend": "auto", "method": "qlora"})


def test_a_late_import_is_a_sentence(monkeypatch):

    monkeypatch.setattr(unsloth_backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    with pytest.raises(TunebookError, match="restart the kernel"):
        unsloth_backend.early_import({"backend": "unsloth", "method": "qlora"})
