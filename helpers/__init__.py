"""Tunebook's helpers: what the five notebooks call. Importing this package loads no heavy library."""
