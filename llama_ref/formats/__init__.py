"""Checkpoints in files: one reader a layout, and what they share."""
