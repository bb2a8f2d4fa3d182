"""Bases and their architectures: found, loaded, drawn with. No training."""
