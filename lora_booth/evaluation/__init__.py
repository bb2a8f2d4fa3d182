"""What an adapter does to pictures: likeness, prompts, what was forgotten. No training."""
