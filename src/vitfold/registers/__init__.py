"""Remedies against sink tokens: found on images, measured against each other, folded into a model. Needs torch."""

from vitfold.registers.curate import Candidates, curate
from vitfold.registers.fold import fold_registers
from vitfold.registers.likeness import Likeness, measure_likeness
from vitfold.registers.norms import Norms, measure_norms
from vitfold.registers.remedies import REMEDIES, RemedyKind
from vitfold.registers.search import RemedyResult, RemedySearchResult, explain, measure_remedies

__all__ = [
    "REMEDIES",
    "Candidates",
    "Likeness",
    "Norms",
    "RemedyKind",
    "RemedyResult",
    "RemedySearchResult",
    "curate",
    "explain",
    "fold_registers",
    "measure_likeness",
    "measure_norms",
    "measure_remedies",
]
