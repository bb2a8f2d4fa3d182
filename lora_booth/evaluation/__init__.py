"""How alike pictures are, and how sure one may be of it. Knows pictures and numbers, not how anything was trained."""
