"""Small random models of many architectures, of width 256 as K-quants need, with tokenizers of known kinds."""

from pathlib import Path

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make(architecture: str, folder: Path, tokenizer) -> Path:
    """A model of `architecture` (a key of `kinds`) with random weights in `folder`."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    size = SIZE | {"vocab_size": len(tokenizer)}
    kinds = {
        "llama": (t.LlamaConfig, {}),
        "qwen2": (t.Qwen2Config, {}),
        "qwen3": (t.Qwen3Config, {"head_dim": 64}),
        "mistral": (t.MistralConfig, {"head_dim": 64, "sliding_window": None}),
        "gemma2": (t.Gemma2Config, {"head_dim": 64, "query_pre_attn_scalar": 64}),
        "phi3": (t.Phi3Config, {}),
    }
    config, more = kinds[architecture]
    model = t.AutoModelForCausalLM.from_config(config(**size, **more)).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(3.0)  # sharper predictions than a fresh initialisation's, so that a divergence shows
            elif "bias" in name:
                weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if architecture == "phi3" and not hasattr(
        tokenizer, "spm_file"
    ):  # as Phi-4's: the class decides which vocabulary is read
        import json

        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    if hasattr(tokenizer, "spm_file"):
        (folder / "tokenizer.model").write_bytes(Path(tokenizer.spm_file).read_bytes())
    return folder


def random_adapter(base: Path, folder: Path, ids: list[int], **settings):
    """A LoRA adapter with random weights on `base` in `folder`; returns its log-probabilities after each of `ids`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora).eval()
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.requires_grad and p.dim() > 1):
            weight.add_(torch.randn_like(weight) * 0.05)
        model.save_pretrained(folder)
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def sentencepiece_tokenizer(
    folder: Path, texts: list[str], special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"), prefix: bool = False
):
    """A byte-fallback SentencePiece tokenizer trained on `texts`, as Gemma's and Phi-3's are, with its fast form.

    prefix: a text begins with a space that nobody wrote, as Llama 2's and Mistral's do.
    """
    import io

    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        control_symbols=list(special),
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        minloglevel=2,
        hard_vocab_limit=False,
        num_threads=1,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {sp.id_to_piece(i): i for i in range(len(sp))}
    rank = {piece: i for piece, i in vocab.items() if not (sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i))}
    merges = sorted(
        (
            (i, piece[:k], piece[k:])
            for piece, i in rank.items()
            for k in range(1, len(piece))
            if piece[:k] in rank and piece[k:] in rank
        ),
        key=lambda m: m[0],
    )
    backend = Tokenizer(
        BPE(vocab, [(a, b) for _, a, b in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    written = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*written, decoders.Strip(" ", 1, 0)] if prefix else written)
    backend.add_special_tokens(
        [AddedToken(s, special=True, normalized=False) for s in ("<pad>", "</s>", "<s>", "<unk>", *special)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=special[1] if special else "</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    made.chat_template = CHAT
    made.spm_file = str(path)
    return made
