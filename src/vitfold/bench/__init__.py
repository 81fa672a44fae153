"""Measuring: the one timing loop, fidelity, and the environment that both were taken in."""
