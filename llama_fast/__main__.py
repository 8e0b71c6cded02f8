"""`python -m llama_fast`, and `torchrun -m llama_fast` for a rank: the command line."""

from llama_fast.ladder.cli import main

if __name__ == "__main__":
    main()
