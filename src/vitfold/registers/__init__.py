"""Remedies against sink tokens: found on images, measured against each other, folded into a model. Needs torch."""

from vitfold.registers.curate import Candidates, curate
from vitfold.registers.fold import fold_registers
from vitfold.registers.norms import Norms, measure_norms
from vitfold.registers.remedies import REMEDIES, RemedyKind
from vitfold.registers.search import RemedyResult, RemedySearchResult, measure_remedies

__all__ = [
    "REMEDIES",
    "Candidates",
    "Norms",
    "RemedyKind",
    "RemedyResult",
    "RemedySearchResult",
    "curate",
    "fold_registers",
    "measure_norms",
    "measure_remedies",
]
