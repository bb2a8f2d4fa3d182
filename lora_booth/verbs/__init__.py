"""One file for each thing a user asks for. Neither terminals nor pages."""
