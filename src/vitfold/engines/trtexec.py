"""The command that builds a TensorRT engine of a bundle's graph on the machine that will run it.

Source: trtexec of TensorRT 10 and 11 (samples/common/sampleOptions.cpp), `trtexec --help`.
"""

from __future__ import annotations

from vitfold.errors import TargetError

INPUT = "pixel_values"
DEFAULT_BATCH = (1, 8, 64)
_RANGE = ("min", "opt", "max")


def trtexec_command(
    onnx_name: str,
    batch: tuple[int, int, int] = DEFAULT_BATCH,
    *,
    image_size: tuple[int, int],
    plan_name: str = "model.plan",
    input_name: str = INPUT,
) -> str:
    """Return the line that builds an engine for batches from the first to the last of `batch`, best at the middle one.

    `image_size` is (height, width). The line holds for TensorRT 10 and 11: 10 takes types from the graph only when
    told so by --stronglyTyped, 11 always does and accepts the flag without effect. Behind the build it times the
    engine as one CUDA graph, without copies.

    Raises:
        TargetError: if the batches do not rise.
    """
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise TargetError(f"batches have to rise from 1: smallest, optimum, largest; found {batch}")
    height, width = image_size
    shapes = (
        f"--{which}Shapes={input_name}:{size}x3x{height}x{width}" for which, size in zip(_RANGE, batch, strict=True)
    )
    flags = ("--stronglyTyped", "--noTF32", *shapes, f"--saveEngine={plan_name}", "--useCudaGraph", "--noDataTransfers")
    return " ".join(("trtexec", f"--onnx={onnx_name}", *flags))
