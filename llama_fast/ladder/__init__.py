"""The top floor: the command line, the benchmark and its pictures. It alone may import the oracle."""
