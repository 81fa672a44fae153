"""Write the graphs that show whether integer products saturate: src/vitfold/engines/probes/*.onnx.

Run it after a new form of product: python examples/write_probes.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from vitfold.engines.exactness import COLUMNS, IMAGE, INNER, probe_path, right_codes
from vitfold.products import Product

FORMS = ("matmul_integer_to_float", "qdq", "integer")
PRODUCTS = tuple(
    Product(form=form, left=left, right=right, right_bits=bits, constant=constant)
    for form in FORMS
    for left, right, bits, constant in (
        ("uint8", "int8", 7, True),
        ("uint8", "int8", 8, True),
        ("int8", "int8", 7, True),
        ("int8", "int8", 8, True),
        ("uint8", "uint8", 8, False),
        ("uint8", "int8", 8, False),
        ("int8", "int8", 8, False),
    )
)


def probe(product: Product) -> ir.Model:
    """Return the graph of one form: quantize (scale 1), multiply, as floats."""
    tape = Tape()

    def constant(name: str, values: np.ndarray) -> ir.Value:
        return tape.initializer(ir.tensor(values, name=name))

    one, left = constant("one", np.float32(1)), np.dtype(product.left)
    image = ir.Value(name="image", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", *IMAGE]))
    x = tape.op("Reshape", [image, constant("shape", np.array([-1, INNER], np.int64))])
    zero = constant("left_zero", np.array(128 if product.left == "uint8" else 0, left))
    codes = tape.op("QuantizeLinear", [x, one, zero])
    right = np.dtype(product.right)
    right_zero = constant("right_zero", np.array(128 if product.right == "uint8" else 0, right))
    if product.constant:
        other = constant("weight", right_codes(product.right_bits).astype(np.int8))
    else:
        other = tape.op("QuantizeLinear", [tape.op("Transpose", [x], attributes={"perm": [1, 0]}), one, right_zero])
    if product.form == "qdq":
        operands = [
            tape.op("DequantizeLinear", [codes, one, zero]),
            tape.op("DequantizeLinear", [other, one, right_zero]),
        ]
        product_value = tape.op("MatMul", operands)
    elif product.form == "integer":
        summed = tape.op("MatMulInteger", [codes, other, zero, right_zero])
        product_value = tape.op("Cast", [summed], attributes={"to": int(ir.DataType.FLOAT)})
    else:
        inputs = [codes, other, one, one, zero, right_zero]
        product_value = tape.op("MatMulIntegerToFloat", inputs, domain="com.microsoft")
    product_value.name, product_value.type = "product", ir.TensorType(ir.DataType.FLOAT)
    product_value.shape = ir.Shape(["rows", COLUMNS if product.constant else "rows"])
    opsets = {"": 20, "com.microsoft": 1}
    graph = ir.Graph(
        [image], [product_value], nodes=tape.nodes, initializers=tape.initializers, opset_imports=opsets, name="probe"
    )
    return ir.Model(graph, ir_version=9)


def main() -> int:
    """Write all of them."""
    for product in PRODUCTS:
        path: Path = probe_path(product)
        path.parent.mkdir(exist_ok=True)
        ir.save(probe(product), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
