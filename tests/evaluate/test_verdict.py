"""Claims about the verdict: which file ships, in which words, and what is said of forgetting."""

import json

import pytest

from helpers import params
from helpers.evaluate import forgetting, statistics
from helpers.evaluate import scores as scores_json
from helpers.evaluate.candidates import Candidate
from helpers.tasks import questions
from tests.conftest import PROJECT

ROLES = {"base": "base", "sft": "sft", "orpo": "orpo", "merged": "merged", "gpt": "other"}
SIZES = {"base": 270, "sft": 290, "orpo": 290, "merged": 270, "q8": 145, "q6": 125, "q4": 105, "q2": 60}
SQL = {"kind": "text_to_sql", "label": "execution accuracy", "n_nonempty": None}


class Sized(Candidate):
    """A candidate whose files have the size of SIZES, in MB."""

    @property
    def size_bytes(self):
        return SIZES.get(self.name, 0) * 10**6 or None


def scored(answers, passed=None, task=SQL, **given):
    """scores.json of candidates by their answers: name → 0 or 1 for each question."""
    n = len(next(iter(answers.values())))
    items = [questions.Item(str(i), [], "x") for i in range(n)]
    rows = [dict.fromkeys(("nonempty", "contaminated")) | {"id": str(i)} for i in range(n)]
    judged = []
    for name in answers:
        role = ROLES.get(name, "gguf")
        made_from = "orpo" if role in ("merged", "gguf") else ""
        judged.append(Sized(name, role, "hf", f"here/{name}", made_from=made_from))
    findings = scores_json.Findings(params.resolve("eval", given), {**task, "n": n}, items, judged, rows, {})
    for name, values in answers.items():
        entry = {"stopped": True, "valid": True, "structural": True, "error": ""}
        entries = [{**entry, "score": v, "text": "", "metrics": {}} for v in values]
        findings.measured[name] = scores_json.Measured(entries, {"17": values}, passed=(passed or {}).get(name, {}))
    return findings.scores()


def right(count, n=150, but=()):
    """0 or 1 for n questions, the first `count` right, turned round at the places `but`."""
    return [float((i < count) != (i in but)) for i in range(n)]


def test_the_file_to_ship_is_the_one_that_every_place_speaks_of():
    found = scored({"base": right(0), "orpo": right(40), "q8": right(38, but=(60,)), "q4": right(20)})
    assert found["ship"]["name"] == "q8" and found["headline"].startswith("q8 scores 26 % execution accuracy, base 0 %")
    assert scores_json.metrics(found)["headline"] == found["headline"]
    said = statistics.sentences(scores_json.metrics(found))
    assert said == [found["headline"], found["ship"]["sentence"]] and said[1].startswith("Ship q8 (here/q8, 145 MB)")


@pytest.mark.parametrize(
    ("q8", "q4", "n", "margin", "ships"),
    [
        (40, 38, 150, 0.02, "q8"),  # 2 of 150 fewer: the interval goes below -2 points
        (40, 38, 150, 0.06, "q4"),  # the same, where 6 points may be lost
        (1200, 1196, 4000, 0.02, "q4"),  # 0.1 points fewer on many questions
        (1200, 1000, 4000, 0.02, "q8"),
        (12, 11, 24, 0.02, "q8"),  # one of 24: no clear difference, and nothing shown
        (12, 12, 24, 0.02, "q4"),  # as many right: the smaller of two best
        (12, 13, 24, 0.02, "q4"),
    ],
)
def test_the_smallest_file_ships_that_is_shown_to_lose_less_than_the_margin(q8, q4, n, margin, ships):
    found = scored({"base": right(0, n), "q8": right(q8, n), "q4": right(q4, n)}, margin=margin)
    assert found["ship"]["name"] == ships and found["ship"]["margin"] == margin
    said = found["ship"]["sentence"]
    assert ("q4 would save 40.0 MB (28 %)" in said) == (ships == "q8")
    assert "equal" not in said and "as good" not in said


def test_answers_that_are_alike_are_shown_to_be_within_the_margin_only_where_they_are_many():
    """The trained model is the best; a file with the same answers to few questions may still be worse."""
    for n, words in (
        (24, "none is shown to stay within 2 points of orpo"),
        (400, "the smallest file that stays within 2 points of orpo"),
    ):
        best = right(n // 2, n)
        found = scored({"base": right(0, n), "orpo": right(n // 2 + 1, n), "q8": best, "q4": right(n // 3, n)})
        assert found["ship"]["name"] == "q8" and words in found["ship"]["sentence"]


def test_what_the_smaller_file_would_cost_is_said_with_its_interval():
    found = scored({"base": right(0), "q8": right(50), "q6": right(44), "q2": right(9)})
    said = found["ship"]["sentence"]
    assert "q6 would save 20.0 MB (14 %) and probably cost 4 points (anything from " in said and "q2" not in said
    compared = statistics.pair("q8", "q6", right(50), right(44))
    assert f"anything from {statistics.span(compared['low'], compared['high'], 'lost', 'gained')} fits" in said


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"base": right(60), "sft": right(30), "q8": right(30)}, "no export is better than base beyond chance."),
        ({"base": right(60), "sft": right(61)}, "no trained model is better than base beyond chance."),
        ({"base": right(10), "orpo": right(60), "q4": right(10)}, "beyond chance. orpo is: export it in a larger type"),
    ],
)
def test_nothing_ships_that_does_not_beat_the_base(answers, words):
    found = scored(answers)
    assert found["ship"]["name"] == "" and words in found["ship"]["sentence"]
    named = statistics.protagonist(found)["name"]
    assert named != "base" and found["headline"].startswith(f"{named} scores")


def test_one_candidate_alone_and_files_without_a_base_are_judged_all_the_same():
    alone = scored({"base": right(5)})
    assert alone["ship"] is None and "nothing else was judged" in alone["headline"] and alone["lost"] is None
    files = scored({"merged": right(40), "q8": right(40), "q4": right(5)})
    assert files["ship"]["name"] == "q8" and "no base was judged" in files["ship"]["sentence"]
    other = scored({"base": right(5), "gpt": right(140), "q8": right(60)})
    assert other["ship"]["name"] == "q8" and other["headline"].startswith("q8 scores")


def test_no_clear_difference_says_what_fits_and_never_that_both_are_equal():
    one = statistics.settle([statistics.pair("a", "b", right(40), right(35))])[0]
    assert one["verdict"] == "no clear difference" and "anything from 7 worse to 0.0 better" not in one["sentence"]
    assert f"anything from {statistics.span(one['low'], one['high'])} fits" in one["sentence"]
    assert "worse to" in one["sentence"] and "equal" not in one["sentence"]


def test_an_interval_is_not_shorter_than_the_truth_where_few_answers_differ():
    """One of 60 answers lost: the true loss may be over 7 points, a bootstrap of the items would say 5."""
    low, high = statistics.paired_interval(0, 1, 60)
    assert low < -0.06 and high > 0
    assert statistics.paired_interval(0, 0, 10)[0] == -statistics.paired_interval(0, 0, 10)[1] < -0.2


def test_what_was_forgotten_is_said_once_with_counts_and_the_strongest_loss_first():
    def share(count, n):
        return right(count, n)

    passed = {
        "base": {"general knowledge": share(44, 62), "chat manners": share(8, 10)},
        "sft": {"general knowledge": share(37, 62), "chat manners": share(8, 10)},
        "orpo": {"general knowledge": share(37, 62), "chat manners": share(5, 10)},
    }
    answers = {"base": right(0), "sft": right(30), "orpo": right(40), "q8": right(40)}
    found = scored(answers, passed)
    said = found["lost"]["sentence"]
    assert said.startswith("orpo, which q8 was made from, forgot: chat manners 8 of 10 → 5 of 10, not certain")
    assert "over task_drop = 15 points; general knowledge 44 of 62 → 37 of 62 (95 % interval" in said
    assert found["lost"]["name"] == "orpo" and [w for w in found["warnings"] if "forgot" in w] == [said]
    kept = scored(answers, dict.fromkeys(passed, passed["base"]))
    assert kept["lost"]["passed"] and kept["lost"]["sentence"] == "orpo, which q8 was made from, kept what it knew."
    assert not any("kept" in w for w in kept["warnings"])


def test_items_that_one_side_did_not_answer_are_left_out_of_both():
    passed = {"base": {"refusals": [1, 1, None, 1]}, "sft": {"refusals": [0, None, 1, 1]}}
    found = forgetting.judge("base", {}, passed, {"loss_increase": 0.15, "task_drop": 0.15}, {})
    task = found["candidates"]["sft"]["tasks"]["refusals"]
    assert (task["n"], task["base"], task["value"]) == (2, 1.0, 0.5)
    nothing = forgetting.judge("base", {}, {"base": {"x": [None]}, "sft": {"x": [1]}}, {"task_drop": 0.15}, {})
    assert nothing["candidates"]["sft"]["tasks"] == {} and nothing["candidates"]["sft"]["passed"]
    assert nothing["shows"] == ""


def test_the_smallest_loss_that_each_set_can_show_is_said_of_the_candidate_where_it_is_largest():
    limits = {"loss_increase": 0.15, "task_drop": 0.15}
    passed = {
        "base": {"manners": right(96, 100), "refusals": right(8, 16)},
        "sft": {"manners": right(48, 100), "refusals": right(8, 16)},
        "orpo": {"manners": right(96, 100), "refusals": [1 - one for one in right(8, 16)]},
    }
    said = forgetting.judge("base", {}, passed, limits, {})["shows"]
    spread = (0.48 - 0.48**2) ** 0.5  # 48 lost of 100; all of 16 changed, as many lost as gained
    points = round(100 * (1.959964 + 0.841621) * spread / 99**0.5)
    assert f"from {points} points of manners (n = 100), 72 points of refusals (n = 16); " in said
    assert said.endswith("one of task_drop = 15 points of refusals may go unseen.") and "manners and" not in said
    some = forgetting.judge("base", {}, {name: {"manners": passed[name]["manners"]} for name in passed}, limits, {})
    assert some["shows"].endswith("of manners (n = 100).")


@pytest.mark.parametrize(("kind", "disagree"), [("tasks", 0.35), ("manners", 0.29), ("refusal", 0.23)])
def test_the_general_sets_show_a_loss_of_15_points_with_80_percent_power(kind, disagree):
    """Connor 1987: the items that a paired comparison needs where both sides disagree on this share of them."""
    spread = 1.959964 * disagree**0.5 + 0.841621 * (disagree - 0.15**2) ** 0.5
    name = "general_tasks" if kind == "tasks" else "general_chat"
    rows = (PROJECT / "datasets" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(kind in ("tasks", json.loads(row).get("kind")) for row in rows) >= (spread / 0.15) ** 2
