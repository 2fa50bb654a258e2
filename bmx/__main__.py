"""``python -m bmx``."""

from bmx.cli.commands import main

main()
