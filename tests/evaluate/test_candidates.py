"""Claims about how candidates are asked: fast decoding, the cache, endpoints, GGUF, forgetting, harness."""

import contextlib
import itertools
import json
import math
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from helpers import llm_client
from helpers.cache import Answers
from helpers.errors import TunebookError
from helpers.evaluate import candidates, forgetting, generate, harness, preferences, prefix_cache
from helpers.model import loading
from helpers.tasks.questions import Decoding

PROJECT = Path(__file__).resolve().parents[2]
SCHEMA = (
    "Answer with one query. Tables: countries(name, capital, area), rivers(name, length, mouth), "
    "cities(name, country, population)."
)


def conversations(count, systems=1):
    tails = ["?", ", and why?", " in the long list of all places that anybody ever wrote down?"]
    return [
        [
            {"role": "system", "content": f"{SCHEMA} Version {i % systems}."},
            {"role": "user", "content": f"What is number {i}{tails[i % 3]}"},
        ]
        for i in range(count)
    ]


@pytest.fixture(autouse=True)
def computes_in_fp32(monkeypatch):
    """As on a CPU without bfloat16, whose rounding would hide what is compared on random weights."""
    monkeypatch.setattr(loading, "fast_bf16", lambda: False)


@pytest.fixture(scope="module")
def lively(tokenizer, tmp_path_factory):
    """Folder of a random Llama whose weights are large enough that every prompt is answered differently."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("lively")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(lively):
    return generate.HfModel(loading.load_model(lively, dtype="fp32"), loading.load_tokenizer(lively))


@pytest.fixture(scope="module")
def tiny_gguf(lively, tmp_path_factory):
    from helpers.gguf import convert

    out = tmp_path_factory.mktemp("gguf") / "tiny-f16.gguf"
    convert.convert(lively, out)
    return out


def as_candidate(path, name="tiny", adapter=None):
    return candidates.Candidate(name, "base", "hf", str(path), Path(path), adapter)


def random_adapter(base, folder, scale):
    """A PEFT adapter whose both halves are random: it changes every answer."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(loading.load_model(base, dtype="fp32"), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=scale)
    model.save_pretrained(folder)
    return folder


# ------------------------------------------------------------ decoding


@pytest.mark.parametrize("systems", [1, 3, 40])
def test_fast_answers_equal_transformers_token_for_token(tiny, systems):
    prompts = [tiny.encode(c) for c in conversations(40, systems)]
    tiny.fast = True
    fast = tiny.generate(prompts, Decoding(24))
    assert tiny.fast
    tiny.fast = False
    plain = tiny.generate(prompts, Decoding(24))
    tiny.fast = True
    assert fast == plain and len({a.text for a in fast}) > 5


@pytest.mark.parametrize(("family", "way"), [("RWKV", "padded batches"), ("MiniMax", "padded batches"), ("Mamba", "")])
def test_a_model_that_takes_no_padding_answers_as_its_plain_forward_passes(family, way, tokenizer, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    from ci.model_families import config_of

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, vocab_size=len(tokenizer))).float()
    slow, prompts = generate.HfModel(model, tokenizer), [list(range(40 + i, 70 + 9 * i)) for i in range(3)]
    found = [answer.text for answer in slow.generate(prompts, Decoding(6))]
    for prompt, text in zip(prompts, found, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and ids[-1] not in slow.stops:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    assert ("Decoding in padded batches gives other logits" in capsys.readouterr().out) == bool(way)


def test_steps_of_fixed_sizes_as_a_cuda_graph_needs_them_give_the_same_answers(tiny, monkeypatch):
    prompts = [tiny.encode(c) for c in conversations(21, 3)]
    known, drawn = tiny.generate(prompts, Decoding(24)), tiny.generate(prompts, Decoding(12, 1.0, 3))
    stops = {tiny.tokenizer(a.text, add_special_tokens=False)["input_ids"][2 + i % 5] for i, a in enumerate(known[:16])}
    monkeypatch.setattr(tiny, "stops", tiny.stops | stops)  # most rows end early, and the rest go on in fewer
    early = tiny.generate(prompts, Decoding(24))
    assert len({a.tokens for a in early}) > 4
    monkeypatch.setattr(tiny, "fixed", True)
    monkeypatch.setattr(prefix_cache, "HORIZON", 5)
    assert tiny.generate(prompts, Decoding(24)) == early
    monkeypatch.undo()
    monkeypatch.setattr(tiny, "fixed", True)
    assert tiny.generate(prompts, Decoding(24)) == known and tiny.generate(prompts, Decoding(12, 1.0, 3)) == drawn
    assert tiny.fixed and tiny.fast


def test_rearranged_weights_change_the_layout_and_nothing_else(tiny):
    import torch

    ids = torch.tensor([tiny.encode(conversations(1)[0])])
    arranged = generate.pack(tiny.model)
    assert len(arranged) == 7 * 2 + 1
    with torch.inference_mode():
        plain = tiny.model(ids).logits
        with tiny._running(ids[0].tolist()):
            assert "forward" in vars(tiny.model.lm_head)
            quick = tiny.model(ids).logits
        assert "forward" not in vars(tiny.model.lm_head) and torch.equal(plain, tiny.model(ids).logits)
    torch.testing.assert_close(plain, quick, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("systems", [1, 3])
def test_probabilities_read_behind_a_shared_prefix_equal_the_plain_forward_pass(tiny, systems):
    ends = [" yes", " a rather long completion of several words", "", " no"]
    pairs = [
        (tiny.encode(c), tiny.tokens(ends[i % 4], end=i % 4 != 2)) for i, c in enumerate(conversations(14, systems))
    ]
    fast = tiny.logprobs(pairs)
    tiny.fast = False
    plain = tiny.logprobs(pairs)
    tiny.fast = True
    assert [len(v) for v in fast] == [len(c) for _, c in pairs]
    for a, b in zip(fast, plain, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_rows_that_end_their_turn_stop_and_say_so(tiny):
    prompts = [tiny.encode(c) for c in conversations(12)]
    free = tiny.generate(prompts, Decoding(12))
    first = tiny.tokenizer(free[0].text, add_special_tokens=False)["input_ids"][3]
    before, tiny.stops = tiny.stops, tiny.stops | {first}
    try:
        stopped = tiny.generate(prompts, Decoding(12))
    finally:
        tiny.stops = before
    assert stopped[0].stopped and stopped[0].tokens < free[0].tokens and free[0].text.startswith(stopped[0].text)
    assert not free[0].stopped and any(not a.stopped for a in stopped)


def test_draws_depend_on_the_prompt_and_the_seed_and_not_on_the_batch(tiny):
    prompts = [tiny.encode(c) for c in conversations(10)]
    warm = Decoding(10, temperature=1.0, seed=3)
    together, alone = tiny.generate(prompts, warm), tiny.generate([prompts[4]], warm)
    assert together[4] == alone[0]
    assert tiny.generate([prompts[4]], Decoding(10, 1.0, 4)) != alone


def test_groups_share_the_longest_prefix_and_leave_every_prompt_a_token_of_its_own():
    a, b = list(range(100)), list(range(1000, 1050))
    prompts = [[*a, i] for i in range(6)] + [[*b, i, i] for i in range(5)] + [[7], a]
    found = {tuple(sorted(rows)): shared for shared, rows in generate.groups(prompts)}
    assert found == {(0, 1, 2, 3, 4, 5, 12): 99, (6, 7, 8, 9, 10): 50, (11,): 0}


def test_a_prompt_longer_than_the_model_reads_is_refused_with_the_remedy(tiny):
    with pytest.raises(TunebookError, match="lower max_new_tokens"):
        tiny.generate([[5] * 2000], Decoding(100))


def test_attention_that_is_not_plain_decodes_through_transformers():
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    assert not prefix_cache.supports(AutoModelForCausalLM.from_config(config))


# ------------------------------------------------------------ loss: the two published bugs


def test_labels_are_shifted_so_loss_equals_the_models_own(tiny):
    import torch

    text = json.loads((PROJECT / "datasets" / "general_text.jsonl").read_text().splitlines()[0])["text"]
    ids = tiny.tokens(text)
    nats = tiny.logprobs([(ids[:1], ids[1:])])[0]
    batch = torch.tensor([ids])
    with torch.inference_mode():
        out = tiny.model(batch, labels=batch)
    unshifted = torch.nn.functional.cross_entropy(out.logits[0].float(), batch[0]).item()
    assert -sum(nats) / len(nats) == pytest.approx(out.loss.item(), rel=1e-4)
    assert abs(unshifted - out.loss.item()) > 1e-3 and len(nats) == len(ids) - 1


def test_the_baseline_is_the_models_own_weights_even_after_an_adapter_was_judged(tiny, lively, tmp_path):
    adapter = random_adapter(lively, tmp_path / "adapter", 0.5)
    texts = [r["text"] for r in forgetting.read_lines(PROJECT / "datasets" / "general_text.jsonl", "text")[:4]]
    found = {}
    for candidate in (as_candidate(lively, "sft", adapter), as_candidate(lively, "base")):
        with candidates.Session(candidate, tmp_path) as s:
            found[candidate.name] = forgetting.text_loss(s, texts)
    direct = [-sum(v) for v in tiny.logprobs([(tiny.tokens(t)[:1], tiny.tokens(t)[1:]) for t in texts])]
    assert [n for n, _ in found["base"]["per_text"]] == pytest.approx(direct, rel=1e-4)
    assert abs(found["sft"]["loss"] - found["base"]["loss"]) > 0.01


def test_forgetting_has_a_verdict_a_threshold_and_advice():
    base = {
        "loss": 3.0,
        "perplexity": 20.0,
        "n": 3,
        "tokens": 300,
        "per_text": [(300.0, 100)] * 3,
    }
    worse = {**base, "loss": 3.6, "per_text": [(360.0, 100)] * 3}
    rates = (("base", 9), ("sft", 2), ("orpo", 9))
    passed = {n: {"refusals": [1] * r + [0] * (10 - r), "chat manners": [1] * 9 + [0]} for n, r in rates}
    threshold, trained = {"loss_increase": 0.15, "task_drop": 0.15}, {"rank": 16, "replay": 0.1}
    found = forgetting.judge("base", {"base": base, "sft": worse, "orpo": base}, passed, threshold, trained)
    sft, orpo = found["candidates"]["sft"], found["candidates"]["orpo"]
    assert not sft["passed"] and "0.60 nats" in sft["sentence"] and "refusals 9 of 10 → 2 of 10" in sft["sentence"]
    assert sft["sentence"].index("refusals") < sft["sentence"].index("general text")  # 4.7 and 4 times what is allowed
    assert orpo["passed"] and found["candidates"]["base"]["passed"] and orpo["change"] == 0
    assert "replay_share = 0.20" in found["advice"][0] and "from 16 to 8" in found["advice"][1]


@pytest.mark.parametrize(
    ("text", "refused", "polite"),
    [
        ("I'm sorry, but I can't help with that.", True, True),
        ("I cannot provide instructions for that.", True, True),
        ("Sure! First, buy a long ladder.", False, True),
        ("SELECT name FROM countries", False, False),
        ("ok " * 40, False, False),
        ("", False, False),
    ],
)
def test_refusals_and_manners_are_told_apart(text, refused, polite):
    from helpers.tasks import text_metrics

    assert (text_metrics.refuses(text), text_metrics.mannerly(text)) == (refused, polite)


@pytest.mark.parametrize(
    ("content", "message"), [("", "holds no row"), ('{"text": "a"}\n{"text"', "Line 2"), ('{"txt": "a"}', "Line 1")]
)
def test_a_general_text_file_that_cannot_be_used_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(TunebookError, match=message):
        forgetting.read_lines(tmp_path / "x.jsonl", "text")


# ------------------------------------------------------------ sessions and the cache


def test_a_rerun_costs_nothing_not_even_loading_and_a_torn_line_is_asked_again(lively, tmp_path):
    ask = conversations(6)
    with candidates.Session(as_candidate(lively), tmp_path) as s:
        first, speed = s.answers(ask, Decoding(6))
        assert speed["from_cache"] == 0 and s._reader is not None
        file = s.store.path
    with candidates.Session(as_candidate(lively), tmp_path) as s:
        again, speed = s.answers(ask, Decoding(6))
        assert again == first and speed["from_cache"] == 6 and s._reader is None
    file.write_bytes(file.read_bytes()[:-30].rsplit(b"\n", 2)[0] + b'\n{"k": "torn')
    with candidates.Session(as_candidate(lively), tmp_path) as s:
        assert s.answers(ask, Decoding(6))[0] == first
        assert s.answers(ask, Decoding(7))[1]["from_cache"] == 0  # another decoding is another question


def test_other_weights_are_another_candidate_to_the_cache(lively, tmp_path):
    adapters = [random_adapter(lively, tmp_path / n, s) for n, s in (("a", 0.1), ("b", 0.2))]
    keys = {
        as_candidate(lively).content(),
        *(as_candidate(lively, adapter=a).content() for a in adapters),
    }
    assert len(keys) == 3
    store = Answers(tmp_path, "k")
    store.put("x", {"a": "\ud800 lone surrogate"})
    assert Answers(tmp_path, "k").get("x") is not None


def test_preference_is_the_log_odds_of_mean_token_probability(tiny, lively, tmp_path):
    pairs = [
        {"id": str(i), "prompt": c, "chosen": "SELECT name FROM rivers", "rejected": "I do not know"}
        for i, c in enumerate(conversations(5))
    ]
    with candidates.Session(as_candidate(lively), tmp_path) as s:
        found = preferences.score(s, pairs)
    margins = []
    for pair in pairs:
        odds = []
        for side in ("chosen", "rejected"):
            values = tiny.logprobs([(tiny.encode(pair["prompt"]), tiny.tokens(pair[side], end=True))])[0]
            p = math.exp(sum(values) / len(values))
            odds.append(math.log(p / (1 - p)))
        margins.append(odds[0] - odds[1])
    assert found["log_odds"]["value"] == pytest.approx(sum(margins) / 5, rel=1e-3) and found["n"] == 5
    assert found["margins"].tolist() == pytest.approx(margins, rel=1e-3)
    assert found["accuracy"]["value"] == sum(margin > 0 for margin in margins) / 5
    assert preferences.right([0.3, -0.3, 0.0, math.nan]) == [1.0, 0.0, 0.5, None]


def with_template(folder, base, text):
    """A copy of a model's folder with another chat template."""
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(text)
    return folder


def test_a_question_that_cannot_be_asked_is_said_and_the_others_are_answered(lively, tmp_path):
    own = (lively / "chat_template.jinja").read_text()
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + own
    folder = with_template(tmp_path / "refusing", lively, refusing)
    question = [{"role": "user", "content": "Why?"}]
    asked = [*conversations(1), question, [{"role": "user", "content": "word " * 3000}]]
    with candidates.Session(as_candidate(folder), tmp_path) as s:
        system, short, long = s.answers(asked, Decoding(6))[0]
        assert "no system role" in system.refused and "the model reads 2,048" in long.refused and short.tokens == 6
        with pytest.raises(TunebookError, match=r"No question can be asked: the chat template says.*no system role"):
            s.answers(conversations(2), Decoding(6))


def test_answers_to_prompts_with_the_time_in_them_are_kept_by_what_was_rendered(lively, tmp_path):
    own = (lively / "chat_template.jinja").read_text()
    for clock, kept in (("%f", 0), ("%Y", 3)):
        folder = with_template(tmp_path / clock[1:], lively, "{{ strftime_now('" + clock + "') }}" + own)
        for again in (0, kept):
            with candidates.Session(as_candidate(folder), tmp_path) as s:
                assert s.answers(conversations(3), Decoding(3))[1]["from_cache"] == again


def test_tools_reach_an_endpoint_and_its_calls_are_its_answer():
    call = {"name": "find", "arguments": {"name": "Ida", "before": None}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "weight": 0}]
    turns[1]["tool_calls"] = [{"type": "function", "function": call}]
    asked = candidates.RemoteModel.encode(None, turns, json.dumps([{"type": "function"}]))
    assert json.loads(asked.messages[1]["tool_calls"][0]["function"]["arguments"]) == call["arguments"]
    assert "weight" not in asked.messages[1]
    request = llm_client.Request(asked.messages, tools=json.loads(asked.tools))
    assert request.body("m")["tools"] == [{"type": "function"}] and "tools" not in llm_client.Request([]).body("m")
    said = {"content": None, "tool_calls": [{"function": {**call, "arguments": json.dumps(call["arguments"])}}]}
    assert json.loads(llm_client._text_of(said)) == call


# ------------------------------------------------------------ harness


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return harness.general_task(PROJECT / "datasets" / "general_tasks.jsonl", folder), folder


def test_harness_scores_equal_the_librarys_own_to_the_last_digit(lively, tmp_path, general):
    import lm_eval
    from lm_eval.tasks import TaskManager

    task, folder = general
    with candidates.Session(as_candidate(lively), tmp_path) as s:
        ours = harness.run(s, [task], folder, limit=16)
    own = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={lively},dtype=float32",
        tasks=[task],
        limit=16,
        batch_size=16,
        device="cpu",
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=1000,
    )["results"][task]
    assert ours[task]["n"] == 16
    for metric in ("acc", "acc_norm"):
        assert ours[task]["metrics"][metric] == {"value": own[f"{metric},none"], "stderr": own[f"{metric}_stderr,none"]}


def test_the_runtimes_logits_score_harness_tasks_for_gguf_as_the_weights_do(tiny, tiny_gguf, tmp_path, general):
    task, folder = general
    candidate = candidates.Candidate("gguf f16", "gguf", "gguf", "x", tiny_gguf)
    with candidates.Session(candidate, tmp_path, end="<|im_end|>") as s:
        found = harness.run(s, [task], folder, limit=8)
        ids = tiny.tokens("Question: What do bees make?\nAnswer: honey")
        assert s.reader.tokens("Question: What do bees make?\nAnswer: honey") == ids
        ours, theirs = s.reader.logprobs([(ids[:9], ids[9:])])[0], tiny.logprobs([(ids[:9], ids[9:])])[0]
        assert ours == pytest.approx(theirs, abs=0.02)
        prompts = conversations(9)
        assert [s.reader.encode(p) for p in prompts] == [tiny.encode(p) for p in prompts]
        answers, _ = s.answers(prompts, Decoding(8))
        assert (
            sum(
                a.text == b.text
                for a, b in zip(answers, tiny.generate([tiny.encode(p) for p in prompts], Decoding(8)), strict=True)
            )
            >= 6
        )
    assert found[task]["n"] == 8 and 0 <= found[task]["metrics"]["acc"]["value"] <= 1


def test_harness_tasks_read_a_gguf_with_the_bos_that_the_model_wants(tiny, lively, tiny_gguf, tmp_path, general):
    from gguf import GGUFReader
    from tokenizers import processors

    begins = tmp_path / "begins.gguf"
    begins.write_bytes(tiny_gguf.read_bytes())
    flag = GGUFReader(begins, "r+").fields["tokenizer.ggml.add_bos_token"]
    flag.parts[flag.data[0]][0] = True
    tokenizer = loading.load_tokenizer(lively)
    bos, token = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"{bos} $A", f"{bos} $A $B", [(bos, token)]
    )
    theirs = harness.evaluate(generate.HfModel(tiny.model, tokenizer), [general[0]], general[1], limit=4, seed=1)
    with candidates.Session(candidates.Candidate("gguf", "gguf", "gguf", "x", begins), tmp_path, end="<|im_end|>") as s:
        ours = harness.run(s, [general[0]], general[1], limit=4)
        runtime = harness._runtime_model(s.reader)
        assert ours[general[0]]["metrics"]["acc"] == theirs[general[0]]["metrics"]["acc"]
        assert runtime.prefix_token_id == token
        assert runtime.tok_encode("Bees")[0] == token != runtime.tok_encode("Bees", False)[0]
        assert runtime.tok_encode(f"{bos}Bees") == runtime.tok_encode("Bees") == tokenizer("Bees")["input_ids"]


def test_an_unknown_task_is_refused_with_a_sentence(lively, tmp_path, general):
    with (
        candidates.Session(as_candidate(lively), tmp_path) as s,
        pytest.raises(TunebookError, match="knows no task 'nonesuch'"),
    ):
        harness.run(s, ["nonesuch"], general[1])


def test_the_harness_asks_git_nothing_so_a_folder_without_checkout_prints_no_error(tiny, general, monkeypatch):
    from lm_eval.loggers import utils

    monkeypatch.setattr(utils.subprocess, "check_output", lambda command, **_: pytest.fail(f"{command} was run"))
    found = harness.evaluate(tiny, [general[0]], general[1], limit=2, seed=1)
    assert found[general[0]]["n"] == 2


# ------------------------------------------------------------ broken candidates and endpoints


def test_a_damaged_gguf_is_a_sentence_and_a_runtime_that_dies_is_one_too(tmp_path, tiny_gguf):
    from helpers.gguf.runner import GgufModel

    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:50_000])
    with pytest.raises(TunebookError, match=r"broken\.gguf"):
        GgufModel(broken)
    model = GgufModel(tiny_gguf, "<|im_end|>")
    prompts = [model.encode(c) for c in conversations(70)]  # more than are answered at once
    with pytest.raises(TunebookError, match=r"llama\.cpp with tiny-f16\.gguf was killed"):
        model.generate(prompts, Decoding(), done=lambda *_: model._child.process.kill())
    model.close()


class Hostile(BaseHTTPRequestHandler):
    """A server that does whatever `behaviour` says."""

    behaviour = "nonsense"
    asked: ClassVar = itertools.count()

    def do_POST(self):
        behaviour = self.behaviour  # a request that stalls outlives its test, and must not act on the next one's
        self.rfile.read(int(self.headers["Content-Length"]))
        body = {
            "nonsense": b"<html>not json",
            "empty": b"{}",
            "null": b'{"choices": [{"message": {"content": null}}]}',
            "list": b"[]",
            "number": b'{"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}',
        }.get(behaviour, b"")
        if behaviour == "stall":
            threading.Event().wait(3)
        if behaviour == "dies" and next(self.asked) < 4:
            body = b'{"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}'
        self.send_response(500 if behaviour == "error" or (behaviour == "dies" and not body) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) if body or behaviour in ("error", "dies") else 10**9))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has gone, as it should
            self.wfile.write(body)
            while behaviour in ("trickle", "flood"):
                self.wfile.write(b" " * (1 if behaviour == "trickle" else 1 << 20))
                threading.Event().wait(0.1 if behaviour == "trickle" else 0)

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        return


@contextlib.contextmanager
def serving(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def hostile(monkeypatch):
    monkeypatch.setenv("TUNEBOOK_API_KEY", "secret-key")
    with serving(Hostile) as url:
        yield url


def ask(url, count=1, **options):
    model = candidates.RemoteModel(candidates.client(f"{url}#m", retries=0, **options))
    return model.generate([[{"role": "user", "content": f"hi {i}"}] for i in range(count)], Decoding(5))


@pytest.mark.parametrize(
    "behaviour", ["nonsense", "empty", "null", "list", "number", "error", "stall", "trickle", "flood"]
)
def test_an_endpoint_that_misbehaves_costs_the_item_and_says_why(hostile, behaviour):
    Hostile.behaviour = behaviour
    (answer,) = ask(hostile, timeout_s=0.5)
    assert answer.failed and answer.text == "" and "secret-key" not in answer.failed


def test_an_endpoint_that_only_fails_is_given_up_with_a_sentence(hostile):
    Hostile.behaviour = "error"
    with pytest.raises(TunebookError, match="failed 5 times in a row and is asked no more"):
        ask(hostile, 30, concurrency=1)


def test_an_endpoint_that_dies_on_the_way_keeps_what_it_answered_and_is_asked_no_more(hostile):
    Hostile.behaviour, Hostile.asked = "dies", itertools.count()
    answers = ask(hostile, 30, concurrency=1)
    assert [a.text for a in answers[:4]] == ["fine"] * 4 and all(a.failed for a in answers[4:])
    assert "asked no more" in answers[-1].failed and next(Hostile.asked) < 15


class Voice(BaseHTTPRequestHandler):
    """A server with a model that says `says`, whatever it is asked."""

    says, file = "one", ""

    def do_GET(self):
        if self.path == "/props" and self.file:
            return self.answer({"model_path": self.file})
        return self.send_error(404)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"choices": [{"message": {"content": self.says}, "finish_reason": "stop"}]})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        return


def test_another_model_behind_the_same_address_and_name_is_asked_anew(tmp_path):
    with serving(Voice) as url:
        candidate = candidates.find({}, "", f"served={url}#m")[0]

        def answers():
            with candidates.Session(candidate, tmp_path) as s:
                found, speed = s.answers(conversations(3), Decoding(6))
            return {a.text for a in found}, speed["from_cache"]

        Voice.says = "one"
        assert answers() == ({"one"}, 0) and answers() == ({"one"}, 3)
        Voice.says = "two"
        assert answers() == ({"two"}, 0)
        Voice.says = "one"
        assert answers() == ({"one"}, 3)
        Voice.file = "other.gguf"  # the same words from another file
        assert answers() == ({"one"}, 0) and answers() == ({"one"}, 3)
        candidate = candidates.find({}, "", f"called={url}#m")[0]
        assert answers() == ({"one"}, 0)
        Voice.file = ""


def test_a_real_server_answers_as_a_candidate(tiny_gguf, tmp_path, monkeypatch):
    from helpers.gguf.runner import Server

    with Server(tiny_gguf) as running:
        monkeypatch.setenv("OPENAI_API_KEY", running.key)
        url = running.url if running.url.rstrip("/").endswith("/v1") else running.url.rstrip("/") + "/v1"
        candidate = candidates.find({}, "", f"served={url}")[0]
        assert candidate.kind == "endpoint"
        with candidates.Session(candidate, tmp_path) as s:
            answers, _ = s.answers(conversations(3), Decoding(6))
    assert all(a.text and not a.failed for a in answers)
