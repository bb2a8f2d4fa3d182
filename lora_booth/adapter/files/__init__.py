"""Adapter files: their keys, kinds, headers and formats, read without trust. No modules of torch."""
