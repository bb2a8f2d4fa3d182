"""Low-rank adapters: put into modules, taken out as numbers, combined, written. No training."""
