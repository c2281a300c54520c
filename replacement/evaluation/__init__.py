"""How good dictionaries are: what they rebuild, what a model loses by them, and what their features know."""

from replacement.evaluation.reconstruction import (
    ErrorMeter,
    FiringMeter,
    LayerFigures,
    ReconstructionMeter,
    evaluate_reconstruction,
)
from replacement.evaluation.replacement import ReplacementFigures, ReplacementMeter, evaluate_replacement

__all__ = [
    "ErrorMeter",
    "FiringMeter",
    "LayerFigures",
    "ReconstructionMeter",
    "ReplacementFigures",
    "ReplacementMeter",
    "evaluate_reconstruction",
    "evaluate_replacement",
]
