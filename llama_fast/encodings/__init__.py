"""How matrices are stored, and how a stored matrix multiplies: one file a kind."""
