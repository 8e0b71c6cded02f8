"""Speculation: proposals, their verification, and how many to make."""
