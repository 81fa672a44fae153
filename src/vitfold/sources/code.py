"""A module that somebody's own code builds, or that torch.export saved."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitfold.errors import SourceError


def build_from_code(path: Path, name: str) -> nn.Module:
    """Run a Python file and call its function `name`, which returns a module.

    Raises:
        SourceError: if there is no such file or function, it fails, or returns something else.
    """
    if not path.is_file():
        raise SourceError(f"no file {path}; check the path")
    spec = importlib.util.spec_from_file_location(f"vitfold_source_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} is no Python file; give FILE.py:FUNCTION")
    code = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(code)
        make: Any = getattr(code, name, None)
        if not callable(make):
            raise SourceError(f"{path} has no function {name!r}; give FILE.py:FUNCTION, which returns the module")
        made = make()
    except SourceError:
        raise
    except Exception as error:  # whatever a stranger's code raises
        raise SourceError(f"{path}:{name} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    if not isinstance(made, nn.Module):
        raise SourceError(f"{path}:{name} returned {type(made).__name__}, not a torch.nn.Module")
    return made


def load_exported(path: Path) -> nn.Module:
    """Load what `torch.export.save` wrote.

    Raises:
        SourceError: if it is none, or of another version of torch.
    """
    if not path.is_file():
        raise SourceError(f"no file {path}; check the path")
    try:
        found = torch.export.load(path).module()
    except Exception as error:  # its errors share no class of their own
        raise SourceError(
            f"{path} is no program of torch.export that torch {torch.__version__} reads ({error}); save it anew with "
            "torch.export.save, or export the model with torch.onnx.export"
        ) from None
    made: nn.Module = found
    return made
