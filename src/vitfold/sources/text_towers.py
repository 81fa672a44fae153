"""Text embeddings of class names, by the text tower beside an image tower; computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vitfold.artifacts.cache import keep_arrays, key_of, read_arrays
from vitfold.errors import SourceError, missing_extra
from vitfold.sources.failures import load_error
from vitfold.storage.digest import file_sha256

ZOOS = ("open_clip", "hf")
TEMPLATE = "a photo of a {}."
BATCH = 64
Encode = Callable[[list[str]], Any]


def text_embeds(source: str, names: Sequence[str], templates: Sequence[str] = (TEMPLATE,)) -> Float[np.ndarray, "C D"]:
    """Return one unit vector per class name: the mean over templates of unit text features, normalized again.

    Equation: t_c = n(mean_i n(T(template_i(name_c)))) with n(x) = x / |x|.

    Args:
        source: open_clip:ARCH/TAG, open_clip:local-dir:FOLDER, hf:REPO or hf:FOLDER.

    Raises:
        SourceError: if the tower cannot be loaded, or a template has no place for the name.

    Source: CLIP (2103.00020), section 3.1.4.
    """
    for template in templates:
        if "{}" not in template:
            raise SourceError(f"the template {template!r} has no {{}} where the class name goes")
    zoo, _, name = source.partition(":")
    if zoo not in ZOOS or not name:
        raise SourceError(
            f"no text tower {source!r}; give open_clip:ARCH/TAG, hf:REPO_OR_FOLDER, or a .npy or .safetensors file of "
            "text embeddings"
        )
    key = key_of(source, list(names), list(templates), _folder_digest(name))
    kept = read_arrays("texts", key)
    if kept is not None and "embeds" in kept:
        return kept["embeds"]
    embeds = _ensemble(_open_clip(name) if zoo == "open_clip" else _transformers(name), names, templates)
    keep_arrays("texts", key, {"embeds": embeds})
    return embeds


def _folder_digest(name: str) -> list[str]:
    """What a local tower holds: a name says nothing about the files in a folder."""
    folder = Path(name.removeprefix("local-dir:"))
    return [file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()] if folder.is_dir() else []


def _ensemble(encode: Encode, names: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "C D"]:
    import torch

    total = None
    with torch.inference_mode():
        for template in templates:
            prompts = [template.replace("{}", name) for name in names]
            parts = [encode(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
            rows = torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1)
            total = rows if total is None else total + rows
    assert total is not None
    embeds: Float[np.ndarray, "C D"] = torch.nn.functional.normalize(total, dim=-1).numpy()
    return np.array(embeds)


def _open_clip(name: str) -> Encode:
    try:
        import open_clip
    except ModuleNotFoundError:
        raise SourceError(missing_extra("open_clip_torch", "open_clip", "its text tower")) from None
    arch, tag = (name, "") if ":" in name else (name.partition("/")[0], name.partition("/")[2])
    if not tag and ":" not in name:
        raise SourceError(f"open_clip:{name} names no weights; give open_clip:{name}/TAG, as the image tower has it")
    try:
        model = open_clip.create_model(arch, pretrained=tag or None).eval()
        tokenizer = open_clip.get_tokenizer(arch)
    except Exception as error:  # the hub's clients raise a dozen unrelated types
        raise load_error(f"open_clip:{name}", error) from error
    return lambda prompts: model.encode_text(tokenizer(prompts))


def _transformers(name: str) -> Encode:
    try:
        import transformers
    except ModuleNotFoundError:
        raise SourceError(missing_extra("transformers", "transformers", "its text tower")) from None
    try:
        model: Any = transformers.AutoModel.from_pretrained(name).eval()
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub's clients raise a dozen unrelated types
        raise load_error(f"hf:{name}", error, folder=_folder(name)) from error
    if not hasattr(model, "get_text_features"):
        raise SourceError(f"hf:{name} ({type(model).__name__}) has no text tower; give the whole CLIP or SigLIP model")
    length = model.config.text_config.max_position_embeddings

    def encode(prompts: list[str]) -> Any:
        # SigLIP was trained on texts padded to the full length; CLIP reads up to its end token and ignores the rest.
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        known = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
        if model.config.model_type.startswith("siglip"):
            known.pop("attention_mask", None)
        found = model.get_text_features(**known)
        return getattr(found, "pooler_output", found)

    return encode


def _folder(name: str) -> Path | None:
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None
