"""Programs as values: what a model computes, as nodes that can be read, compared, saved, changed and run."""

from vitfold.program.program import Literal, Node, Operand, Program, Ref, program_from_dict
from vitfold.program.trace import VOCABULARY, replay, trace

__all__ = [
    "VOCABULARY",
    "Literal",
    "Node",
    "Observe",
    "Operand",
    "Program",
    "Ref",
    "program_from_dict",
    "replay",
    "trace",
]
