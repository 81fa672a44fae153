"""Bundles made ready for servers that other people run: one module each."""
