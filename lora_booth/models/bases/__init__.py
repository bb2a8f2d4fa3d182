"""What a base is: its source, its identity, its limits, the names of its tensors. No torch."""
