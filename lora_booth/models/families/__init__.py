"""Architectures as modules: one file for each family, above one shared contract. No training."""
