"""A run's folder as one page to send to a friend. It reads files alone; runs do without it."""
