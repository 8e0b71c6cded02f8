"""`python -m llama_fast` is `llama-fast`."""

from llama_fast.cli import main

if __name__ == "__main__":
    main()
