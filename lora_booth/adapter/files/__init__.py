"""Adapter files, read without trust: keys, kinds, formats. No modules of torch."""
