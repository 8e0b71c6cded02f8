"""How keys and values are kept: one file a kind."""
