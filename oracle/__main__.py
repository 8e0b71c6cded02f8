"""`python -m oracle` is `llama-oracle`."""

from oracle.cli import main

if __name__ == "__main__":
    main()
