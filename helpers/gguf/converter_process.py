"""Body of the converter's process: `python converter_process.py FOLDER MODEL [--plan] ARGUMENTS…`.

The packaged converter is newer than the `gguf` that it brings: a file with one class of an architecture that this
`gguf` does not know does not load, and with it go DeepSeek, GLM-4 or Mistral 3. Names that are missing are lent, so
that the others load; a class that needs a lent architecture is refused by name. --plan, with --vocab-only: also take
every tensor of the model through the class, without its data.
"""

import enum
import runpy
import sys
from pathlib import Path
from typing import Any

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


def main() -> None:
    folder, model = sys.argv[1:3]
    sys.path[0] = folder
    enum.EnumMeta.__getattr__ = lend  # type: ignore[attr-defined]
    import conversion
    from safetensors import safe_open

    own, plan, names = conversion.get_model_class, "--plan" in sys.argv, set()
    for file in Path(model).glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            names.update(opened.keys())

    def model_class(name: str, mmproj: bool = False) -> Any:
        found = own(name, mmproj)
        write_vocab = found.write_vocab
        if found.model_arch in lent.values():
            sys.exit(f"Architecture {name} is not supported by the converter's gguf")
        if hasattr(found, "opt_num_mtp_layers"):  # Qwen3-Next and 3.5: not every copy has the prediction heads
            found.no_mtp = not any("mtp." in name for name in names)

        def write_and_plan(self: Any) -> None:
            write_vocab(self)
            again = found(self.dir_model, self.ftype, self.fname_out, dry_run=True)
            again.prepare_tensors()
            again.prepare_metadata(vocab_only=False)

        found.write_vocab = write_and_plan if plan else write_vocab
        return found

    conversion.get_model_class = model_class
    sys.argv[:2] = [str(Path(folder) / "convert_hf_to_gguf.py")]
    sys.argv[:] = [argument for argument in sys.argv if argument != "--plan"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
