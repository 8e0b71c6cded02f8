"""Grammars: what a text must be. `asked.py` is what a caller says, `guided.py` what the package llguidance makes of it."""

from llama_fast.grammars.asked import Choice, Grammar, JsonSchema, Lark, Regex

__all__ = ["Choice", "Grammar", "JsonSchema", "Lark", "Regex"]
