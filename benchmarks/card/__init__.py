"""The card kit: all that only a CUDA card can show, measured by one command within nine minutes."""
