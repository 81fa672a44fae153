"""A bundle as a model in a repository of Triton Inference Server.

Which backend serves which target, and that a server never sees half a model. The texts are in `triton_templates`.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from vitfold.artifacts.bundle import MODEL, Bundle
from vitfold.engines import DEFAULT, ENGINES, MAIN, Port, open_graph, usable_cores
from vitfold.engines.graphs import check_graph
from vitfold.engines.trtexec import DEFAULT_BATCH, trtexec_command
from vitfold.errors import BundleError, EngineError, TargetError
from vitfold.serve.triton_templates import LABELS, WRITTEN, Served, client_text, config_text, readme_text
from vitfold.storage.ordinary import read_text
from vitfold.storage.placing import reserve

CONFIG, README, CLIENT = "config.pbtxt", "README.md", "client.py"
VERSION = "1"
_MOST = 4096
_TYPE = "TYPE_FP32"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonModel:
    """What was written: the model's folder, and the line that builds its engine where one has to be built."""

    path: Path
    name: str
    backend: str
    trtexec: str | None


def export_triton(
    bundle: Bundle,
    repository: str | Path,
    *,
    name: str | None = None,
    instances: int = 1,
    threads: int | None = None,
    max_batch: int | None = None,
    overwrite: bool = False,
) -> TritonModel:
    """Write a bundle as REPOSITORY/NAME; other models of the repository are left alone.

    Bundles for TensorRT are served by its backend, whose engine is built on the machine that serves; all others by ONNX
    Runtime on the CPU. `max_batch` is the bundle's own largest batch, or 64, unless it is given.

    Several instances on a CPU divide `threads` among them: by default this machine's usable cores.

    Raises:
        TargetError: for a simulated bundle, which no engine runs.
        BundleError: if the name does not suit Triton, or the model cannot be written or may not be replaced.
        EngineError: if ONNX Runtime does not read the graph, or threads or instances are no number for a machine.
    """
    if bundle.manifest.simulated:
        raise TargetError(
            f"{bundle.path} is simulated: no engine runs it, so no server does; make one with --quant w8a8, or without "
            "--quant"
        )
    chosen = _name(bundle.name, name)
    destination = Path(repository).absolute() / chosen
    with reserve(destination, overwrite=overwrite, standing=standing_model) as place:
        served = _served(bundle, chosen, instances, threads, max_batch)
        try:
            _write(bundle, served, place.draft())
        except OSError as error:
            raise BundleError(
                f"cannot write {destination}: {error}; free some space or choose another folder"
            ) from None
        destination = place.publish(place.draft())
    return TritonModel(path=destination, name=chosen, backend=served.backend, trtexec=served.trtexec)


def _name(bundle_name: str, wanted: str | None) -> str:
    if wanted is None:
        return re.sub(r"[^A-Za-z0-9._-]+", "_", bundle_name).lstrip("._-") or "vit"
    if not _NAME.fullmatch(wanted):
        raise BundleError(
            f"{wanted!r} does not suit a model of Triton; use letters, digits, and . _ - behind the first of them"
        )
    return wanted


def _served(bundle: Bundle, name: str, instances: int, threads: int | None, max_batch: int | None) -> Served:
    for count, what in ((instances, "instances"), (threads, "threads"), (max_batch, "max_batch")):
        if count is not None and (type(count) is not int or not 1 <= count <= _MOST):
            raise EngineError(f"{what} has to be a whole number of 1 to {_MOST}, found {count!r}")
    manifest = bundle.manifest
    on_gpu = ENGINES[manifest.target["engine"]].gpu
    own = manifest.target.get("batch") or DEFAULT_BATCH
    largest = max_batch or own[2]
    optimum = min(own[1], largest)
    check_graph(bundle.onnx_path)
    with open_graph(bundle.onnx_path, DEFAULT, threads=1, literal=True) as session:
        ((given,), (returned,)) = session.parts[MAIN].inputs, session.parts[MAIN].outputs
    height, width = manifest.spec.image_size
    line = trtexec_command(MODEL, (1, optimum, largest), image_size=(height, width), input_name=given.name)
    return Served(
        name=name,
        backend="tensorrt" if on_gpu else "onnxruntime",
        platform="tensorrt_plan" if on_gpu else "onnxruntime_onnx",
        input_name=given.name,
        input_type=_TYPE,
        input_shape=_shape(bundle, given),
        output_name=returned.name,
        output_type=_TYPE,
        output_shape=_shape(bundle, returned),
        labelled=manifest.labels is not None,
        optimum=optimum,
        max_batch=largest,
        instances=instances,
        threads=None if threads is None and instances == 1 else max(1, (threads or usable_cores()) // instances),
        on_gpu=on_gpu,
        preprocess=manifest.preprocess,
        classifies=manifest.spec.head in ("single_label", "multi_label"),
        trtexec=line if on_gpu else None,
    )


def _shape(bundle: Bundle, port: Port) -> tuple[int, ...]:
    """Return the shape of one image's tensor."""
    if min(port.shape, default=1) < 1:
        shape = (port.batch, *port.shape)
        raise BundleError(f"{bundle.path}: {port.name} has the shape {shape}; only its first axis may be symbolic")
    return port.shape


def standing_model(folder: Path) -> set[str]:
    """Return what `export_triton` wrote of a model's folder; version folders that it did not write are the user's.

    Raises:
        BundleError: if it wrote nothing there.
    """
    try:
        ours = WRITTEN in read_text(folder / README)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours or not (folder / CONFIG).is_file():
        raise BundleError(
            f"{folder} exists and is no model that vitfold exported; choose another --name, it is left untouched"
        )
    return {CONFIG, README, CLIENT, LABELS, VERSION}


def _write(bundle: Bundle, served: Served, folder: Path) -> None:
    version = folder / VERSION
    version.mkdir(parents=True)
    for source in sorted(bundle.path.glob(f"{MODEL}*")):
        shutil.copyfile(source, version / source.name)
    texts = {CONFIG: config_text(served), README: readme_text(served), CLIENT: client_text(served)}
    if bundle.manifest.labels is not None:
        texts[LABELS] = "".join(" ".join(label.split()) + "\n" for label in bundle.manifest.labels)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
