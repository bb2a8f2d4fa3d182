"""The paper's ablations on the miniature: which part of the recipe brings what. `python -m benchmarks.ablations`."""
