"""The specification: what a Llama is. Plain, eager, short, and slow on purpose; it imports nothing of ours.

Read config.py, then checkpoint.py, model.py and generate.py.
"""
