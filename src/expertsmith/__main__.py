"""`python -m expertsmith`."""

from expertsmith.cli import main

main()
