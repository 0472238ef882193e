"""Claims about the Modelfile: its Go template, rendered by Go's own engine, prints what the model's Jinja prints."""

# ruff: noqa: E501  (templates are easier to compare in their own lines)

import copy
import json
import shutil
import subprocess

import pytest

from helpers.errors import TunebookError
from helpers.gguf import ollama

ENGINE = "@evertdespiegeleer/go-template@1.0.2"  # Go's text/template, compiled to WebAssembly
SCRIPT = """
import { parse } from "@evertdespiegeleer/go-template";
import fs from "node:fs";
const jobs = JSON.parse(fs.readFileSync(0, "utf8")), out = [];
for (const [template, data] of jobs) out.push(await parse(template, data));
fs.writeFileSync(1, JSON.stringify(out));
process.exit(0);
"""

# The manner of each family, written for these tests: {name: (template, bos, added by the tokenizer)}.
FAMILIES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        None,
        False,
    ),
    "chatml with default system": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
        "{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        None,
        False,
    ),
    "chatml without thinking": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
        None,
        False,
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|begin_of_text|>",
        True,
    ),
    "llama 3.1": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set brief = messages[0].content | trim %}{% set rest = messages[1:] %}"
        "{% else %}{% set brief = '' %}{% set rest = messages %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
        "{{ brief }}<|eot_id|>{% for m in rest %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|begin_of_text|>",
        True,
    ),
    "llama 2": (
        "{% if messages[0].role == 'system' %}{% set brief = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set brief = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{{ brief if loop.first else '' }}{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
        "<s>",
        True,
    ),
    "mistral, system in the first turn": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set brief = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
        "{% set rest = messages %}{% endif %}{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {% if loop.first and brief is defined %}"
        "{{ brief + '\n\n' }}{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "<s>",
        True,
    ),
    "mistral, system in the last turn": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set brief = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
        "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.last and brief is defined %}"
        "{{ brief + '\n\n' }}{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "<s>",
        False,
    ),
    "gemma 2": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<bos>",
        True,
    ),
    "gemma 3": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set brief = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% else %}"
        "{% set brief = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ brief if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<bos>",
        True,
    ),
    "phi 3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        None,
        False,
    ),
    "phi 4": (
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        None,
        False,
    ),
}


def family(tokenizer, name):
    """SmolLM2's tokenizer with another family's template and manner of beginning."""
    from tokenizers import processors

    template, bos, adds = FAMILIES[name]
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    if bos:
        other.add_special_tokens({"bos_token": bos})
        if adds:
            other.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, other.bos_token_id)]
            )
    return other


@pytest.fixture(scope="session")
def go(tmp_path_factory):
    """go([(template, messages), …]) -> texts, by Go's own engine, fed as Ollama feeds it."""
    from helpers import cache

    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("node and npm are needed to run Go's template engine")
    folder = cache.folder() / "go-template"
    if not (folder / "node_modules").is_dir():
        done = subprocess.run(
            ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), ENGINE],
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"npm could not install {ENGINE}: {done.stderr[-200:]}")
    script = folder / "render.mjs"
    script.write_text(SCRIPT)

    def render(jobs):
        data = [
            [
                template,
                {
                    "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
                    "Response": "",
                    "Messages": [{"Role": m["role"], "Content": m["content"]} for m in ollama.collate(messages)],
                },
            ]
            for template, messages in jobs
        ]
        done = subprocess.run(
            ["node", str(script)], input=json.dumps(data), capture_output=True, text=True, timeout=60, cwd=folder
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return render


@pytest.fixture(scope="session")
def families(tokenizer, go):
    """name -> (what was derived, Go's own rendering of every shape); one process of the engine for all."""
    made = {name: ollama.from_tokenizer(family(tokenizer, name)) for name in FAMILIES}
    texts = iter(go([(m.template, ollama.SHAPES[c.shape][0]) for m in made.values() for c in m.checks]))
    return {name: (m, [next(texts) for _ in m.checks]) for name, m in made.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_go_template_of_every_family_prints_what_its_jinja_prints(families, name):
    made, texts = families[name]
    assert not made.reason
    shapes = {c.shape: c for c in made.checks}
    assert texts == [c.go for c in made.checks]  # the Python rendering that exports rely on is Go's
    for (shape, check), text in zip(shapes.items(), texts, strict=True):
        if check.needed and check.jinja is not None:
            assert text == check.jinja, shape
    refused = {c.shape for c in made.checks if c.jinja is None}
    if name == "gemma 2":
        assert "system and question" in refused and any("takes no system prompt" in n for n in made.notes)
    else:
        assert not refused & {c.shape for c in made.checks if c.needed}


def test_the_shipped_models_template_is_equal_on_every_shape_but_the_one_ollama_rewrites(tokenizer, go):
    made = ollama.from_tokenizer(tokenizer)
    assert {c.shape for c in made.checks if not c.equal} == {"two questions running"}
    assert "named SmolLM" in made.template  # the default system prompt that Ollama's own guess drops
    conversation = [
        {"role": "system", "content": "Schema: " + "x " * 3000},
        {"role": "user", "content": "你好 \U0001f600 \u202e\u0000"},
    ]
    assert go([(made.template, conversation)]) == [
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    ]


def test_trimming_is_told_because_go_cannot_trim(tokenizer):
    made = ollama.from_tokenizer(family(tokenizer, "llama 3"))
    assert any("blanks at the edges" in n and "Go cannot" in n for n in made.notes)


@pytest.mark.parametrize(
    "template, why",
    [
        ("{{ messages[-1].content }}", "exactly once"),
        (
            "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}",
            "later turns differently",
        ),
        ("{{ raise_exception('no') }}", "refuses"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "exactly once"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m.content }}{% endfor %}", "refuses"),
    ],
)
def test_a_template_that_is_not_made_of_turns_is_refused_with_the_reason(tokenizer, template, why):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    made = ollama.from_tokenizer(other)
    assert why in made.reason and "vLLM" in made.reason and made.path is None


def test_a_template_that_changes_words_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = FAMILIES["chatml"][0].replace("m.content", "m.content | replace('\"', '&quot;')")
    made = ollama.from_tokenizer(other)
    assert "braces, quotes, markup" in made.reason


@pytest.fixture
def exported(smollm2, tmp_path):
    """A merged folder's small files and a stand-in for the GGUF's weights, which the Modelfile only names."""
    merged = tmp_path / "merged"
    merged.mkdir()
    for file in smollm2.path.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, merged)
    gguf = tmp_path / "model-q8_0.gguf"
    gguf.write_bytes(b"GGUF")
    return merged, gguf, tmp_path / "Modelfile"


def fields(text):
    """A Modelfile's instructions, read as Ollama's parser does: a value between three double quotes is taken as it is."""
    found = {}
    rest = text
    while rest:
        word, _, rest = rest.partition(" ")
        if word.startswith("#"):
            rest = (word + " " + rest).partition("\n")[2]
            continue
        if rest.startswith('"""'):
            value, _, rest = rest[3:].partition('"""')
            rest = rest.lstrip("\n")
        else:
            value, _, rest = rest.partition("\n")
        found.setdefault(word, []).append(value)
    return found


def test_the_modelfile_says_everything_ollama_would_otherwise_guess(exported, go, tokenizer):
    merged, gguf, out = exported
    made = ollama.write(merged, gguf, out, name="atlas")
    said = fields(out.read_text())
    assert said["FROM"] == ["./model-q8_0.gguf"]
    assert said["TEMPLATE"] == [made.template] and "SYSTEM" not in said
    assert {'stop "<|im_end|>"', "num_ctx 8192", "temperature 0"} <= set(said["PARAMETER"])
    chat = [{"role": "user", "content": "Hi"}]
    assert go([(said["TEMPLATE"][0], chat)]) == [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ]


def test_generation_config_reaches_the_modelfile(exported):
    merged, gguf, out = exported
    (merged / "generation_config.json").write_text(
        json.dumps(
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": [2, 0]}
        )
    )
    made = ollama.write(merged, gguf, out, context=1024)
    assert made.parameters == {"num_ctx": 1024, "temperature": 0.6, "top_p": 0.9, "repeat_penalty": 1.1}
    assert made.stops == ["<|im_end|>", "<|endoftext|>"]


def test_commands_name_this_model_its_template_and_stops_and_stay_on_this_machine(exported):
    merged, gguf, out = exported
    found = ollama.write(merged, gguf, out, name="atlas").commands
    assert set(found) == {"Ollama", "vLLM", "LM Studio", "llama.cpp", "Open WebUI"}
    assert f"ollama create atlas -f {out}" in found["Ollama"]
    assert (
        str(merged / "chat_template.jinja") in found["vLLM"]
        and "<|im_end|>" in found["vLLM"]
        and "--max-model-len 8192" in found["vLLM"]
    )
    assert "<|im_end|>" in found["LM Studio"] and str(gguf) in found["LM Studio"]
    assert "OPENAI_API_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=$TUNEBOOK_SERVER_KEY" in found["Open WebUI"]
    assert "0.0.0.0" not in "".join(found.values())
    for command in found.values():
        done = subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_a_shell_is_not_fooled_by_a_folder_name(exported):
    merged, gguf, out = exported
    odd = merged.with_name("mer ged; rm -rf $HOME")
    merged.rename(odd)
    made = ollama.write(odd, gguf, out)
    words = subprocess.run(
        ["bash", "-c", "printf '%s\\n' " + made.commands["vLLM"].splitlines()[0]], capture_output=True, text=True
    ).stdout
    assert str(odd) in words.splitlines()


@pytest.mark.parametrize("name", ["", "../up", "a b", "$(id)", "UPPER", "x" * 100])
def test_a_name_that_could_leave_its_place_is_refused(exported, name):
    with pytest.raises(TunebookError, match="not a valid name"):
        ollama.write(*exported, name=name)


def test_missing_parts_are_a_sentence_and_write_nothing(exported, tokenizer):
    merged, gguf, out = exported
    with pytest.raises(TunebookError, match="no GGUF file"):
        ollama.write(merged, gguf.with_name("none.gguf"), out)
    odd = gguf.with_name('a"\n.gguf')
    gguf.rename(odd)
    with pytest.raises(TunebookError, match="rename it"):
        ollama.write(merged, odd, out)
    odd.rename(gguf)
    assert not out.exists()


def test_without_a_chat_template_the_modelfile_completes_and_stops_at_the_end_of_sequence(exported):
    merged, gguf, out = exported
    (merged / "chat_template.jinja").unlink()
    made = ollama.write(merged, gguf, out)
    assert not made.reason and not made.checks and "completes plain text" in made.notes[0]
    text = out.read_text()
    assert 'TEMPLATE """{{ .Prompt }}"""' in text and 'PARAMETER stop "<|im_end|>"' in text
    assert "/v1/completions" in made.commands["vLLM"] and '"prompt": "Once"' in made.commands["vLLM"]
