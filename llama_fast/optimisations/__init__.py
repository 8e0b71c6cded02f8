"""The leaves: one idea, one file. None imports another; deleting one breaks no other."""
