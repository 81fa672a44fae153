"""The sites of a program that can be quantized, and what surrounds each: questions to the program.

Sites are named in `quantizer`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vitfold.architectures.programs import plain_program
from vitfold.model import Architecture
from vitfold.program import Node, Program, Ref
from vitfold.program.queries import (
    attention_before,
    attentions_of,
    depending_on,
    linears_of,
    makers,
    norm_before,
    readers,
)
from vitfold.transforms.sinks import PREFIX_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite:
    """A linear layer whose input and weight can be rounded.

    `block` and `role` say where in the program it stands. `norm` is the LayerNorm that feeds it and nothing else,
    `activation` the function whose output it takes. Where its input is an average of values, `attention` is what
    averages them, and `values` the layer whose last third of outputs they are; `direct` says that the other two thirds
    are its queries and keys, as they are and for nothing else. `groups` are the kinds of outputs that
    it has: queries, keys and values. `wide` says whether it makes more channels than it reads. `apart` names the input
    of those tokens which have a range of their own there.
    """

    layer: str
    block: int | None = None
    role: str | None = None
    norm: str | None = None
    activation: str | None = None
    attention: str | None = None
    values: str | None = None
    direct: bool = False
    groups: int = 1
    wide: bool = False
    apart: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Its sites: input and weight, and the input of tokens apart."""
        names = (f"{self.layer}.x", f"{self.layer}.w")
        return names if self.apart is None else (*names, f"{self.apart}.x")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSite:
    """An attention whose operands can be rounded."""

    site: str
    block: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Its four sites."""
        return tuple(f"{self.site}.{operand}" for operand in ("q", "k", "v", "softmax"))


Sites = tuple[tuple[LinearSite, ...], tuple[AttentionSite, ...]]


@functools.lru_cache(maxsize=64)
def find_sites(spec: Architecture) -> Sites:
    """Return the quantizable layers and attentions of a Vision Transformer in execution order."""
    linears, attentions = sites_of(plain_program(spec))
    split = spec.sinks.layers if spec.sinks is not None and spec.sinks.split_prefix else ()
    linears = tuple(replace(s, apart=f"{s.layer}.{PREFIX_ROWS}") if s.layer in split else s for s in linears)
    return linears, attentions


def apart_layers(spec: Architecture) -> tuple[str, ...]:
    """Return the layers of blocks in which tokens can go apart: not those that see averages, which have no outliers."""
    return tuple(site.layer for site in find_sites(spec)[0] if site.block is not None and site.attention is None)


def sites_of(program: Program) -> Sites:
    """Return the quantizable layers and attentions of a program in execution order.

    The patch embedding stays float (its input is the image, and it is under 1 % of the work), and so does what does not
    depend on an input, as the query of attention pooling.
    """
    made_by = makers(program)
    varying = depending_on(program, map(Ref, range(len(program.inputs))))
    linears = tuple(
        _linear(program, made_by, node) for node in linears_of(program) if varying.intersection(node.reads())
    )
    attentions = tuple(AttentionSite(site=node.site, block=node.block) for node in attentions_of(program))
    return linears, attentions


def _linear(program: Program, made_by: Mapping[Ref, Node], node: Node) -> LinearSite:
    norm, before = norm_before(program, node), made_by.get(node.source)
    averaging = attention_before(made_by, node)
    read = program.shapes[node.source][-1]
    values = None if averaging is None else _values_of(made_by, averaging)
    return LinearSite(
        layer=node.site,
        block=node.block,
        role=node.role,
        norm=None if norm is None else norm.site,
        activation=before.attributes["kind"] if before is not None and before.op == "activation" else None,
        attention=None if averaging is None or values is None else averaging.site,
        values=values,
        direct=averaging is not None and values is not None and _direct(program, made_by, averaging),
        groups=node.attributes.get("parts", 1),
        wide=sum(shape[1] * shape[3] if node.op == "heads" else shape[-1] for shape in node.shapes) > read,
    )


def _values_of(made_by: Mapping[Ref, Node], attention: Node) -> str | None:
    """The layer that makes queries, keys and values in this order."""
    ref = attention.operand("v")
    maker = made_by.get(ref)
    if maker is None or maker.op != "heads" or maker.attributes["parts"] != 3 or maker.outputs[2] != ref:
        return None
    return maker.site


def _direct(program: Program, made_by: Mapping[Ref, Node], attention: Node) -> bool:
    """Say whether queries and keys are the first two thirds of what makes the values, and go nowhere else."""
    maker, read_by = made_by[attention.operand("v")], readers(program)
    pairs = zip(("q", "k"), maker.outputs, strict=False)
    return all(attention.operand(name) == ref and read_by[ref] == (attention,) for name, ref in pairs)
