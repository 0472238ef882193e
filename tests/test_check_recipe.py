"""`tunebook check`: what a recipe would come to, by the data stage's own steps, and nothing left under runs/."""

import json

import pytest

from helpers import __main__ as command_line


@pytest.fixture
def recipe(tmp_path, tiny_llama):
    """A recipe with 40 answers, two of them over max_length and one of a test question; returns its folder."""
    rows = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    rows[3]["completion"] = rows[4]["completion"] = "very long " * 200
    rows[5]["prompt"] = held = "Which of the two rivers of the old northern town flows into the cold sea in winter?"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": held, "completion": "The second."}) + "\n")
    folder = tmp_path / "mine"
    folder.mkdir()
    data = f"model: {tiny_llama}\ndataset: {tmp_path / 'rows.jsonl'}\ntest_dataset: {tmp_path / 'test.jsonl'}\n"
    data += "preference_dataset: ''\ndatabase: ''\nmax_length: 128\nnear_duplicates: 0\neval_share: 0\n"
    data += "over_long: truncate\n"
    (folder / "data.yaml").write_text(data)
    (folder / "sft.yaml").write_text("method: lora\nprecision: bf16\nbatch_size: 4\n")
    return folder


def test_rows_ends_of_turn_overlap_and_every_gpu_are_told_and_runs_stays_empty(recipe, runs_root, capsys):
    assert command_line.main(["check", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "train 39" in said and "truncated 2" in said
    assert "<|im_end|> is trained in 37 of 39 rows; 2 lost it to max_length" in said
    assert "1 rows hold a test question and are dropped" in said
    lines = {line.split()[1]: line for line in said.splitlines() if line.startswith("sft ") and "trains on" not in line}
    assert "sft learning rate" in said and "proposed for a LoRA of alpha 32, rank 16 on 0.01" in said
    assert {"T4", "L4", "A100-40", "A100-80", "H100"} <= set(lines)
    assert "precision 'bf16' needs compute capability" in lines["T4"] and " yes " in lines["A100-40"]
    assert not runs_root.exists()


def test_a_sample_and_single_parameters_are_said_and_heeded(recipe, runs_root, capsys):
    given = ["--rows", "10", "-p", "data.over_long", "drop", "-p", "sft.precision", "auto", "--gpus", "2"]
    given += ["-p", "sft.learning_rate", "1e-4"]
    assert command_line.main(["check", str(recipe), *given]) == 0
    said = capsys.readouterr().out
    assert "the first 10 rows of dataset only" in said and "train 7" in said and "dropped 2" in said
    assert "Warning: it is 10 times below the 0.001 proposed" in said
    assert "compute capability" not in said and not runs_root.exists()


@pytest.mark.parametrize(
    "given, said",
    [
        (["nosuch-recipe"], "nosuch-recipe"),
        (["quick-look"], "no data.yaml"),
        (["own-chat", "-p", "orpo.beta", "1"], "orpo.beta"),
        (["cpu", "-p", "data.dataset", "nowhere/x.jsonl"], "nowhere/x.jsonl"),
    ],
)
def test_what_cannot_be_checked_is_one_error_message(given, said, runs_root, capsys):
    assert command_line.main(["check", *given]) == 1
    error = capsys.readouterr().err
    assert said in error and error.strip().count("\n") == 0 and not runs_root.exists()
