"""Chat templates by parameter: what each named one writes, which tokens mark its turns, and what is refused."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.data import chat_template, template_choice
from helpers.errors import TunebookError
from helpers.model.stop_tokens import turn_ends

TEXTS = ["Hello, how are you? I am well. What is the capital of France? Paris, it is."] * 4
SYSTEM, ASK, SAY = (
    {"role": role, "content": text} for role, text in (("system", "S"), ("user", "Q"), ("assistant", "A"))
)
AGAIN, MORE = {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "f", "content": '{"t": 3}'}
TOOL = {"type": "function", "function": {"name": "f", "description": "d"}}
LISTED = '{"type": "function", "function": {"name": "f", "description": "d"}}'


def base(*, bos="<s>", eos="</s>", pad=None, adds_bos=True, control=(), unknown="<unk>"):
    """A base model's tokenizer without a chat template: byte-level BPE, its control tokens those named."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    names = dict.fromkeys(filter(None, (unknown, bos, eos, pad, *control)))
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    if adds_bos:
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unknown}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in named.items() if v})


def rendered(tokenizer, *messages, tools=None, generation=False):
    return tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=generation)


CHATML, LLAMA3 = ("<|im_start|>", "<|im_end|>"), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ALPACA = "Below is an instruction that describes a task"
WRITES = "Write a response that appropriately completes the request.\n\n"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
# name → (control tokens, BOS, EOS, system and two exchanges as the family documents them, one question with the prompt)
FAMILIES = {
    "chatml": (
        *(CHATML, "", "<|endoftext|>"),
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        *(LLAMA3, "<|begin_of_text|>", "<|end_of_text|>"),
        f"<|begin_of_text|>{HEAD.format('system')}S<|eot_id|>{HEAD.format('user')}Q<|eot_id|>"
        f"{HEAD.format('assistant')}A<|eot_id|>{HEAD.format('user')}Q2<|eot_id|>{HEAD.format('assistant')}A2<|eot_id|>",
        f"<|begin_of_text|>{HEAD.format('user')}Q<|eot_id|>{HEAD.format('assistant')}",
    ),
    "mistral": (
        *(("[INST]", "[/INST]"), "<s>", "</s>"),
        "<s>[INST] S\n\nQ[/INST] A</s>[INST] Q2[/INST] A2</s>",
        "<s>[INST] Q[/INST]",
    ),
    "gemma": (
        *(("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
        "<bos><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n",
        "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
    ),
    "phi3": (
        *(("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<s>", "<|endoftext|>"),
        "<s><|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nQ2<|end|>\n"
        "<|assistant|>\nA2<|end|>\n",
        "<s><|user|>\nQ<|end|>\n<|assistant|>\n",
    ),
    "zephyr": (
        *((), "", "</s>"),
        "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n<|user|>\nQ2</s>\n<|assistant|>\nA2</s>\n",
        "<|user|>\nQ</s>\n<|assistant|>\n",
    ),
    "vicuna": (
        *((), "<s>", "</s>"),
        "<s>S USER: Q ASSISTANT: A</s>USER: Q2 ASSISTANT: A2</s>",
        f"<s>{VICUNA} USER: Q ASSISTANT:",
    ),
    "alpaca": (
        *((), "<s>", "</s>"),
        "<s>S\n\n### Instruction:\nQ\n\n### Response:\nA</s>\n\n### Instruction:\nQ2\n\n### Response:\nA2</s>",
        f"<s>{ALPACA}. {WRITES}### Instruction:\nQ\n\n### Response:\n",
    ),
    "context_qa": (
        *((), "<s>", "</s>"),
        "<s>SYSTEM: S\n\nUSER: Q\nASSISTANT: A</s>\nUSER: Q2\nASSISTANT: A2</s>",
        "<s>SYSTEM: Use the following contextual information to concisely answer the question.\n\nUSER: Q\nASSISTANT:",
    ),
}


@pytest.fixture
def llama():
    """Like Llama-2's: a BOS before every text, no turn tokens."""
    return base()


@pytest.mark.parametrize("name", template_choice.NAMED)
def test_a_named_template_writes_what_its_family_documents(name):
    control, bos, eos, whole, asked = FAMILIES[name]
    tokenizer = base(bos=bos or None, eos=eos, adds_bos=bool(bos), control=control)
    choice = template_choice.choose(tokenizer, name)
    assert rendered(tokenizer, SYSTEM, ASK, SAY, AGAIN, MORE) == whole
    assert rendered(tokenizer, ASK, generation=True) == asked
    assert choice["tokens"] == ("eos" if name == "zephyr" else "vocabulary") and not choice["added"]
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}
    assert tokenizer.eos_token == ends.get(name, eos) == tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)[0])
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    found = chat_template.inspect(tokenizer)
    assert found.takes_system and not found.adds_bos and asked.endswith(found.generation_prompt)
    assert found.default_system == {
        "vicuna": VICUNA,
        "alpaca": f"{ALPACA}. {WRITES}".strip(),
        "context_qa": "Use the following contextual information to concisely answer the question.",
    }.get(name, "")


@pytest.mark.parametrize("name", template_choice.NAMED)
def test_every_answer_is_marked_and_every_prompt_is_a_prefix(name):
    tokenizer = base(bos=None, adds_bos=False, eos="</s>")
    template_choice.choose(tokenizer, name, "add")
    (made,) = chat_template.render(tokenizer, [([SYSTEM, ASK, SAY, AGAIN, MORE], None, [2, 4])])
    marked = [made.full[begin:end] for begin, end in made.spans]
    assert [text.strip() for text in marked] == [f"A{tokenizer.eos_token}", f"A2{tokenizer.eos_token}"]
    for (prefix, _), (begin, _) in zip(made.turns, made.spans, strict=True):
        assert made.full.startswith(prefix) and len(prefix) == begin


def test_alpaca_with_and_without_an_input_ends_with_the_end_of_sequence(llama):
    template_choice.choose(llama, "Alpaca")
    with_input = {"role": "user", "content": "Translate.\n\n### Input:\nHello"}
    assert rendered(llama, with_input, SAY) == (
        f"<s>{ALPACA}, paired with an input that provides further context. {WRITES}"
        "### Instruction:\nTranslate.\n\n### Input:\nHello\n\n### Response:\nA</s>"
    )
    assert rendered(llama, ASK, SAY) == f"<s>{ALPACA}. {WRITES}### Instruction:\nQ\n\n### Response:\nA</s>"


TOOLED = {
    "chatml": (
        "<|im_start|>system\nS\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n" + LISTED + "\n</tools>"
        "\n\nFor each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
        '{"name": "f", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n'
        '{"t": 3}\n</tool_response><|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n'
    ),
    "llama3": (
        f"{HEAD.format('system')}S<|eot_id|>{HEAD.format('user')}Given the following functions, please respond with a "
        "JSON for a function call with its proper arguments that best answers the given prompt.\n\nRespond in the "
        'format {"name": function name, "parameters": dictionary of argument name and its value}. Do not use '
        'variables.\n\n{\n    "type": "function",\n    "function": {\n        "name": "f",\n        "description": "d"'
        f"\n    }}\n}}\n\nQ<|eot_id|>{HEAD.format('assistant')}"
        '{"name": "f", "parameters": {"city": "Oslo"}}'
        f'<|eot_id|>{HEAD.format("ipython")}{{"t": 3}}<|eot_id|>{HEAD.format("assistant")}A<|eot_id|>'
    ),
    "mistral": (
        f"[AVAILABLE_TOOLS] [{LISTED}][/AVAILABLE_TOOLS][INST] S\n\nQ[/INST][TOOL_CALLS] "
        '[{"name": "f", "arguments": {"city": "Oslo"}}]</s>[TOOL_RESULTS] {"content": {"t": 3}}[/TOOL_RESULTS] A</s>'
    ),
}


@pytest.mark.parametrize("name", TOOLED)
def test_tools_calls_and_results_stand_where_the_family_puts_them(name):
    tokenizer = base(bos=None, adds_bos=False)
    template_choice.choose(tokenizer, name, "add")
    assert rendered(tokenizer, SYSTEM, ASK, CALLING, RESULT, SAY, tools=[TOOL]) == TOOLED[name]
    found = chat_template.inspect(tokenizer)
    assert found.shows_tools and found.shows_tool_calls and found.shows_tool_results


# ---------------------------------------------------------------- turn tokens


def test_turn_tokens_that_the_vocabulary_lacks_are_text_and_the_answer_ends_with_the_models_own_end(llama):
    before = len(llama)
    choice = template_choice.choose(llama, "chatml")
    assert choice["tokens"] == "eos" and choice["markers"] == list(CHATML) and len(llama) == before
    whole = rendered(llama, ASK, SAY)
    assert whole == "<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA</s>\n"
    ids = llama(whole, add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i in llama.all_special_ids] == [llama.bos_token_id, llama.eos_token_id]
    assert turn_ends(llama) == (llama.eos_token_id,) and "written as plain text" in str(template_choice.facts(choice))


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi3"])
def test_added_turn_tokens_are_control_tokens_and_the_end_of_turn_becomes_the_end_of_sequence(llama, name):
    before = len(llama)
    choice = template_choice.choose(llama, name, "add")
    assert choice["tokens"] == "add" and len(llama) == before + len(choice["added"])
    assert (
        {*choice["added"]}
        == {*FAMILIES[name][0]}
        <= {*llama.all_special_tokens, *map(str, llama.added_tokens_decoder.values())}
    )
    assert llama.eos_token == choice["eos"] and llama.eos_token_id >= before and llama.pad_token == "<unk>"
    ids = llama(rendered(llama, SYSTEM, ASK, SAY), add_special_tokens=False)["input_ids"]
    assert set(llama.convert_tokens_to_ids(choice["added"])) <= set(ids)


def test_tokens_of_the_vocabulary_are_used_unless_eos_is_asked_for():
    qwen = base(bos=None, eos="<|endoftext|>", pad="<|endoftext|>", adds_bos=False, control=CHATML)
    assert template_choice.choose(qwen, "chatml")["tokens"] == "vocabulary" and qwen.eos_token == "<|im_end|>"
    assert qwen.pad_token == "<|endoftext|>"
    other = base(bos=None, eos="<|endoftext|>", adds_bos=False, control=CHATML, pad="<pad>")
    assert template_choice.choose(other, "chatml", "eos")["eos"] == "<|endoftext|>"
    assert rendered(other, ASK, SAY).endswith("<|im_start|>assistant\nA<|endoftext|>\n")
    assert template_choice.choose(other, "chatml", "add")["tokens"] == "vocabulary"


def test_a_users_own_template_gets_the_same_treatment(llama, tmp_path):
    own = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (tmp_path / "own.jinja").write_text(own)
    choice = template_choice.choose(llama, str(tmp_path / "own.jinja"))
    assert (choice["name"], choice["tokens"]) == ("own.jinja", "eos")
    assert rendered(llama, ASK, SAY) == "<s><|im_start|>user\nQ</s>\n<|im_start|>assistant\nA</s>\n"
    added = base()
    choice = template_choice.choose(added, own, "add")
    assert choice["added"] == list(CHATML) and added.eos_token == "<|im_end|>"
    assert rendered(added, ASK, SAY) == "<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"


def test_without_an_end_of_sequence_one_is_added_or_asked_for():
    for name in ("chatml", "alpaca"):
        lacking = base(eos=None)
        with pytest.raises(TunebookError, match=r"needs an end of sequence .* set template_tokens to add"):
            template_choice.choose(lacking, name)
        lacking = base(eos=None)
        choice = template_choice.choose(lacking, name, "add")
        assert choice["eos"] == lacking.eos_token == choice["added"][-1]
        assert turn_ends(lacking) == (lacking.eos_token_id,)


def test_a_template_on_an_instruct_model_is_said(tokenizer):
    import copy

    own = copy.deepcopy(tokenizer)
    choice = template_choice.choose(own, "zephyr")
    assert choice["replaced"] and "which it replaces" in str(template_choice.facts(choice))
    assert template_choice.choose(tokenizer, "") == {} == template_choice.choose(tokenizer, "  ")


# ---------------------------------------------------------------- what is refused

LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatlm", "'chatlm', which is neither .* did you mean chatml"),
        ("lama-3", "did you mean llama3"),
        ("qqqq", "the names are alpaca, chatml"),
        ("no/such.jinja", "neither a known name, nor a file"),
        ("{{ messages[1].content }}{{ eos_token }}", "leaves out the question"),
        ("{{ messages[0].content }}{{ eos_token }}", "leaves out the answer"),
        (LOOP, "no end of turn behind the answer .* eos_token"),
        (LOOP + "END", "it writes 'END'"),
        ("line one {{ 1 }}\n{% for m in messages %}\n{{ m.content }\n{% endfor %}", "line 3: unexpected '}'"),
        ("{{ 1 }}\n\n{{ messages[0].nothing.at_all }}", "line 3: .*has no attribute"),
        ("{{ 1 }}\n{% for m in messages %}", "line 2: .*end of template"),
        ("{{ raise_exception('No user here') }}", "No user here"),
    ],
)
def test_a_bad_template_is_one_message(llama, template, message):
    with pytest.raises(TunebookError, match=message):
        template_choice.choose(llama, template)


def test_a_file_that_is_no_text_is_named(llama, tmp_path):
    (tmp_path / "bad.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(TunebookError, match=r"bad\.jinja cannot be read as UTF-8"):
        template_choice.choose(llama, str(tmp_path / "bad.jinja"))


@pytest.mark.parametrize("name", template_choice.NAMED)
def test_ollama_can_say_every_named_template(name):
    from helpers.gguf import ollama

    tokenizer = base()
    template_choice.choose(tokenizer, name, "add")
    made = ollama.from_tokenizer(tokenizer)
    assert not made.reason and all(check.equal for check in made.checks if check.needed)
    assert ("instruction with an input" in "".join(made.notes)) == (name == "alpaca")
