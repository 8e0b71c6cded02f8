"""Tokenizers and conversations, from the files that stand beside the weights."""
