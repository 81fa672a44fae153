"""Slow NumPy oracles, written from the papers' mathematics and not from vitfold's code."""
