"""``python -m bmx``."""

from bmx.cli import main

main()
