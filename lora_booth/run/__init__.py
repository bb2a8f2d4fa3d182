"""What makes a run survive: atomic files, its folder, checkpoints, the cache, signals, who listens. No models."""
