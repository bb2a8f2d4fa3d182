"""What each program that loads adapters makes of a file. Nothing here reads or writes an adapter."""
