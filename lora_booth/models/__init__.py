"""Bases and their architectures: how they are found, loaded and drawn with, on which device. No training."""
