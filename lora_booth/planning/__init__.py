"""What a run will take in memory and time, and what is chosen so that it fits. No users."""
