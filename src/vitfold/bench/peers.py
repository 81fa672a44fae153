"""What a user would run instead: the original in torch, its plain ONNX export, and other tools' INT8 of that export."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num

from vitfold.bench.environment import installed_version
from vitfold.engines import DEFAULT, Session, engine_obstacle, open_graph
from vitfold.engines.exactness import is_exact
from vitfold.errors import EngineError, SourceError, missing_extra, nearest
from vitfold.images import ImageSet, batches
from vitfold.model import Preprocess
from vitfold.processor import processor
from vitfold.products import Product
from vitfold.storage.digest import file_sha256

PEERS: Mapping[str, str] = {
    "torch": "the original module in eager PyTorch",
    "torch-compile": "the original module through torch.compile",
    "torch-bf16": "the original module in bfloat16 in eager PyTorch, on processors that multiply it",
    "onnxruntime": "the original module through torch.onnx.export on ONNX Runtime",
    "onnxruntime-optimizer": "that export through onnxruntime.transformers.optimizer, on ONNX Runtime",
    "onnxruntime-int8": "that export quantized by onnxruntime.quantization, on ONNX Runtime",
    "openvino": "that export on OpenVINO, in float32",
    "openvino-bf16": "the same in bfloat16, OpenVINO's own choice on processors that multiply it",
    "nncf": "that export quantized by NNCF, on OpenVINO, floats in float32",
    "nncf-bf16": "the same with floats in bfloat16",
    "modelopt": "that export quantized to INT8 by NVIDIA ModelOpt for TensorRT: accuracy in ONNX Runtime, no time",
    "modelopt-fp8": "that export quantized to FP8 by NVIDIA ModelOpt for TensorRT: accuracy in ONNX Runtime, no time",
}
CALIBRATED = frozenset({"onnxruntime-int8", "nncf", "nncf-bf16", "modelopt", "modelopt-fp8"})
MODELOPT_PYTHON = "VITFOLD_MODELOPT_PYTHON"
_MODELOPT: Mapping[str, str] = {"modelopt": "int8", "modelopt-fp8": "fp8"}
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "torch": (),
    "torch-compile": (),
    "torch-bf16": (),
    "onnxruntime": ("onnxscript",),
    "onnxruntime-optimizer": ("onnxscript", "onnx"),
    "onnxruntime-int8": ("onnxscript", "onnx", "sympy"),
    "openvino": ("onnxscript", "openvino"),
    "openvino-bf16": ("onnxscript", "openvino"),
    "nncf": ("onnxscript", "openvino", "nncf"),
    "nncf-bf16": ("onnxscript", "openvino", "nncf"),
    "modelopt": ("onnxscript",),
    "modelopt-fp8": ("onnxscript",),
}
_BATCH = 8
_LARGE = 1_500_000_000
"""Bytes from which a graph's weights go into a file of their own: ONNX files end at 2 GiB."""
_NARROW = "-bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Images from which a peer takes the ranges of activations, preprocessed as the bundle's are."""

    images: ImageSet
    preprocess: Preprocess

    def pixels(self) -> Num[np.ndarray, "B ..."]:
        """Return all of them as one batch in memory.

        Raises:
            ImageError: at the first unreadable image.
        """
        return np.concatenate([one.pixel_values for one in batches(self.images, self.preprocess, batch=_BATCH)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A peer that is ready to run; `size_bytes` are those of its weights, or of its files where it has any.

    `untimed` says why its time means nothing here, None that it does.
    """

    session: Session
    size_bytes: int
    untimed: str | None = None


def check_peers(names: list[str], *, calibrated: bool = False) -> None:
    """Check names before anything slow starts; `calibrated` says that calibration images are at hand.

    Raises:
        EngineError: for a name that is not a peer, one whose package is missing, or one that lacks images.
    """
    for name in names:
        if name not in PEERS:
            raise EngineError(f"unknown peer {name!r}; {nearest(name, PEERS)}")
        if installed_version("torch") is None:
            raise EngineError(missing_extra("torch", "optimize", f"the peer {name}"))
        for package in _NEEDS[name]:
            if installed_version(package) is None:
                raise EngineError(missing_extra(package, "peers", f"the peer {name}"))
        if name in _MODELOPT:
            _modelopt_python(name)
        if name.endswith(_NARROW):
            _check_narrow(name)
        if name in CALIBRATED and not calibrated:
            raise EngineError(_without_images(name))


def _check_narrow(name: str) -> None:
    """Check that bfloat16 is what somebody would take here: that the processor multiplies it.

    Raises:
        EngineError: if it does not.
    """
    if not {"avx512_bf16", "amx_bf16"} & set(processor()["instruction_sets"]):
        raise EngineError(f"this processor has no products of bfloat16 for the peer {name}; leave it out of --peers")
    obstacle = None if name.startswith("torch") else engine_obstacle("openvino-bf16")
    if obstacle is not None:
        raise EngineError(f"the peer {name} does not start: {obstacle}")


def _without_images(name: str) -> str:
    return (
        f"the peer {name} takes the ranges of activations from images, and none were given; "
        "add --calibration-images DIR, about 128 images like those it will see"
    )


def load_original(origin: Mapping[str, Any], output: str) -> Any:
    """Load what a bundle was made from: a module that gives one tensor, or the path of an ONNX file.

    Args:
        output: the name of the bundle's first output.

    Raises:
        SourceError: if that cannot be loaded again, is another file by now, or gives another output first.
    """
    source = str(origin["source"])
    if source.endswith(".onnx"):
        return _same_file(Path(source), origin["arguments"], output)
    from vitfold.engines.torch import Original
    from vitfold.sources.origin import load_origin

    loaded = load_origin(origin)
    if loaded.original is None or loaded.first_output is None:
        raise SourceError(_other_output(source, output))
    return Original(loaded.original, loaded.first_output)


def _same_file(path: Path, arguments: Mapping[str, Any], output: str) -> Path:
    import onnx

    if not path.is_file():
        raise SourceError(f"{path}, which the bundle was made from, is gone; put it back to compare with it")
    if file_sha256(path) != arguments.get("sha256"):
        raise SourceError(f"{path} is not the file any more that the bundle was made from; make the bundle again")
    if onnx.load(str(path), load_external_data=False).graph.output[0].name != output:
        raise SourceError(_other_output(path, output))
    return path


def _other_output(source: object, output: str) -> str:
    return (
        f"peers give what {source} gives first, and this bundle gives {output}; make one without --outputs to compare "
        "with them"
    )


def open_peer(
    name: str,
    original: Any,
    shape: tuple[int, ...],
    folder: Path,
    *,
    threads: int | None = None,
    calibration: Calibration | None = None,
) -> Peer:
    """Set up a peer of what `load_original` returned for images of this shape (3, H, W).

    `folder` keeps the files of one module's peers meanwhile, its plain export among them, which they share.

    Raises:
        EngineError: for a name that is not a peer, one that lacks images, or one whose tool refuses the model.
        ImageError: if a calibration image cannot be read.
    """
    from vitfold.engines.torch import module_session

    if name not in PEERS:
        raise EngineError(f"unknown peer {name!r}; {nearest(name, PEERS)}")
    if name in ("torch", "torch-compile", "torch-bf16"):
        if isinstance(original, Path):
            able = ", ".join(one for one in PEERS if not one.startswith("torch"))
            raise EngineError(f"{original} is a graph, and no module for the peer {name}; its peers are {able}")
        compiled, narrow = name == "torch-compile", name == "torch-bf16"
        size = sum(p.numel() * (2 if narrow else p.element_size()) for p in original.parameters())
        session: Session = module_session(original, compiled=compiled, narrow=narrow, threads=threads)
        return Peer(session=session, size_bytes=size)
    if name in CALIBRATED and calibration is None:
        raise EngineError(_without_images(name))
    pixels = None if calibration is None or name not in CALIBRATED else calibration.pixels()
    with _at_work(name, folder):
        path = original if isinstance(original, Path) else _plain_export(original, shape, folder)
        if name == "onnxruntime-int8":
            path = _quantized_by_onnxruntime(path, pixels, folder / "onnxruntime-int8.onnx")
        elif name == "onnxruntime-optimizer":
            path = _optimized_by_onnxruntime(path, folder / "onnxruntime-optimizer.onnx")
        elif name in ("nncf", "nncf-bf16"):
            path = _quantized_by_nncf(path, pixels, folder / "nncf.xml")
    untimed = None
    if name in _MODELOPT:
        path, version = _quantized_by_modelopt(name, path, pixels, folder)
        untimed = f"nvidia-modelopt {version} wrote it for TensorRT; a time on ONNX Runtime says nothing about a GPU"
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))
    on_openvino = "openvino-bf16" if name.endswith(_NARROW) else "openvino"
    engine = DEFAULT if untimed is not None or name.startswith(DEFAULT) else on_openvino
    # Graphs that were written for TensorRT are run as they are: the optimizer has no kernels for their fusions.
    session = open_graph(path, engine, threads=threads, literal=untimed is not None)
    return Peer(session=session, size_bytes=size, untimed=untimed)


@contextlib.contextmanager
def _at_work(name: str, folder: Path) -> Iterator[None]:
    """Silence a foreign tool, keep its temporary files in `folder`, and say whose error it was.

    These tools print and log on stdout, which is for results.
    """
    quiet = io.StringIO()
    before = tempfile.tempdir, logging.root.manager.disable
    tempfile.tempdir = str(folder)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        raise EngineError(missing_extra(str(error.name), "peers", f"the peer {name}")) from None
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise EngineError(
            f"the peer {name} could not be made from this model: {type(error).__name__}: {said}; "
            "leave it out of --peers, or upgrade its packages (vitfold doctor lists them)"
        ) from error
    finally:
        tempfile.tempdir = before[0]
        logging.disable(before[1])


def _plain_export(module: Any, shape: tuple[int, ...], folder: Path) -> Path:
    import torch

    path = folder / "plain.onnx"
    if not path.exists():
        example, batch = torch.zeros((2, *shape)), torch.export.Dim("batch")
        shapes = ({0: batch},)
        torch.onnx.export(module, (example,), str(path), dynamo=True, dynamic_shapes=shapes, opset_version=20)
    return path


def _optimized_by_onnxruntime(plain: Path, path: Path) -> Path:
    """Write what `onnxruntime.transformers.optimizer` makes of a graph of a Vision Transformer.

    Of timm's models as `torch.onnx.export` writes them it fuses biases and sums into GELU and LayerNorm, and no
    attention.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    made = optimize_model(str(plain), model_type="vit")
    large = sum(file.stat().st_size for file in plain.parent.glob(f"{plain.stem}.*")) > _LARGE
    made.save_model_to_file(str(path), use_external_data_format=large)
    return path


def _saturates(engine: str) -> bool:
    """Return whether an engine computes Q/DQ products with weights of 8 bits wrongly on this processor."""
    return not is_exact(engine, Product(form="qdq", left="uint8", right="int8", right_bits=8, constant=True))


def _quantized_by_onnxruntime(plain: Path, pixels: Any, path: Path) -> Path:
    """Write the INT8 graph of `onnxruntime.quantization.quantize_static` after its own pre-processing.

    Weights are int8 per output channel, activations uint8 with the mean over batches of their extremes as range;
    products of two activations stay float, and so do the outputs of linear layers and the patch embedding.
    Tried on the bundled ViT-S/14 with 128 CIFAR-10 images, by top-1 over 1000 others (float: 0.891) and agreement
    with float: these settings 0.892 and 0.990; outputs quantized too 0.888 and 0.991, and slower; attention's products
    too 0.892 and 0.988; the patch embedding too 0.889 and 0.986; every operator (the tool's default) 0.875 and 0.966,
    and no faster beyond noise; extremes over all batches 0.889 and 0.985; percentiles (99.99) 0.882 and 0.977;
    entropy, with outputs and products, 0.883 and 0.986. Ranges by histogram also keep every activation in memory.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(str(plain), str(prepared))
    graph = onnx.load(str(prepared), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    products = [node.name for node in graph.node if node.op_type == "MatMul" and not weights & set(node.input)]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._groups = iter([pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH)])

        def get_next(self) -> dict[str, Num[np.ndarray, "B ..."]] | None:
            group = next(self._groups, None)
            return None if group is None else {graph.input[0].name: group}

    quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"],
        nodes_to_exclude=products,
        per_channel=True,
        reduce_range=_saturates("onnxruntime"),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"CalibMovingAverage": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )
    prepared.unlink()
    return path


def _quantized_by_nncf(plain: Path, pixels: Any, path: Path) -> Path:
    """Write the INT8 model of `nncf.quantize`, as OpenVINO's XML and a file of weights beside it.

    Tried like `_quantized_by_onnxruntime`: the preset MIXED with SmoothQuant, which the model type implies, 0.893 and
    0.987 (cosine 0.9994); without SmoothQuant 0.894 and 0.988 (cosine 0.9989); PERFORMANCE 0.893 and 0.992, and 4-13%
    slower; the slow bias correction 0.890 and 0.983, and four times as long. One that lies there already is taken.
    """
    if path.exists():
        return path
    from vitfold.engines.openvino import without_telemetry

    with without_telemetry():
        import nncf
        import openvino as ov

    # Half the range of weights, where the full one saturates: what its documentation says to do there.
    fix = nncf.OverflowFix.ENABLE if _saturates("openvino") else None
    model = nncf.quantize(
        ov.Core().read_model(str(plain)),
        nncf.Dataset([pixels[i : i + 1] for i in range(len(pixels))]),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(pixels),
        fast_bias_correction=True,
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
    )
    ov.save_model(model, str(path), compress_to_fp16=False)
    return path


def _modelopt_python(name: str) -> str:
    """Return the interpreter that has ModelOpt.

    Raises:
        EngineError: with the commands that install it, if there is none.
    """
    named = os.environ.get(MODELOPT_PYTHON)
    if named:
        found = shutil.which(str(Path(named).expanduser()))
        if found is None:
            raise EngineError(f"{MODELOPT_PYTHON} names {named}, which is no program; {_installs_modelopt()}")
        return found
    if installed_version("nvidia-modelopt") is None:
        raise EngineError(f"the peer {name} needs NVIDIA ModelOpt, which is not installed; {_installs_modelopt()}")
    return sys.executable


def _installs_modelopt() -> str:
    return (
        "its versions of ONNX packages conflict with vitfold's, so give it an environment of its own: "
        "python -m venv modelopt-env && modelopt-env/bin/pip install 'nvidia-modelopt[onnx]' && "
        f"export {MODELOPT_PYTHON}=$PWD/modelopt-env/bin/python"
    )


def _quantized_by_modelopt(name: str, plain: Path, pixels: Any, folder: Path) -> tuple[Path, str]:
    """Write the Q/DQ graph of `modelopt.onnx.quantization.quantize`, and say by which version of it.

    Its defaults: ranges by entropy, weights per output channel, products of attention quantized too where TensorRT
    fuses them, the rest in FP16; only batches are of eight images instead of one. Tried on the bundled ViT-S/14 with
    128 CIFAR-10 images, by SQNR over 150 others: 22.3 dB; batches of one, the default, 21.3, and with these attention's
    products left float 21.5, an export by TorchScript 21.6 and 24 kernels more. By top-1, agreement and SQNR over 500
    (float: 0.892), batches of one: 0.890, 0.964, 20.9 dB; the largest value as range ("max") 0.898, 0.962, 22.0; the
    rest in FP32 0.882, 0.958, 21.0; FP8 0.878, 0.978, 26.3; FP8 with "max" 0.882, 0.982, 26.2.

    Raises:
        EngineError: if it refuses the model, or is not there.
    """
    python = _modelopt_python(name)
    with tempfile.TemporaryDirectory(prefix="modelopt-", dir=folder) as scratch:
        # It changes the file that it is given and leaves others beside it.
        given, quantized, result = (Path(scratch) / file for file in (plain.name, f"{name}.onnx", "result.json"))
        for file in plain.parent.glob(f"{plain.name}*"):
            shutil.copyfile(file, given.with_name(file.name))
        np.save(Path(scratch) / "pixels.npy", pixels)
        order = {
            "plain": str(given.absolute()),
            "pixels": str(Path(scratch).absolute() / "pixels.npy"),
            "mode": _MODELOPT[name],
            "batch": _BATCH,
            "quantized": str(quantized.absolute()),
            "result": str(result.absolute()),
        }
        command = [python, str(Path(__file__).with_name("modelopt_runner.py")), json.dumps(order)]
        surroundings = {**os.environ, "TMPDIR": str(Path(scratch).absolute())}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings)
        if not result.exists() or not quantized.exists():
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            if said.startswith("ModuleNotFoundError"):
                raise EngineError(f"the peer {name} needs more than {python} has: {said}; {_installs_modelopt()}")
            raise EngineError(
                f"the peer {name} could not be made from this model: {said}; leave it out of --peers, or upgrade with: "
                f"{python} -m pip install -U 'nvidia-modelopt[onnx]'"
            )
        for file in Path(scratch).glob(f"{quantized.name}*"):
            shutil.move(file, folder / file.name)
        return folder / quantized.name, str(json.loads(result.read_text(encoding="utf-8"))["version"])
