"""Parameters: one source for names, bounds, forms, sliders and papermill."""

import re
import subprocess
import sys

import nbformat
import papermill
import pytest

from helpers import notebook, parameter, params
from helpers.errors import TunebookError
from helpers.runs import FOLDERS
from tests.conftest import PROJECT


@pytest.mark.parametrize("stage", params.STAGES)
def test_the_notebook_holds_exactly_the_parameters_cell_that_params_renders(stage):
    notebook = nbformat.read(PROJECT / "notebooks" / f"{FOLDERS[stage]}.ipynb", as_version=4)
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert [c.source for c in tagged] == [params.cell(stage)]
    lines = tagged[0].source.splitlines()
    assert len([line for line in lines if not line.startswith("# @markdown")]) <= 25
    assert tagged[0].metadata["cellView"] == "form" and tagged[0].metadata["jupyter"]["source_hidden"]


@pytest.mark.parametrize("stage", params.STAGES)
def test_papermill_finds_every_name_and_default_of_the_form(stage):
    found = papermill.inspect_notebook(str(PROJECT / "notebooks" / f"{FOLDERS[stage]}.ipynb"))
    expected = {p.name: repr(p.default) for p in params.STAGES[stage] if not p.advanced}
    assert {n: repr(eval(v["default"], {})) for n, v in found.items()} == expected
    assert all(v["help"].startswith("@param") for v in found.values())


@pytest.mark.parametrize("stage", params.STAGES)
def test_every_default_passes_its_own_check_and_has_a_meaning(stage):
    names = [p.name for p in params.STAGES[stage]]
    assert len(names) == len(set(names))
    for param in params.STAGES[stage]:
        assert param.check(param.default) == param.default
        assert len(param.help) > 8


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rnk", 8, "rank"),
        ("rank", 10_000, "10000"),
        ("rank", "many", "'many'"),
        ("rank", 2.5, "2.5"),
        ("rank", True, "True"),
        ("learning_rate", float("nan"), "nan"),
        ("learning_rate", "1", "'1'"),
        ("epochs", 10**400, "1000000"),
        ("seed", 1e400, "inf"),
    ],
)
def test_a_wrong_name_type_or_value_is_refused_with_the_name_the_value_and_the_range(name, value, said):
    with pytest.raises(TunebookError) as refused:
        params.resolve("sft", {name: value})
    assert said in str(refused.value) and name in str(refused.value)


def test_texts_from_a_command_line_become_the_parameters_types():
    resolved = params.resolve("sft", {"rank": "32", "learning_rate": "2e-4"})
    assert resolved.rank == 32 and resolved.learning_rate == 2e-4
    flag = parameter.Param("flag", True, "A switch")
    assert flag.check("false") is False and flag.check("True") is True
    with pytest.raises(TunebookError):
        flag.check("no")


def test_a_misspelt_global_is_found_among_a_notebooks_names():
    given = {"rank": 4, "os": sys, "_hidden": 3, "In": [], "Out": {}}
    assert notebook.start("sft", given).changed() == {"rank": 4}
    with pytest.raises(TunebookError, match="learning_rat"):
        notebook.start("sft", {**given, "learning_rat": 1e-4})


def test_a_misspelt_parameter_is_found_by_the_type_checker(tmp_path):
    lines = ("from helpers import params", "resolved = params.resolve('sft')", "resolved.rank + resolved.learning_rate")
    lines += ("resolved.rnk", "resolved.rank = 'many'", "params.resolve('eval').rank")
    (tmp_path / "use.py").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(tmp_path / "use.py")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert re.findall(r"use.py:(\d+): error: (\S+)", done.stdout) == [
        ("4", '"SftParams"'),
        ("5", "Incompatible"),
        ("6", '"EvalParams"'),
    ]


def test_every_stage_has_a_typed_class_of_the_same_parameters():
    for stage in params.STAGES:
        resolved = params.resolve(stage, {"run": "r"})
        assert list(resolved.as_dict()) == [p.name for p in params.STAGES[stage] if p.name not in params.APART]
        assert resolved.changed() == {"run": "r"}


def test_frozen_parameters_cannot_be_changed_any_more():
    values = params.resolve("sft", {"rank": 32})
    values.freeze()
    with pytest.raises(TunebookError, match=r"rank cannot be changed.*64"):
        values.rank = 64
    values.rank = 32


def test_again_does_not_make_other_parameters():
    assert params.resolve("sft", {"again": True}).as_dict() == params.resolve("sft").as_dict()
    assert params.resolve("sft", {"again": "true"}).changed() == {"again": True}
    assert params.resolve("gguf", {"publish_to": "user/name"}).as_dict() == params.resolve("gguf").as_dict()


def test_importing_helpers_brings_nothing_heavy():
    heavy = "torch transformers datasets peft trl pyarrow pandas matplotlib scipy huggingface_hub"
    code = f"import sys, helpers.params, helpers.runs, helpers.notebook; print({{*{heavy.split()}}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "stage, name, value", [("data", "model", ["a"]), ("sft", "run", {}), ("gguf", "outputs", True)]
)
def test_a_text_that_is_none_is_refused_by_name(stage, name, value):
    with pytest.raises(TunebookError, match=f"Parameter {name} is .*a text"):
        params.resolve(stage, {name: value})


def test_off_is_a_choice_however_yaml_spells_it():
    assert params.resolve("data", {"personal_data": False}).personal_data == "off"
