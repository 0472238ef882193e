"""From a trained model to a GGUF file that is proven to behave like it: merge, convert, quantise, run, compare."""
