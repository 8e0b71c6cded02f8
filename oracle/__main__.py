"""`python -m oracle`: the command line of `llama-oracle`."""

from oracle.cli import main

main()
