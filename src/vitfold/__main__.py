"""`python -m vitfold`."""

from vitfold.cli import main

main()
