"""Transforms of programs: each takes a program and returns one; it knows operations and roles, no model family."""

from vitfold.transforms.dead import without_dead_nodes
from vitfold.transforms.rows import without_dead_rows

__all__ = ["without_dead_nodes", "without_dead_rows"]
