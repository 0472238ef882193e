"""Data preparation: sources → formats → cleaning → mixing → split → chat template → parquet, with nothing lost uncounted."""
