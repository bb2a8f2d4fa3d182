"""What makes a run survive: files, checkpoints, cache, signals. No models."""
