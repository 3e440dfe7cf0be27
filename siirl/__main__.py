"""``python -m siirl`` is the command ``siirl``."""

from siirl.cli.main import main

main()
