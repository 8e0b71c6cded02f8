"""How a model computes: one file a kind."""
