"""Data preparation: sources, formats, cleaning, mixing, split, chat template, parquet; nothing is lost uncounted."""
