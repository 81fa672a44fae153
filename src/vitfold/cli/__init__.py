"""The command line: arguments in, tables or JSON out. No work of its own."""

from vitfold.cli.app import main

__all__ = ["main"]
