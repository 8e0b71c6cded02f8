"""Encodings fitted to a text: which rounding of a matrix changes its products least, on the inputs that it really gets."""
