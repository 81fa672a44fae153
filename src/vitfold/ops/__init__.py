"""Primitive operations and their interpreters: run, emit, count."""
