"""`python -m trailmed`."""

from .cli import main

main()
