"""What an adapter does, measured on pictures: likeness, prompts, forgetting. Knows nothing of how it was trained."""
