"""The vocabulary check, and added tokens from their first value over training, adapter and merge to the GGUF file."""

import pytest

from helpers.data import vocabulary
from helpers.errors import TunebookError

TEXTS = [
    "How long is the river Brahmaputra?",
    "Does the Brahmaputra flow through Bangladesh?",
    "The length of the Danube is 2,850 km.",
] * 20
TOKENS = "Brahmaputra, <|sql|>, kilohertz"


@pytest.fixture
def own(smollm2):
    """A tokenizer of this test's own: adding tokens changes it."""
    from helpers.model.loading import load_tokenizer

    return load_tokenizer(smollm2)


@pytest.fixture
def tiny(tiny_llama):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer with one token for each byte: on ASCII text exactly one token a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


# ---------------------------------------------------------------- report


def test_tokens_per_character_and_pieces_per_word(tokenizer, bytewise):
    found, found_bytewise = vocabulary.report(tokenizer, TEXTS), vocabulary.report(bytewise, TEXTS)
    tokens = sum(len(tokenizer(t)["input_ids"]) for t in TEXTS)
    assert found["tokens"] == tokens and found["characters"] == sum(map(len, TEXTS))
    assert found["tokens_per_character"] == pytest.approx(tokens / sum(map(len, TEXTS)), abs=1e-4)
    assert found_bytewise["tokens_per_character"] == 1.0 and found_bytewise["bytes_per_token"] == 1.0
    assert found_bytewise["pieces_per_word"] > found["pieces_per_word"] >= 1
    assert found["vocabulary"] == len(tokenizer)


def test_chinese_costs_more_tokens_under_an_english_tokenizer(tokenizer, bytewise):
    texts = ["我喜欢在北京的公园里散步。" * 5]
    assert vocabulary.report(tokenizer, texts)["tokens_per_character"] > 1
    assert vocabulary.report(bytewise, texts)["tokens_per_character"] == pytest.approx(3.0)


def test_empty_data_is_refused(tokenizer):
    with pytest.raises(TunebookError, match="no text"):
        vocabulary.report(tokenizer, ["", ""])


# ---------------------------------------------------------------- adding


def test_new_rows_are_the_mean_of_their_pieces(own, tiny):
    pieces = own("Brahmaputra", add_special_tokens=False)["input_ids"]
    before = tiny.get_input_embeddings().weight.detach().clone()
    ids = vocabulary.add_tokens(tiny, own, TOKENS)
    after = tiny.get_input_embeddings().weight.detach()
    assert sorted(ids) == [len(before), len(before) + 1, len(before) + 2] and len(own) == len(after) == len(before) + 3
    assert (after[: len(before)] == before).all(), "no old row moves"
    assert (after[ids[0]] - before[pieces].mean(0)).abs().max() < 1e-6
    assert tiny.get_output_embeddings().weight is tiny.get_input_embeddings().weight, "shared layers stay shared"
    assert own("Brahmaputra<|sql|>", add_special_tokens=False)["input_ids"] == ids[:2]
    assert own.decode(ids[:1]) == "Brahmaputra" and own.decode(ids[1:2], skip_special_tokens=True) == ""


def test_an_output_layer_of_its_own_starts_as_the_mean_too(own):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(own),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    pieces = own("kilohertz", add_special_tokens=False)["input_ids"]
    (row,) = vocabulary.add_tokens(model, own, ["kilohertz"])
    head = model.lm_head.weight.detach()
    assert torch.allclose(head[row], head[pieces].mean(0), atol=1e-6) and not torch.equal(
        head[row], model.model.embed_tokens.weight[row]
    )


def test_the_same_list_gives_the_same_ids_with_or_without_a_model(smollm2, own, tiny):
    from helpers.model.loading import load_tokenizer, tokenizer_hash

    alone = load_tokenizer(smollm2)
    assert vocabulary.add_tokens(None, alone, TOKENS) == vocabulary.add_tokens(tiny, own, TOKENS)
    assert tokenizer_hash(alone) == tokenizer_hash(own)
    added = set(own.get_vocab()) - set(load_tokenizer(smollm2).get_vocab())
    assert sorted(added, key=own.get_vocab().get) == ["Brahmaputra", "kilohertz", "<|sql|>"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [("the", "token of this tokenizer already"), (["a b "], "white space"), (["x" * 101], "longer than 100")],
)
def test_what_cannot_become_a_token_is_refused(own, tokens, message):
    before = len(own)
    with pytest.raises(TunebookError, match=message):
        vocabulary.add_tokens(None, own, tokens)
    assert len(own) == before and vocabulary.add_tokens(None, own, " , ") == []


# ---------------------------------------------------------------- through training, adapter, merge and GGUF


@pytest.mark.parametrize("whole", [False, True], ids=["rows alone", "whole embedding saved"])
def test_added_tokens_survive_adapter_merge_and_gguf(tiny_llama, own, tiny, tmp_path, whole):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from helpers.gguf import convert
    from helpers.gguf.llama_cpp import LlamaCpp
    from helpers.model import merging
    from helpers.model.loading import load_tokenizer

    ids = vocabulary.add_tokens(tiny, own, TOKENS)
    start = tiny.get_input_embeddings().weight.detach()[ids].clone()
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        trainable_token_indices=ids,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(tiny_llama),
    )
    model = get_peft_model(tiny, config)
    tokens = torch.tensor([own("Brahmaputra <|sql|> SELECT kilohertz", add_special_tokens=False)["input_ids"]])
    assert set(ids) <= set(tokens[0].tolist())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter, save_embedding_layers=whole)
    own.save_pretrained(adapter)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits[0]
        trained = model.get_input_embeddings()(torch.tensor(ids))
    assert (trained - start).abs().max() > 1e-3, "the new rows are trained"

    reloaded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert vocabulary.fit(reloaded, load_tokenizer(adapter)) and not vocabulary.fit(reloaded, load_tokenizer(adapter))
    with torch.no_grad():
        again = PeftModel.from_pretrained(reloaded, adapter)(input_ids=tokens).logits[0]
    assert (again - expected).abs().max() < 1e-4

    merged = merging.merge(tiny_llama, adapter, tmp_path / "merged").path
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        logits = plain(input_ids=tokens).logits[0]
    assert plain.get_input_embeddings().weight.shape[0] == len(own) == plain.config.vocab_size
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max(), "16-bit rounding and no more"

    if whole:
        return
    gguf = tmp_path / "model.gguf"
    convert.convert(merged, gguf, "f16")
    with LlamaCpp(gguf, parallel=1) as runtime:
        assert runtime.tokenize("Brahmaputra <|sql|> SELECT kilohertz") == tokens[0].tolist()
        found = torch.cat([torch.tensor(piece) for piece in runtime.iter_logits(tokens[0].tolist())])
    assert found.shape == logits.shape and (found - logits).abs().max() < 0.02 * logits.abs().max()
