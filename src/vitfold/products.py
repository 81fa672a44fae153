"""Which forms of integer products a graph asks of its runtime.

What of a target and a recipe decides them. Whether a runtime computes a form exactly on some processor is measured
by `engines.exactness`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitfold.recipe import FLOAT, QuantRecipe, bits_from_scheme
from vitfold.target import ENGINES


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """An integer product as it stands in a graph.

    `form` is the target's `quantized_product`. `left` and `right` are the types of the codes, `right_bits` how many
    bits those of the right operand fill, 7 or 8; `constant` says whether the right operand is a weight.
    """

    form: str
    left: str
    right: str
    right_bits: int
    constant: bool

    @property
    def name(self) -> str:
        """A name for files and messages: form, types, bits, and whether the right operand is a weight."""
        return f"{self.form}-{self.left}-{self.right}-{self.right_bits}-{'weight' if self.constant else 'computed'}"

    @property
    def saturates_in_16_bits(self) -> bool:
        """True if pairs of products exceed int16 where a processor adds them there: x86 without VNNI or AMX.

        Of Q/DQ pairs, ONNX Runtime makes signed inputs unsigned there, and both operands where both are computed.
        """
        if self.right != "int8" or self.right_bits < 8:
            return False
        return self.constant if self.form == "qdq" else self.left == "uint8"

    def __str__(self) -> str:
        what = "weights" if self.constant else "computed operands"
        return f"{self.left} x {self.right} with {self.right_bits}-bit {what}"


def products_of(target: Mapping[str, Any], *, weight_bits: int, attention: bool) -> tuple[Product, ...]:
    """Return the products of a quantized graph for this target (`Target.to_dict`).

    `weight_bits` are those of the widest quantized weight, `attention` says whether the products within attention run
    in integers. 8-bit floats and simulations have none.
    """
    left = str(target["activation_type"])
    if not ENGINES[target["engine"]].executes or left not in ("uint8", "int8"):
        return ()
    form, most = str(target["quantized_product"]), int(target["weight_bits"])
    bits = 8 if min(weight_bits, most) > 7 else 7
    products = [Product(form=form, left=left, right="int8", right_bits=bits, constant=True)]
    if attention:
        products.append(Product(form=form, left=left, right=computed_type(target), right_bits=8, constant=False))
    return tuple(products)


def computed_type(target: Mapping[str, Any]) -> str:
    """Return the type of keys' and values' codes: unsigned where 8 signed bits saturate, which is slower but exact."""
    return "uint8" if int(target["weight_bits"]) < 8 else "int8"


def products_of_recipe(target: Mapping[str, Any], quant: QuantRecipe | None) -> tuple[Product, ...]:
    """Return the products of a graph that was made for this target with this quantization."""
    if quant is None:
        return ()
    sites = [bits_from_scheme(scheme)[0] for scheme in quant.sites.values() if scheme != FLOAT]
    return products_of(target, weight_bits=max(quant.weights, quant.head_bits, *sites), attention=bool(quant.attention))
