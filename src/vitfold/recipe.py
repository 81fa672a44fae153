"""What was asked of the optimizer, fully resolved, and its TOML form."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, get_args

import tomli_w

from vitfold.errors import RecipeError, nearest
from vitfold.model import Architecture, block_layers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


T = TypeVar("T")
Order = Literal["index", "score"]
Format = Literal["integer", "float8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRule:
    """What a merging rule asks of a model and promises: whether it needs a class token, and whether it conserves.

    A rule conserves if the sizes of the rows that it leaves sum up to the number of original tokens.
    """

    class_token: bool = False
    conserves: bool = True


RULES: Mapping[str, MergeRule] = {
    "tome": MergeRule(),
    "nearest": MergeRule(),
    "greedy": MergeRule(),
    "tofu": MergeRule(conserves=False),
    "pitome": MergeRule(),
    "evit": MergeRule(class_token=True),
}
"""Merging rules by name; `transforms.rules` has the function of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRecipe:
    """Tokens removed in each block, `r[l]` for block l, and whether attention counts merged tokens.

    `order` says in which order the rows of A that stay go on: as they stood ("index"), or by their similarity
    ("score"), which spares compilers that sort by kernels two of them. It decides who is matched with whom in the
    next merge. None: as the target prefers it; resolved recipes name one. `rule` says which tokens go, and what
    becomes of them. `compensate` says whether weights are refitted to what merging changes, on images.

    Source: ToMe (2210.09461), sections 3.1 and 3.2; its released code orders by index where a model has a class
    token, else by score.
    """

    r: tuple[int, ...]
    prop_attn: bool = True
    order: Order | None = None
    rule: str = "tome"
    compensate: bool = False

    def __post_init__(self) -> None:
        _check_r(self.r, name="merge.r")
        if self.rule not in RULES:
            raise RecipeError(f"merge.rule is {', '.join(RULES)}, found {self.rule!r}")
        if self.order not in (None, *get_args(Order)):
            raise RecipeError(f"merge.order is index or score, found {self.order!r}")


FLOAT = "float"
_BITS = range(2, 9)
WIDE = "w8a16"
WIDE_BITS = 16
"""Of activations of the few layers that 8 bits hurt most: two integer products instead of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantRecipe:
    """Bits of weights and activations, by which method, and what stays float.

    `attention` says whether the operands of the attention products are rounded too (None: as the target
    gains from it; resolved recipes say true or false); `sites` overrides single
    sites, glob -> "w8a8" or "float", the last match wins; `calibration_size` images are drawn with `seed`.
    `head_bits` is the least that the classifier gets, as every published table does it. `format` says what
    the bits are: integers, or 8-bit floats (E4M3). `outputs` says whether the products of qkv and fc1 are rounded
    too, before their scale and bias (None: as the target gains from it). `calibrate_merged` says whether ranges and
    rounding are found on the model that merges, or on the one that does not. `polish_minutes` is how long weights,
    scales, biases and norms are trained behind all that, on the same images and without labels.
    """

    weights: int = 8
    activations: int = 8
    method: str = "vitfold"
    attention: bool | None = None
    calibration_size: int = 128
    seed: int = 0
    head_bits: int = 8
    format: Format = "integer"
    outputs: bool | None = None
    calibrate_merged: bool = False
    polish_minutes: float = 0.0
    sites: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "head_bits"):
            value = getattr(self, name)
            wide = name == "activations" and value == WIDE_BITS
            if type(value) is not int or not (value in _BITS or wide):
                more = f", or {WIDE_BITS}" if name == "activations" else ""
                raise RecipeError(f"quant.{name} must be {_BITS.start} to {_BITS.stop - 1} bits{more}, found {value!r}")
        if type(self.calibration_size) is not int or self.calibration_size < 1:
            raise RecipeError(f"quant.calibration_size must be at least 1, found {self.calibration_size!r}")
        if type(self.seed) is not int:
            raise RecipeError(f"quant.seed must be an integer, found {self.seed!r}")
        if self.format not in get_args(Format):
            raise RecipeError(f"quant.format is integer or float8, found {self.format!r}")
        if self.format == "float8" and (self.weights, self.activations) != (8, 8):
            raise RecipeError("quant.format float8 has 8 bits for weights and activations; leave both out")
        if self.outputs not in (None, True, False):
            raise RecipeError("quant.outputs is true or false")
        if not isinstance(self.calibrate_merged, bool):
            raise RecipeError("quant.calibrate_merged is true or false")
        self._check_polish()
        if self.attention not in (None, True, False) or not isinstance(self.method, str):
            raise RecipeError("quant.attention is true or false, quant.method a name")
        if not isinstance(self.sites, Mapping):
            raise RecipeError('quant.sites is a section of globs, as in "blocks.0.*" = "float"')
        for glob, scheme in self.sites.items():
            if scheme != FLOAT:
                bits_from_scheme(scheme, name=f"quant.sites.{glob!r}")

    def _check_polish(self) -> None:
        minutes = self.polish_minutes
        if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 <= minutes < math.inf:
            raise RecipeError(f"quant.polish_minutes is a number of minutes, 0 for none, found {minutes!r}")
        if minutes and self.format == "float8":
            raise RecipeError(
                "quant.polish_minutes trains weights on grids of integers, and fp8 has none; leave it out, or give "
                "--quant w8a8"
            )
        object.__setattr__(self, "polish_minutes", float(minutes))

    def bits(self, site: str, *, weight: bool) -> int | None:
        """Return the bits of a site's weight or activation, None where it stays float."""
        found: int | None = self.weights if weight else self.activations
        if site in ("head", "head_dist"):
            found = max(self.head_bits, found or 0)
        for glob, scheme in self.sites.items():
            if fnmatchcase(site, glob):
                found = None if scheme == FLOAT else bits_from_scheme(scheme, name=glob)[0 if weight else 1]
        return found

    @property
    def executable(self) -> bool:
        """True if integer kernels of 8 bits execute every activation; weights of fewer bits are stored in 8."""
        return self._activation_bits <= {8, WIDE_BITS}

    @property
    def wide(self) -> bool:
        """True if some activations have 16 bits: each of their products takes two of 8 bits."""
        return WIDE_BITS in self._activation_bits

    @property
    def _activation_bits(self) -> set[int]:
        return {self.activations, *(bits_from_scheme(s)[1] for s in self.sites.values() if s != FLOAT)}

    @property
    def scheme(self) -> str:
        """The usual short form, as W8A8 or FP8."""
        if self.format == "float8":
            return "FP8"
        return f"W{self.weights}A{self.activations}"


def quant_from_scheme(scheme: str) -> QuantRecipe | None:
    """Return what `--quant` names: "w8a8" and its like, "fp8", or "none".

    Raises:
        RecipeError: naming the usual ones.
    """
    if scheme == "none":
        return None
    if scheme.lower() == "fp8":
        return QuantRecipe(format="float8")
    weights, activations = bits_from_scheme(scheme)
    return QuantRecipe(weights=weights, activations=activations)


def bits_from_scheme(scheme: str, *, name: str = "--quant") -> tuple[int, int]:
    """Return (weight bits, activation bits) of "w8a8" and its like.

    Raises:
        RecipeError: naming the usual ones.
    """
    found = re.fullmatch(r"w(\d+)a(\d+)", scheme.lower()) if isinstance(scheme, str) else None
    if found is None or int(found[1]) not in _BITS or int(found[2]) not in (*_BITS, WIDE_BITS):
        raise RecipeError(
            f"{name} cannot be {scheme!r}; give w8a8, w6a6, w4a8, w4a4 or the like, with 2 to 8 bits, w8a16, or fp8"
        )
    return int(found[1]), int(found[2])


Remedy = Literal["auto", "prefix", "delete", "regcache", "leave-out", "float-sinks", "split-scales", "neurons"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistersRecipe:
    """What is done about sink tokens before quantization.

    `remedy` names a row of `registers.REMEDIES`, "auto" whichever measures best. `site` is the layer that outliers cost
    most; its largest tokens are the candidates, None: found by measurement, with everything else that the remedy
    needs. The cached row is the mean of `average` candidates from the rank `token` on, stands in the blocks from
    `start` on and counts `tau` times; `deletions` tokens are dropped in front of `block`, or at the input of the layer
    `deletion_site` where that is given. `sinks` tokens per image are left out of statistics, or stay float in `layers`;
    `neurons` hidden units move to a register.

    Source: RegCache (2510.04547), section 4.
    """

    remedy: Remedy = "auto"
    site: str | None = None
    start: int = 0
    token: int = 0
    average: int = 1
    tau: float = 1.0
    block: int = 0
    deletions: int = 0
    sinks: int = 0
    layers: tuple[str, ...] = ()
    neurons: int = 0
    deletion_site: str | None = None

    def __post_init__(self) -> None:
        if self.remedy not in get_args(Remedy):
            raise RecipeError(
                f"registers.remedy cannot be {self.remedy!r}; {nearest(str(self.remedy), get_args(Remedy))}"
            )
        for name, least in (("start", 0), ("token", 0), ("average", 1), ("block", 0), ("deletions", 0), ("sinks", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise RecipeError(f"registers.{name} must be an integer of at least {least}, found {value!r}")
        if type(self.neurons) is not int or self.neurons < 0:
            raise RecipeError(f"registers.neurons must be an integer of at least 0, found {self.neurons!r}")
        if self.deletion_site is not None and not (isinstance(self.deletion_site, str) and self.deletions):
            raise RecipeError(
                f"registers.deletion_site is the layer at whose input registers.deletions tokens go, found "
                f"{self.deletion_site!r} and {self.deletions} deletions"
            )
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not 0 < self.tau < math.inf:
            raise RecipeError(f"registers.tau must be a positive number, found {self.tau!r}")
        if not isinstance(self.layers, tuple) or not all(isinstance(layer, str) for layer in self.layers):
            raise RecipeError('registers.layers is a list of layers, as ["blocks.6.mlp.fc2"]')
        if self.site is not None and (self.remedy == "auto" or not isinstance(self.site, str)):
            raise RecipeError("registers.site is a layer, and needs a registers.remedy other than auto")
        object.__setattr__(self, "tau", float(self.tau))

    @property
    def resolved(self) -> bool:
        """True if nothing is left to be found by measurement."""
        return self.site is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON and TOML values, without those at their defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default or f.name == "remedy"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


WIDTH_STEP = 32
"""Kernels work on so many columns at once; a narrower MLP is a multiple of it."""
HEAD_STEP = 8
"""The same of the width of a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneRecipe:
    """What of the blocks goes: a share `mlp` of the hidden units of every MLP, or what does not stay.

    `units` are the hidden units of each block that stay, `heads` the heads of its attention, `head_dims` how wide its
    heads stay: queries, keys and values alike. Nothing of that kind goes where a list is empty.
    """

    mlp: float = 0.0
    units: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.mlp, bool) or not isinstance(self.mlp, int | float) or not 0 <= self.mlp < 1:
            raise RecipeError(f"prune.mlp is the share of the units to go, above 0 and below 1, found {self.mlp!r}")
        object.__setattr__(self, "mlp", float(self.mlp))
        for name in ("units", "heads", "head_dims"):
            own = getattr(self, name)
            if not isinstance(own, list | tuple) or not all(type(one) is int and one > 0 for one in own):
                raise RecipeError(f"prune.{name} are {name} of each block that stay, at least 1, found {own!r}")
            object.__setattr__(self, name, tuple(own))
        if bool(self.mlp) == bool(self.units or self.heads or self.head_dims):
            raise RecipeError(
                "[prune] names either mlp, a share such as 0.25, or units, heads and head_dims of each block"
            )

    def units_of(self, block: int, hidden: int) -> int:
        """Return how many of a block's `hidden` units stay; by a share a multiple of 32, where there are more.

        Raises:
            RecipeError: if the recipe keeps more than there are, or is for another number of blocks.
        """
        if not self.mlp:
            return _staying("units", self.units, block, hidden)
        wanted = hidden * (1 - self.mlp)
        return min(hidden, max(WIDTH_STEP, round(wanted / WIDTH_STEP) * WIDTH_STEP))

    def heads_of(self, block: int, heads: int) -> int:
        """Return how many of a block's heads stay.

        Raises:
            RecipeError: if the recipe keeps more than there are, or is for another number of blocks.
        """
        return _staying("heads", self.heads, block, heads)

    def head_dim_of(self, block: int, head_dim: int) -> int:
        """Return how wide a block's heads stay.

        Raises:
            RecipeError: if the recipe makes them wider, or is for another number of blocks.
        """
        return _staying("head_dims", self.head_dims, block, head_dim)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON and TOML values, without what goes nowhere."""
        values = {
            "mlp": self.mlp,
            "units": list(self.units),
            "heads": list(self.heads),
            "head_dims": list(self.head_dims),
        }
        return {name: value for name, value in values.items() if value}


def _staying(name: str, kept: tuple[int, ...], block: int, there: int) -> int:
    if not kept:
        return there
    if block >= len(kept) or kept[block] > there:
        found = f"{len(kept)} blocks" if block >= len(kept) else f"{kept[block]}"
        raise RecipeError(f"prune.{name} names {found}, and block {block} of this model has {there}")
    return kept[block]


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
    """Check the sections of a recipe and the keys within them against the dataclasses above."""
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
    _check_r(r, name=f"{name}: merge.r")
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
    if values is None:
        return None
    return _section(RegistersRecipe, {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}, name)


def check_prune(values: Mapping[str, Any] | None, *, name: str) -> PruneRecipe | None:
    """Return the section [prune] as a value, None where there is none.

    Raises:
        RecipeError: naming the file and the key.
    """
    if values is None:
        return None
    return _section(PruneRecipe, {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}, name)


def _section(kind: Callable[..., T], values: Mapping[str, Any], name: str) -> T:
    """Make a section of its values; what is wrong with them is said of the file."""
    try:
        return kind(**values)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from None


def _check_r(r: object, *, name: str) -> None:
    if isinstance(r, (list, tuple)) and all(type(n) is int and n >= 0 for n in r):
        return
    found = list(r) if isinstance(r, tuple) else r
    raise RecipeError(f"{name} must be a list of integers of at least 0, one per block, found {found!r}")


def largest_r(tokens: int, prefix: int) -> int:
    """Return the most tokens that one merge can remove: floor((N - P) / 2)."""
    return max(0, (tokens - prefix) // 2)


def tokens_per_block(spec: Architecture, r: tuple[int, ...]) -> tuple[int, ...]:
    """Return the tokens that enter each block and, last, those that leave the last: L + 1 numbers.

    Equation: N_{l+1} = N_l - r_l - d_{l+1}, with the d_l sink tokens that are deleted in front of block l.

    Raises:
        RecipeError: if a block cannot remove as many tokens, naming it and the largest allowed r; if no token is left
            beside those apart.
    """
    if len(r) not in (0, spec.num_layers):
        raise RecipeError(f"merge.r has {len(r)} entries, the model has {spec.num_layers} blocks; give one per block")
    if spec.unmergeable:
        if any(r):
            raise RecipeError(f"tokens of this model cannot merge: {spec.unmergeable}; leave --merge out")
        return (spec.tokens,) * (spec.num_layers + 1)
    deleted = [0 if spec.sinks is None else spec.sinks.deleted(block) for block in range(spec.num_layers + 1)]
    counts = [spec.tokens - deleted[0]]
    for block, removed in enumerate(r or (0,) * spec.num_layers):
        allowed = largest_r(counts[-1], spec.fixed)
        if removed > allowed:
            raise RecipeError(
                f"r = {removed} is too large for block {block}: {counts[-1]} tokens enter it, {spec.fixed} of them "
                f"protected, so at most {allowed} can be merged; lower r there"
            )
        counts.append(counts[-1] - removed - deleted[block + 1])
        if counts[-1] < spec.fixed + 1:
            raise RecipeError(
                f"{deleted[block + 1]} deletions in front of block {block + 1} leave no patch; merge or delete fewer"
            )
    if spec.sinks is not None and spec.sinks.apart:
        apart, owners = spec.sinks.apart, block_layers(spec)
        for layer in spec.sinks.layers:
            left = counts[owners[layer] + 1]
            if apart >= left:
                raise RecipeError(
                    f"{apart} sinks apart at {layer} leave nothing to quantize of {left} tokens; give fewer"
                )
    return tuple(counts)
