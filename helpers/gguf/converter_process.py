"""Body of the converter's process: `python converter_process.py FOLDER MODEL [--plan] ARGUMENTS…`.

The packaged converter is newer than the `gguf` that it brings: a file with one class of an architecture that this
`gguf` does not know does not load, and with it go DeepSeek, GLM-4 or Mistral 3. Names that are missing are lent, so
that the others load; a class that needs a lent architecture is refused by name. --plan, with --vocab-only: also take
every tensor of the model through the class, without its data.
"""

import enum
import json
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

lent: dict[tuple[type, str], Any] = {}


def lend(kind: Any, name: str) -> Any:
    """A member of one of gguf's enumerations, whose value nothing knows."""
    if kind.__module__ != "gguf.constants" or not name.isupper():
        raise AttributeError(name)
    if (kind, name) not in lent:
        number = 10**6 + len(lent)
        member = lent[kind, name] = int.__new__(kind, number) if issubclass(kind, int) else object.__new__(kind)
        member._name_, member._value_ = name, number
    return lent[kind, name]


def reorder(weights: Any, n_head: int, n_head_kv: int | None, rotated: int) -> Any:
    """Rows (or numbers) of queries or keys, the two halves of each head's rotated part in turn."""
    heads = weights.reshape(n_head_kv or n_head, -1, *weights.shape[1:])
    first, rest = heads[:, :rotated], heads[:, rotated:]
    pairs = first.reshape(len(heads), 2, rotated // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(first.shape)
    return torch.cat([pairs, rest], dim=1).reshape(weights.shape)


def main() -> None:
    folder, model = sys.argv[1:3]
    settings = Path(model) / "config.json"
    config = json.loads(settings.read_text()) if settings.is_file() else {}
    sys.path[0] = folder
    enum.EnumMeta.__getattr__ = lend  # type: ignore[attr-defined]
    import conversion
    from safetensors import safe_open

    # The converter asks transformers for the settings, which leaves out those that it has other words for.
    base = sys.modules["conversion.base"].ModelBase
    load = base.load_hparams

    def load_settings(*arguments: Any, **named: Any) -> dict[str, Any]:
        found = load(*arguments, **named)
        if "text_config" in found and "text_config" in config:
            found["text_config"] = config["text_config"] | found["text_config"]
        return config | found

    base.load_hparams = staticmethod(load_settings)
    own, plan, names = conversion.get_model_class, "--plan" in sys.argv, set()
    for file in Path(model).glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            names.update(opened.keys())

    def model_class(name: str, mmproj: bool = False) -> Any:
        found = own(name, mmproj)
        write_vocab = found.write_vocab
        if found.model_arch in lent.values():
            sys.exit(f"Architecture {name} is not supported by the converter's gguf")
        if (
            name == "BambaForCausalLM" and "attn_rotary_emb" in config
        ):  # only a part of its heads is rotated, and the converter reorders all of it
            llama = sys.modules["conversion.llama"].LlamaModel
            llama.permute = staticmethod(partial(reorder, rotated=config["attn_rotary_emb"]))
        if hasattr(found, "opt_num_mtp_layers"):  # Qwen3-Next and 3.5: not every copy has the prediction heads
            found.no_mtp = not any("mtp." in name for name in names)

        def write_plan(self: Any) -> None:
            whole = found(self.dir_model, self.ftype, self.fname_out)
            whole.prepare_tensors()
            whole.prepare_metadata(vocab_only=False)
            writer = whole.gguf_writer
            writer.write_header_to_file(path=whole.fname_out)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            size = sum(
                writer.ggml_pad(t.nbytes, writer.data_alignment) for part in writer.tensors for t in part.values()
            )
            writer.fout[0].truncate(writer.ggml_pad(writer.fout[0].tell(), writer.data_alignment) + size)
            writer.close()

        found.write_vocab = write_plan if plan else write_vocab
        return found

    conversion.get_model_class = model_class
    sys.argv[:2] = [str(Path(folder) / "convert_hf_to_gguf.py")]
    sys.argv[:] = [argument for argument in sys.argv if argument != "--plan"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
