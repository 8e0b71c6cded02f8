"""The model: one forward pass, and the arithmetic of a few rows."""
