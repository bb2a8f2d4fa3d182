"""Low-rank adapters: putting them into modules (PEFT) and taking them out as plain numbers."""
