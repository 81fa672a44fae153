"""What a zoo's loader said when it failed, in words that name the cure.

A check of the connection helps with nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vitfold.errors import SourceError

# Classes of the clients (requests, httpx, urllib, huggingface_hub), by name: none of them is needed here.
_NETWORK = frozenset(
    {
        "ConnectError", "ConnectTimeout", "ConnectionError", "ConnectionResetError", "ConnectionRefusedError",
        "HTTPError", "HTTPStatusError", "HfHubHTTPError", "LocalEntryNotFoundError", "MaxRetryError", "NetworkError",
        "OfflineModeIsEnabled", "ProxyError", "ReadTimeout", "RemoteProtocolError", "SSLError", "Timeout",
        "TimeoutError", "URLError", "gaierror",
    }
)  # fmt: skip
_NETWORK_WORDS = (
    "couldn't connect",
    "could not connect",
    "offline mode",
    "max retries exceeded",
    "timed out",
    "cannot reach",
)
_ABSENT = frozenset({"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"})
_ABSENT_WORDS = ("is not a local folder and is not a valid model identifier", "repo id must")
_SHUT = frozenset({"GatedRepoError"})
_SHAPES = re.compile(r"size mismatch|mismatched sizes|ignore_mismatched_sizes|shape", re.IGNORECASE)
_WEIGHTS = (".safetensors", ".bin")


def load_error(source: str, error: Exception, *, folder: Path | None = None) -> SourceError:
    """Return the error for weights that a zoo could not load; `folder` is where they lie, if on this machine."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
    said = f"{type(error).__name__}: {reason}"
    if folder is not None:
        return SourceError(f"{source} cannot be loaded ({said}); {_cure_of_folder(folder, error)}")
    names = {type(one).__name__ for one in _chain(error)}
    words = str(error).lower()
    if names & _SHUT:
        return SourceError(
            f"the weights of {source} are given out after a login only ({said}); accept the terms on its page and run: "
            "hf auth login"
        )
    where = source.partition(":")[2]
    if where.startswith((".", "/", "~")):
        return SourceError(f"there is no folder {where}; check the path")
    if names & _ABSENT or any(part in words for part in _ABSENT_WORDS):
        return SourceError(f"there is no {source}, or it is private ({said}); check the name, or run: hf auth login")
    if names & _NETWORK or any(part in words for part in _NETWORK_WORDS):
        return SourceError(
            f"the weights of {source} could not be fetched ({said}); check the network, or pass a local file "
            "(FILE.safetensors with --arch, or hf:FOLDER), or use --weights random"
        )
    return SourceError(f"{source} cannot be loaded ({said}); {_cure(source, error)}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _cure(source: str, error: Exception) -> str:
    if _SHAPES.search(str(error)):
        return "its weights are not of the shapes that its configuration states; leave options away that change them"
    if "model_type" in str(error):
        name = source.partition(":")[2]
        return f"its config.json names no model_type of transformers; for a repository of timm write timm:hf_hub:{name}"
    return (
        "it holds nothing that this loader reads; give another name, pass a local file (FILE.safetensors with "
        "--arch, or hf:FOLDER), or use --weights random"
    )


def _cure_of_folder(folder: Path, error: Exception) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not any(name.endswith(_WEIGHTS) for name in names):
        graphs = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.onnx"))][:1]
        if graphs:
            return (
                f"it holds an ONNX graph ({graphs[0]}) and no weights that can be changed; give the folder or "
                "repository that the graph was exported from, with model.safetensors"
            )
        return "it holds no weights: put model.safetensors beside config.json, as save_pretrained writes them"
    if _SHAPES.search(str(error)):
        return (
            "the weights are not of the shapes that config.json states: it belongs to another model, or a size in it "
            "was changed; take config.json and model.safetensors from the same place"
        )
    if "config.json" not in names:
        return "it holds no config.json; copy the one of the model beside the weights"
    if "model_type" in str(error):
        return "its config.json names no model_type that transformers knows; take the one that save_pretrained wrote"
    return "config.json or the weights are damaged; fetch the folder again"
