"""The panel of a notebook's first cell: real widgets, moved as a person moves them."""

import os
import subprocess
import sys
from pathlib import Path

import ipywidgets
import pytest

from helpers import notebook, panel, params
from helpers.errors import TunebookError
from tests.conftest import PROJECT

COLABS = Path(os.environ.get("TUNEBOOK_IPYWIDGETS_7", PROJECT / ".cache/ipywidgets-7"))  # .ci/run fetches it
SEVEN = ipywidgets.__version__ < "8"


def made(stage, **given):
    values = params.resolve(stage, given)
    return panel.Panel(stage, values), values


def every(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from every(child)


@pytest.fixture(autouse=True)
def no_runs(runs_root):
    pass


@pytest.mark.parametrize("stage", params.STAGES)
def test_every_parameter_has_a_row_whose_controls_show_its_default_and_carry_its_name(stage):
    shown, values = made(stage)
    assert list(shown.rows) == [p.name for p in params.STAGES[stage]]
    inside = {id(widget) for widget in every(shown.view)}
    for param in params.STAGES[stage]:
        row = shown.rows[param.name]
        assert id(row.field) in inside and row.field.description == param.name
        value = getattr(values, param.name)
        assert row.field.value == (value if isinstance(value, bool) or param.choices else param.text(value))
        assert (row.slider is not None) == bool(param.marks)
        if row.slider is not None:
            assert row.slider.value == value and {*param.marks, value} == {v for _, v in row.slider.options}
    assert values.changed() == {}


@pytest.mark.parametrize(
    "stage, name, grid",
    [
        ("sft", "rank", [4, 8, 16, 32, 64, 128, 256, 512]),
        ("sft", "alpha", [4, 8, 16, 32, 64, 128, 256, 512]),
        ("orpo", "rank", [4, 8, 16, 32, 64, 128, 256, 512]),
        ("data", "max_length", [0, *(2**n for n in range(8, 18))]),
        ("orpo", "max_length", [2**n for n in range(8, 18)]),
        ("sft", "epochs", [n / 2 for n in range(1, 21)]),
        ("orpo", "epochs", [n / 2 for n in range(1, 21)]),
        ("eval", "max_new_tokens", list(range(16, 8193, 16))),
    ],
)
def test_sliders_stop_at_useful_values(stage, name, grid):
    assert [value for _, value in made(stage)[0].rows[name].slider.options] == grid


def test_the_learning_rate_is_proposed_or_on_a_grid_of_six_a_decade():
    options = dict(made("sft")[0].rows["learning_rate"].slider.options)
    assert options["0"] == 0 and options["2e-5"] == 2e-5 and options["0.0003"] == 3e-4
    of_decade = [rate for rate in options.values() if 0.99e-4 < rate < 0.99e-3]
    assert of_decade == pytest.approx([1e-4, 1.5e-4, 2e-4, 3e-4, 5e-4, 7e-4])


@pytest.mark.parametrize(
    "stage, name, typed, value",
    [
        ("sft", "rank", "24", 24),
        ("sft", "epochs", "1.25", 1.25),
        ("sft", "epochs", "0.01", 0.01),
        ("sft", "learning_rate", "2.5e-4", 2.5e-4),
        ("data", "max_length", "1000", 1000),
        ("eval", "max_new_tokens", "100", 100),
        ("sft", "batch_size", " 12 ", 12),
        ("data", "eval_share", "0.123", 0.123),
    ],
)
def test_any_value_within_the_bounds_can_be_typed_and_the_slider_goes_there(stage, name, typed, value):
    shown, values = made(stage)
    row = shown.rows[name]
    row.field.value = typed
    assert getattr(values, name) == value and "alert" not in row.told.value
    if row.slider is not None:
        assert row.slider.value == value
        marks = [v for _, v in row.slider.options]
        assert marks == sorted(marks)
        row.slider.value = marks[0]
        assert getattr(values, name) == marks[0] and row.field.value == row.param.text(marks[0])


@pytest.mark.parametrize(
    "stage, name, typed",
    [
        ("sft", "rank", "600"),
        ("sft", "rank", "0"),
        ("sft", "rank", "many"),
        ("sft", "rank", "2.5"),
        ("sft", "rank", ""),
        ("sft", "learning_rate", "-1"),
        ("sft", "learning_rate", "nan"),
        ("sft", "learning_rate", "1,5e-4"),
        ("sft", "epochs", "1e400"),
        ("data", "max_length", "131073"),
        ("orpo", "beta", "11"),
        ("eval", "temperature", "-0.1"),
        ("sft", "model", "https://me:secret@host/x"),
    ],
)
def test_what_cannot_be_is_refused_in_red_and_not_clamped(stage, name, typed):
    shown, values = made(stage)
    row, before = shown.rows[name], getattr(values, name)
    row.field.value = typed
    assert getattr(values, name) == before and row.field.value == row.param.text(before)
    assert "role='alert'" in row.told.value and name in row.told.value and "secret" not in row.told.value
    row.field.value = row.param.text(before) + " "
    row.field.value = row.param.text(row.param.default)
    assert "alert" not in row.told.value


def test_the_runs_name_is_judged_as_it_is_typed_and_left_under_the_fingers(runs_root):
    shown, values = made("sft")
    row = shown.rows["run"]
    assert row.field.continuous_update and "nothing is finished" in row.told.value
    for typed in ("my", "my "):
        row.field.value = typed
    assert row.field.value == "my " and values.run == "my" and "alert" in row.told.value and "stays" in row.told.value
    for typed in ("../up", "a/b", "..", "CON", "nul.txt", "a.", "x" * 300, ""):
        row.field.value = typed
        assert values.run == "my" and "alert" in row.told.value and len(row.told.value) < 600
    (runs_root / "my-run/01_data_prep").mkdir(parents=True)
    (runs_root / "my-run/01_data_prep/manifest.json").touch()
    row.field.value = "my-run"
    assert values.run == "my-run" and "finished there: 01" in row.told.value and "alert" not in row.told.value


@pytest.mark.parametrize("stage", params.STAGES)
def test_each_preset_moves_the_controls_and_own_brings_them_back(stage):
    shown, values = made(stage, run="mine", seed=5)
    before = dict(shown.own)
    assert {panel.OWN, panel.HERE, panel.DEMO, *panel.recipes(stage)} == set(shown.preset.options)
    for name in shown.preset.options[1:]:
        shown.preset.value = name
        assert "alert" not in shown.notice.value and values.run == "mine"
        expected = panel.preset(stage, name, values)
        for param in params.STAGES[stage]:
            if param.name != "run":
                assert getattr(values, param.name) == expected[param.name]
                assert shown.rows[param.name].field.value in (expected[param.name], param.text(expected[param.name]))
    shown.preset.value = panel.OWN
    assert {p.name: getattr(values, p.name) for p in params.STAGES[stage]} == before


def test_a_recipe_gives_its_own_values_and_a_move_makes_them_ones_own():
    shown, values = made("sft")
    shown.preset.value = "8b-a100"
    assert (values.method, values.rank, values.learning_rate) == (
        "lora",
        32,
        2e-4,
    ) and "rank = 32" in shown.notice.value
    shown.rows["rank"].slider.value = 64
    assert shown.preset.value == panel.OWN and (values.rank, values.method) == (64, "lora")
    shown.preset.value = panel.DEMO
    shown.preset.value = panel.OWN
    assert (values.rank, values.method) == (64, "lora")


def test_the_set_for_this_machine_leaves_ones_own_data_and_model():
    shown, values = made("data", dataset="mine.csv", model="some/model", max_length=128)
    shown.preset.value = panel.HERE
    assert (values.dataset, values.model, values.max_length) == ("mine.csv", "some/model", 512)
    shown.preset.value = panel.DEMO
    assert values.dataset == params.DataParams().dataset


def test_controls_are_locked_when_the_stage_begins_and_a_move_after_that_is_told():
    shown, values = made("sft")
    row = shown.rows["rank"]
    row.slider.value = 32
    values.freeze()
    assert row.field.disabled and row.slider.disabled and shown.preset.disabled and "has begun" in shown.notice.value
    row.slider.value = 64
    assert (values.rank, row.slider.value, row.field.value) == (32, 32, "32")
    assert "alert" in row.told.value and "cannot be changed to 64" in row.told.value


def test_the_filter_leaves_the_folded_rows_with_its_words_and_opens_the_fold():
    shown, _ = made("sft")

    def seen():
        every_row = [row for _, rows in shown.groups.values() for row in rows]
        return {row.param.name for row in every_row if row.view.layout.display != "none"}

    whole = seen()
    assert whole == {p.name for p in params.STAGES["sft"] if p.advanced} and shown.fold.selected_index is None
    shown.filter.value = "warm"
    assert seen() == {"warmup_ratio", "warmup_steps"} and shown.fold.selected_index == 0
    assert [h.value for h, _ in shown.groups.values() if h.layout.display != "none"] == ["<b>Optimizer</b>"]
    shown.filter.value = "checkpoint every"
    assert "save_steps" in seen()
    shown.filter.value = ""
    assert seen() == whole


def test_groups_name_parameters_that_there_are():
    known = {p.name for stage in params.STAGES for p in params.STAGES[stage]}
    listed = [name for names in panel.yaml.safe_load(panel.GROUPS.read_text()).values() for name in names]
    assert set(listed) <= known and len(listed) == len(set(listed))


def test_values_from_outside_are_text_and_no_markup():
    shown, _ = made("sft", start_from="<img src=x onerror=alert(1)>")
    shown.rows["run"].field.value = "<script>"
    shown.preset.value = panel.DEMO
    shown.preset.value = panel.OWN
    markup = [widget.value for widget in every(shown.view) if isinstance(widget, ipywidgets.HTML)]
    assert not any("<script>" in text or "<img" in text for text in markup)


# ---------------------------------------------------------------- what it comes to


def test_the_estimate_follows_a_slider_and_a_price(data):
    shown, _ = made("sft", run="r")
    shown.refresh()
    first = shown.outlook.table.value
    for name in ("here", "T4", "L4", "A100-40", "A100-80", "H100"):
        assert f"aria-label='{name}: memory " in first
    assert "Learning rate 0.001, proposed for a LoRA of alpha 32, rank 16" in first and "LoRA Without Regret" in first
    shown.rows["rank"].slider.value = 256
    second = shown.outlook.table.value
    assert first != second and first.split("</b>")[0] != second.split("</b>")[0]
    assert second.count("<td>–</td>") == 6
    shown.outlook.prices["T4"].value = 3600.0
    assert shown.outlook.table.value.count("<td>–</td>") == 5
    shown.outlook.prices["T4"].value = -1.0
    assert "price of an hour on T4 is not valid" in shown.outlook.table.value


def test_what_cannot_be_is_red_with_the_setting_that_can(data):
    shown, _ = made("sft", run="r")
    shown.rows["micro_batch"].field.value = "3"
    assert "alert" in shown.outlook.table.value and "no multiple of micro_batch 3" in shown.outlook.table.value
    shown.rows["micro_batch"].field.value = "0"
    assert "alert" not in shown.outlook.table.value
    shown.rows["max_minutes"].field.value = "0.0001"
    assert "(max_minutes)" in shown.outlook.table.value
    shown.rows["learning_rate"].field.value = "1e-5"
    assert "Warning: it is 100 times below the 0.001 proposed" in shown.outlook.table.value


def test_without_data_the_panel_says_what_is_missing_and_works():
    shown, values = made("orpo", run="none")
    shown.refresh()
    assert "No estimate: Stage" in shown.outlook.table.value and "has not been run" in shown.outlook.table.value
    shown.rows["beta"].slider.value = 1.0
    assert values.beta == 1.0


# ---------------------------------------------------------------- a file of one's own


def uploaded(shown, name, content):
    """As each ipywidgets gives a file: 8 a tuple of files with a memoryview, 7 a dict by name. Returns the other's."""
    eight = ({"name": name, "type": "", "size": len(content), "content": memoryview(content)},)
    seven = {name: {"metadata": {"name": name}, "content": content}}
    shown.upload._came({"new": seven if SEVEN else eight})
    return eight if SEVEN else seven


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(panel.sources.machine, "PROJECT", tmp_path)
    monkeypatch.setattr(panel.sources.machine, "places", lambda: (tmp_path, tmp_path / "content"))
    return tmp_path


def test_an_uploaded_file_becomes_the_dataset_and_its_first_rows_are_shown(project):
    shown, values = made("data")
    rows = "".join(f"Question {n}?,Answer {n}\n" for n in range(5))
    uploaded(shown, "../My pairs, <b>new</b>.csv", b"Frage,answer,note\n" + b"")
    assert "uploads/" in values.dataset and ".." not in values.dataset and "," not in values.dataset
    uploaded(shown, "pairs.csv", ("question,answer\n" + rows).encode())
    assert values.dataset == shown.rows["dataset"].field.value == "uploads/pairs.csv"
    text = shown.upload.preview.value
    assert "alpaca: prompt=question, response=answer" in text and "Question 2?" in text and "Answer 0" in text
    uploaded(shown, "pairs.csv", ("question,answer\n" + rows).encode())
    assert values.dataset == "uploads/pairs.csv"
    shown.upload._came({"new": uploaded(shown, "pairs.csv", b"prompt,completion\nHow?,So\n")})
    assert values.dataset == "uploads/pairs-2.csv" and "prompt=prompt" in shown.upload.preview.value


@pytest.mark.parametrize(
    "content, said",
    [
        (b"question,answer\n", "it holds no row"),
        (("question,answer\n" + "What?,Gr\u00f6sse\n" * 30).encode("latin-1"), "iconv -f"),
        (b"Frage,Antwort\n" + b"Was?,Das\n" * 30, "unknown shape"),
        (b"question,answer\n" + bytes(range(256)) * 9, "not UTF-8"),
    ],
)
def test_an_odd_file_is_shown_for_what_it_is(project, content, said):
    shown, _ = made("data")
    uploaded(shown, "odd.csv", content)
    text = shown.upload.preview.value
    assert said in text and "at most" not in text


@pytest.mark.parametrize("name, content", [("notes.exe", b"MZ"), ("empty.csv", b""), (".jsonl", b"{}"), ("x", b"x")])
def test_a_file_that_is_no_data_is_refused_in_red(project, name, content):
    shown, values = made("data")
    before = values.dataset
    uploaded(shown, name, content)
    assert values.dataset == before and "alert" in shown.upload.preview.value
    assert not (project / "uploads").exists()


def test_the_mapping_follows_the_columns_and_a_wrong_one_is_told(project):
    (project / "content").mkdir()
    (project / "content/own.jsonl").write_text('{"frage": "Wie?", "antwort": "<b>So</b>", "nr": 1}\n' * 3)
    shown, _ = made("data", dataset="own.jsonl")
    shown.refresh()
    assert "unknown shape" in shown.upload.preview.value
    shown.rows["columns"].field.value = "prompt=frage,response=antwort"
    text = shown.upload.preview.value
    assert "prompt=frage, response=antwort" in text and "nr" in text and "&lt;b&gt;So" in text
    shown.rows["dataset"].field.value = "nowhere.csv"
    assert "alert" in shown.upload.preview.value and "nowhere.csv" in shown.upload.preview.value


# ---------------------------------------------------------------- in a notebook


@pytest.mark.skipif(SEVEN or not (COLABS / "ipywidgets").is_dir(), reason="Colab's ipywidgets 7.7 is not here")
def test_all_of_this_holds_with_the_ipywidgets_that_colab_has():
    words = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider", __file__]
    told = {**os.environ, "PYTHONPATH": str(COLABS), "TUNEBOOK_IPYWIDGETS_7": str(COLABS)}
    done = subprocess.run(words, cwd=PROJECT, env=told, capture_output=True, text=True)
    assert done.returncode == 0 and " 1 skipped" in done.stdout, done.stdout[-3000:]


def test_a_misspelt_parameter_is_refused_before_a_panel_is_made():
    with pytest.raises(TunebookError, match="rnk"):
        notebook.start("sft", {"rnk": 3})


def test_only_widgets_that_both_ipywidgets_share_are_used():
    shared = {"VBox", "HBox", "HTML", "Text", "Textarea", "Checkbox", "Dropdown", "SelectionSlider", "FloatText"}
    shared |= {"Button", "Accordion", "FileUpload", "Output"}
    for stage in params.STAGES:
        assert {type(widget).__name__ for widget in every(made(stage)[0].view)} <= shared


def test_in_a_real_kernel_run_all_is_noticed_and_the_panel_locks_with_the_work(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.delenv("TUNEBOOK_HEADLESS", raising=False)
    first = (
        "import sys; sys.path.insert(0, {!r})\nfrom helpers import notebook, panel\nrank = 8\n"
        "_found, _made = [], panel.Panel.__init__\n"
        "panel.Panel.__init__ = lambda self, *a: (_made(self, *a), _found.append(self))[0]"
    )
    cells = [first.format(str(panel.PLACE.parent)), "params = notebook.start('sft', globals())"]
    cells += [
        "print(_found[0].notice.value)",
        "params.freeze(); print(_found[0].notice.value, _found[0].rows['rank'].field.disabled)",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    texts = ["".join(o.get("text", "") for o in cell.outputs) for cell in book.cells]
    assert "already running" in texts[2] and "has begun" in texts[3] and "True" in texts[3]
    shown = [o.data for o in book.cells[1].outputs if "data" in o]
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown)
