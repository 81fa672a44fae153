"""A whole recipe, and its form as TOML."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

import tomli_w

from vitfold.errors import RecipeError, nearest
from vitfold.recipe.merging import MergeRecipe, check_r
from vitfold.recipe.pruning import PruneRecipe
from vitfold.recipe.quantization import QuantRecipe
from vitfold.recipe.registers import RegistersRecipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Every lossy choice, resolved for one architecture; `quant` is None where everything stays float.

    `prune` is None where every unit stays, `registers` where nothing is done about sink tokens.
    """

    merge: MergeRecipe = field(default_factory=lambda: MergeRecipe(r=()))
    quant: QuantRecipe | None = None
    registers: RegistersRecipe | None = None
    prune: PruneRecipe | None = None

    def __post_init__(self) -> None:
        if self.registers is not None and self.quant is None:
            raise RecipeError("registers help quantization and cost something without it; add --quant w8a8")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON and TOML values."""
        values = asdict(replace(self, registers=None, prune=None))
        del values["registers"], values["prune"]
        if self.prune is not None:
            values["prune"] = self.prune.to_dict()
        if self.registers is not None:
            values["registers"] = self.registers.to_dict()
        values["merge"]["r"] = list(self.merge.r)
        if self.merge.order is None:
            del values["merge"]["order"]
        if self.merge.rule == "tome":
            del values["merge"]["rule"]
        if not self.merge.compensate:
            del values["merge"]["compensate"]
        if self.quant is None:
            del values["quant"]
        else:
            values["quant"]["sites"] = dict(self.quant.sites)
            if not any(self.merge.r):
                del values["quant"]["calibrate_merged"]
            if not self.quant.polish_minutes:
                del values["quant"]["polish_minutes"]
            for name in ("attention", "outputs"):
                if values["quant"][name] is None:
                    del values["quant"][name]
        return values

    def to_toml(self) -> str:
        """Return the TOML text that `parse_recipe` reads back."""
        return tomli_w.dumps(self.to_dict())

    def digest(self) -> str:
        """Return the sha256 of the canonical form, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def is_lossless(self) -> bool:
        """True if the recipe leaves the function unchanged."""
        return self.quant is None and self.prune is None and not any(self.merge.r)


_SECTIONS: dict[str, Any] = {
    "merge": MergeRecipe,
    "quant": QuantRecipe,
    "registers": RegistersRecipe,
    "prune": PruneRecipe,
}


def parse_recipe(text: str, *, name: str) -> dict[str, Any]:
    """Parse TOML and check every key; values may still be unresolved (merge.r = "8:-1").

    Raises:
        RecipeError: on TOML that does not parse and on a key that no recipe has, naming the nearest.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name} is not valid TOML: {error}; see recipes/ for examples") from None
    check_keys(values, name=name)
    return values


def check_keys(values: Mapping[str, Any], *, name: str) -> None:
    """Check the sections of a recipe and the keys within them against the dataclasses."""
    sections = {section: {f.name for f in fields(kind)} for section, kind in _SECTIONS.items()}
    for section, content in values.items():
        if section not in sections:
            raise RecipeError(f"{name}: unknown section [{section}]; {nearest(section, sections)}")
        if not isinstance(content, Mapping):
            raise RecipeError(f"{name}: {section} must be a section, written as [{section}]")
        for key in content:
            if key not in sections[section]:
                raise RecipeError(f"{name}: unknown key {section}.{key}; {nearest(key, sections[section])}")


def recipe_from_dict(values: Mapping[str, Any], *, name: str) -> Recipe:
    """Rebuild a resolved recipe from `Recipe.to_dict`."""
    check_keys(values, name=name)
    merged = check_merge(values.get("merge", {}), name=name)
    quant = None if "quant" not in values else check_quant(values["quant"], name=name)
    registers = check_registers(values.get("registers"), name=name)
    return Recipe(merge=merged, quant=quant, registers=registers, prune=check_prune(values.get("prune"), name=name))


def check_merge(values: Mapping[str, Any], *, name: str) -> MergeRecipe:
    """Return the section [merge] as a value.

    Raises:
        RecipeError: naming the file and the key.
    """
    r = values.get("r", ())
    check_r(r, name=f"{name}: merge.r")
    for key in ("prop_attn", "compensate"):
        if not isinstance(values.get(key, False), bool):
            raise RecipeError(f"{name}: merge.{key} must be true or false, found {values[key]!r}")
    return _section(MergeRecipe, {**values, "r": tuple(r)}, name)


def check_quant(values: Mapping[str, Any], *, name: str) -> QuantRecipe:
    """Return the section [quant] as a value.

    Raises:
        RecipeError: naming the file and the key.
    """
    return _section(QuantRecipe, values, name)


def check_registers(values: Mapping[str, Any] | None, *, name: str) -> RegistersRecipe | None:
    """Return the section [registers] as a value, None where there is none.

    Raises:
        RecipeError: naming the file and the key.
    """
    return _optional(RegistersRecipe, values, name)


def check_prune(values: Mapping[str, Any] | None, *, name: str) -> PruneRecipe | None:
    """Return the section [prune] as a value, None where there is none.

    Raises:
        RecipeError: naming the file and the key.
    """
    return _optional(PruneRecipe, values, name)


def _optional(kind: Callable[..., T], values: Mapping[str, Any] | None, name: str) -> T | None:
    """Make a section that a recipe may lack; lists of TOML and JSON are tuples in it."""
    if values is None:
        return None
    return _section(kind, {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}, name)


def _section(kind: Callable[..., T], values: Mapping[str, Any], name: str) -> T:
    """Make a section of its values; what is wrong with them is said of the file."""
    try:
        return kind(**values)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from None
