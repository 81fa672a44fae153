"""What a user can mend: one root error and its kinds.

Bugs are not here: they raise builtins.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VitfoldError(Exception):
    """Something that the user can mend; the message says what is wrong, what was found, what to do."""


class SourceError(VitfoldError):
    """A model could not be loaded, or has a feature that vitfold does not run."""


class UnsupportedError(SourceError):
    """A model is of a class, or has a feature, that no reader here knows."""


class ParityError(SourceError):
    """The loaded program does not compute what the original computes."""


class RecipeError(VitfoldError):
    """A recipe or schedule does not fit the model, or has an unknown key."""


class ProgramError(VitfoldError):
    """A program that cannot be read."""


class TargetError(VitfoldError):
    """A target is unknown, or cannot run what was asked of it."""


class CalibrationError(VitfoldError):
    """Calibration images or activations cannot be used, or a cache of theirs is stale."""


class BundleError(VitfoldError):
    """A bundle is missing, damaged, too new, or cannot be written."""


class ImageError(VitfoldError):
    """An image or a folder of images cannot be read."""


class ImageWarning(UserWarning):
    """An image can be read, but hardly means what it says."""


class EngineError(VitfoldError):
    """A runtime is missing or refused the graph."""


class CacheError(VitfoldError):
    """The cache cannot be used as the surroundings ask."""


class JournalError(VitfoldError):
    """Rows of an earlier run cannot be read or gone on with."""


class ReportError(VitfoldError):
    """Measurements cannot be read or shown."""


class ArgumentError(VitfoldError, ValueError):
    """A value handed to the Python interface is none of those that it takes."""


class GateError(VitfoldError):
    """A measured result misses the bound that the user set; the command line exits with 3."""


NEAR = 0.6
"""How alike two names have to be for one to be a slip for the other: 1 is equal."""
_BEGUN = 3
"""So many letters of the beginning of a name stand for it, too."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a phrase that offers the nearest known names, or lists them when none is really near."""
    names = sorted(known)
    if not names:
        return "there is none"
    written = {one.lower(): one for one in reversed(names)}
    close = difflib.get_close_matches(name.lower(), written, n=count, cutoff=NEAR)
    begun = [one for one in written if len(name) >= _BEGUN and one.startswith(name.lower())]
    close = close or begun[:count]
    if close:
        return "did you mean " + " or ".join(written[one] for one in close) + "?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"known: {shown}"


def check_whole(name: str, value: object, *, least: int) -> None:
    """Check that an argument is a whole number of at least `least`.

    Raises:
        ArgumentError: saying what was expected and what was found.
    """
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not whole or value < least:  # type: ignore[operator]
        raise ArgumentError(f"{name} must be a whole number of at least {least}, found {value!r}")


def missing_extra(package: str, extra: str, purpose: str) -> str:
    """Return the message for an optional dependency that is not installed."""
    return f"{purpose} needs the package {package}, which is not installed; run: pip install 'vitfold[{extra}]'"
