"""Layers with a sliding window see what plain transformers lets them see, in every layout trained or decoded."""

import copy

import pytest
import torch

from helpers.model import packed_attention
from helpers.train.rows import PairCollator, RowCollator, check_boundaries

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WINDOW = 8


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW, attn_implementation="eager"))


def gemma3():
    """Window, window, whole context: Gemma 3's alternation."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=kinds, attn_implementation="eager")
    )


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, attn_implementation="eager"
    )
    return Qwen2ForCausalLM(config)


@pytest.fixture(scope="module", params=[mistral, gemma3, qwen2], ids=lambda make: make.__name__)
def plain(request):
    """The model with transformers' own eager attention, in fp32."""
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture(scope="module")
def ours(plain):
    model = copy.deepcopy(plain)
    model.set_attn_implementation(packed_attention.register())
    return model


def tokens(count, seed):
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PREFIX = tokens(24, 0)  # three windows long
DOCUMENTS = [{"input_ids": PREFIX + tokens(n, n), "completion_mask": [0] * 24 + [1] * n} for n in (3, 21, 11)]


def alone(model, ids):
    """Logits of one document by itself, without padding."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def test_the_window_cuts_what_these_documents_see(plain):
    wide = copy.deepcopy(plain)
    for module in wide.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = None
    wide.config.sliding_window = 4096
    ids = DOCUMENTS[1]["input_ids"]
    assert (alone(wide, ids)[-1] - alone(plain, ids)[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("collator", [RowCollator(0, share=True), RowCollator(0)])
def test_every_document_of_a_row_has_the_logits_that_it_has_alone(plain, ours, collator):
    batch = collator([DOCUMENTS])
    assert bool(batch.get("prefix_length")) == getattr(collator, "share", False)
    known = {k: v for k, v in batch.items() if k not in ("labels", "loss_positions", "row_ids", "tokens")}
    with torch.no_grad():
        logits = ours(**known, use_cache=False).logits[0]
        start = batch.get("prefix_length", 0)
        for number, document in enumerate(DOCUMENTS):
            own = document["input_ids"][start:]
            at = sum(batch["document_lengths"][: number + bool(start)])
            expected = alone(plain, document["input_ids"])[start:]
            assert torch.allclose(logits[at : at + len(own)], expected, atol=1e-5)


def test_pairs_that_share_their_prompt_have_the_loss_of_separate_rows(plain, ours):
    pairs = [{"prompt_ids": PREFIX, "chosen_ids": tokens(19, 5), "rejected_ids": tokens(13, 6)}]
    batch = PairCollator(0, share=True)([pairs])
    assert batch["prefix_length"]
    known = ("labels", "completion_mask", "pair_count", "loss_positions", "nll_tokens", "row_ids", "tokens")
    logits = ours(**{k: v for k, v in batch.items() if k not in known}, use_cache=False).logits[0]
    start = batch["prefix_length"]
    for at, answer in ((start, "chosen_ids"), (sum(batch["document_lengths"][:2]), "rejected_ids")):
        expected = alone(plain, PREFIX + pairs[0][answer])[start:]
        assert torch.allclose(logits[at : at + len(expected)], expected, atol=1e-5)


def test_the_gradient_through_a_shared_prefix_is_that_of_separate_rows(plain, ours):
    gradients = []
    for model in (plain, ours):
        model.zero_grad()
        if model is plain:
            losses = [
                torch.nn.functional.cross_entropy(
                    alone(plain, d["input_ids"])[23:-1], torch.tensor(d["input_ids"][24:]), reduction="sum"
                )
                for d in DOCUMENTS
            ]
            sum(losses).backward()
        else:
            batch = RowCollator(0, share=True)([DOCUMENTS])
            labels = batch.pop("labels")[0]
            positions = batch.pop("loss_positions")
            for name in ("row_ids", "tokens"):
                batch.pop(name)
            logits = ours(**batch, use_cache=False).logits[0]
            torch.nn.functional.cross_entropy(logits[positions], labels[positions + 1], reduction="sum").backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_a_row_that_is_neither_packed_nor_padded_keeps_its_window(plain, ours):
    with torch.no_grad():
        assert torch.allclose(
            alone(ours, DOCUMENTS[1]["input_ids"]), alone(plain, DOCUMENTS[1]["input_ids"]), atol=1e-5
        )
    check_boundaries(ours)


def test_decoding_behind_a_cached_prefix_keeps_the_window(plain):
    """Prompts of several lengths, padded, then eight tokens more: every logit is that of the whole text read alone."""
    from helpers.evaluate import prefix_cache

    model = copy.deepcopy(plain)
    assert prefix_cache.supports(model)
    texts = [PREFIX + tokens(n + 8, n) for n in (3, 21, 11)]
    widths = [len(t) - 32 for t in texts]
    ids = torch.tensor([t[24 : 24 + n] + [0] * (21 - n) for t, n in zip(texts, widths, strict=True)])
    mask = torch.tensor([[1] * n + [0] * (21 - n) for n in widths])
    found = [[], [], []]
    with torch.no_grad(), prefix_cache.decoding(model) as state:
        model(input_ids=torch.tensor([PREFIX]), use_cache=False)
        state.begin(mask, 8)
        logits = model(input_ids=ids, position_ids=24 + torch.arange(21).expand(3, -1), use_cache=False).logits
        for row, n in enumerate(widths):
            found[row].append(logits[row, :n])
        state.used = 21
        rows = [0, 1, 2]
        for step in range(8):
            if step == 4:  # the first row is finished; another moves into its place
                rows = [rows[place] for place in state.keep([1, 2])]
            at = torch.tensor([[24 + widths[row] + step] for row in rows])
            new = torch.tensor([[texts[row][24 + widths[row] + step]] for row in rows])
            logits = model(input_ids=new, position_ids=at, use_cache=False).logits
            for place, row in enumerate(rows):
                found[row].append(logits[place])
            state.used += 1
    for text, parts in zip(texts, found, strict=True):
        seen = torch.cat(parts)
        assert torch.allclose(seen, alone(plain, text)[24 : 24 + len(seen)], atol=1e-5)
