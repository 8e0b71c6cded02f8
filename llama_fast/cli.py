"""The command line as a module: `python -m llama_fast.cli`, `torchrun -m llama_fast.cli`."""

from llama_fast.ladder.cli import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
