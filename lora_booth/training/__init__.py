"""What is computed once before a run, and one step of it. Neither budgets nor users."""
