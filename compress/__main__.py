"""`python -m compress` is the `pocketclip` command."""

from compress.cli import main

main()
