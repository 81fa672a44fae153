"""From a source string, or a torch module in memory, to a checked `Model`.

Torch and the zoos are imported on the first call, not with this module.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from vitfold.errors import ArgumentError, SourceError, UnsupportedError, missing_extra, nearest
from vitfold.model import Architecture, Model, Origin, Preprocess, ViTSpec
from vitfold.model.spec import Problem
from vitfold.sources import hub
from vitfold.sources.outputs import asked_of_program, parse_outputs, with_outputs
from vitfold.sources.sizes import pair, parse_size
from vitfold.storage.digest import file_sha256

_log = logging.getLogger("vitfold")

if TYPE_CHECKING:
    import torch

    from vitfold.sources.reader import Facts, Translation

Weights = Literal["pretrained", "random"]

# Prefix -> (package to import, vitfold extra that brings it, module here).
ZOOS = {
    "timm": ("timm", "optimize", "timm"),
    "hf": ("transformers", "transformers", "transformers"),
    "torchvision": ("torchvision", "torchvision", "torchvision"),
    "open_clip": ("open_clip", "open_clip", "open_clip"),
}
FORMS = (
    "timm:NAME, hf:REPO_OR_FOLDER, torchvision:NAME, open_clip:NAME/TAG, FILE.safetensors with --arch, FILE.onnx, "
    "FILE.py:FUNCTION, FILE.pt2, or demo"
)
_STEPS = "make it faster: vitfold diffusion optimize {0}, or draw with it: vitfold diffusion sample {0}"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model and what it was read from, if that is a module: eval mode, float32, on the CPU.

    `original` is that module; `first_output` maps images to its first output, as the model gives it, and is None where
    the model gives another one first.
    """

    model: Model
    original: torch.nn.Module | None
    first_output: Callable[[torch.Tensor], torch.Tensor] | None = None


def load_source(
    source: str,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    image_size: int | str | Sequence[int] | None = None,
    weights: Weights = "pretrained",
    seed: int = 0,
    problem: Problem | None = None,
    preprocess: str | None = None,
    outputs: str | Sequence[str] | None = None,
    part: str | None = None,
    graph: bool = True,
) -> Loaded:
    """Load a pretrained model and check that the program computes what the original computes.

    Args:
        source: timm:NAME, hf:REPO_OR_FOLDER, torchvision:NAME, open_clip:NAME/TAG, FILE.safetensors, FILE.onnx,
            FILE.py:FUNCTION, FILE.pt2, or demo.
        arch: timm architecture of a file.
        num_classes: classes of the head; pretrained heads cannot be changed.
        image_size: side of the square input in pixels, or height and width: (384, 512) or "384x512"; positions are
            resampled to it.
        weights: "random" builds the architecture from `seed` without a download of weights.
        seed: of random weights.
        problem: what the logits of a classifier stand for, where the source does not say so: "single_label",
            "multi_label", "regression", "map" (a number per pixel) or "segmentation" (a class per pixel).
        preprocess: of an ONNX file: a file that says how images are prepared, or a family: vit, deit, dinov2, clip,
            siglip.
        outputs: what the model gives, the first of which is compared and classified: "logits", "embedding" (what the
            head reads), "tokens" (all tokens behind the final norm), "layers:3,6" (all tokens behind 3 and 6 blocks),
            or names of outputs of a graph; what the model gives by itself if None.
        part: the path of the part of a model that is taken, such as "vision_model" or "encoder".
        graph: whether a model that none of the readers here knows by its class is read as a graph.

    Raises:
        SourceError: if the source is unknown, unreadable, or has a feature that vitfold does not run.
        ParityError: if the program differs from the original.
    """
    if not isinstance(source, str):
        raise ArgumentError(f"a source is text, {FORMS}; found {type(source).__name__}")
    names = _outputs(outputs)
    size, joined = parse_size(image_size), None if names is None else ",".join(names)
    arguments: dict[str, Any] = {
        "arch": arch, "num_classes": num_classes, "image_size": size, "weights": weights, "seed": seed,
    }  # fmt: skip
    chosen = {"problem": problem, "preprocess": preprocess, "outputs": joined, "part": part}
    arguments |= {name: value for name, value in chosen.items() if value is not None}
    _check_arguments(source, arguments)
    import_package("torch", "optimize", "loading a model")
    if _is_graph(source):
        loaded = Loaded(model=_load_graph(source, arguments), original=None)
    elif _is_code(source):
        loaded = _load_code(source, arguments, graph=graph)
    else:
        loaded = _from_zoo(source, arguments, graph=graph)
    if names is None:
        return loaded
    model = with_outputs(loaded.model, names)
    same = model.spec.output == loaded.model.spec.output
    return replace(loaded, model=model, first_output=loaded.first_output if same else None)


def _outputs(outputs: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if outputs is None:
        return None
    return parse_outputs(outputs if isinstance(outputs, str) else ",".join(outputs))


def _from_zoo(source: str, arguments: Mapping[str, Any], *, graph: bool) -> Loaded:
    """Let a zoo build a module, and read it by its class, else as a graph."""
    from vitfold.sources.modules import find_translator, part_of

    image_size = arguments["image_size"]
    with _seeded(arguments["seed"]):
        built = _build(source, arguments, known=not graph)
    origin = Origin(source=built.source, loader=_loader(built.zoo), arguments={**arguments, **built.digests})
    facts = {**built.facts, "problem": arguments.get("problem") or built.facts.get("problem")}
    module, preprocess, labels = built.module.float().cpu().eval(), facts.get("preprocess"), facts.get("labels")
    unnamed = arguments["weights"] == "random"
    translator = built.translator
    try:
        if arguments.get("part") is not None:
            module, labels = part_of(module, arguments["part"]), None
            translator, _ = find_translator(module)
        model, forward = _translate(translator, module, facts, origin, preprocess, labels, unnamed=unnamed)
    except UnsupportedError as reason:
        if not graph:
            raise
        from vitfold.sources.graphs import as_graph, first_output

        model, module = as_graph(
            module, origin, reason, preprocess=preprocess, labels=labels, facts=facts, translator=built.translator,
            size=pair(image_size),
        )  # fmt: skip
        forward = first_output(module, model.spec.output)
    _check_patches(model.spec, image_size)
    return Loaded(model=model, original=module, first_output=forward)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _check_patches(spec: Architecture, image_size: int | tuple[int, int] | None) -> None:
    sides = pair(image_size)
    if sides is None or not isinstance(spec, ViTSpec):
        return
    if any(side % patch for side, patch in zip(sides, spec.patch_size, strict=True)):
        shown = sides[0] if isinstance(image_size, int) else f"{sides[0]}x{sides[1]}"
        raise SourceError(
            f"--image-size {shown} is not a multiple of the patch size: "
            "the last pixels would not be seen; choose a multiple"
        )


def _is_graph(source: str) -> bool:
    return Path(source).suffix == ".onnx" and source.partition(":")[0] not in ZOOS


def _is_code(source: str) -> bool:
    path, colon, name = source.rpartition(":")
    return (bool(colon) and path.endswith(".py") and bool(name)) or source.endswith(".pt2")


def _check_whole(source: str, arguments: Mapping[str, Any]) -> None:
    for option, name in (("--arch", "arch"), ("--num-classes", "num_classes")):
        if arguments[name] is not None:
            raise SourceError(f"{option} belongs to weights, and {source} is a whole model; leave it out")


def _load_code(source: str, arguments: Mapping[str, Any], *, graph: bool) -> Loaded:
    """Load a module that code builds (FILE.py:FUNCTION) or that torch.export saved (FILE.pt2)."""
    _check_whole(source, arguments)
    from vitfold.sources.code import build_from_code, load_exported
    from vitfold.sources.graphs import first_output
    from vitfold.sources.modules import part_of

    exported = source.endswith(".pt2")
    file, name = (source, "") if exported else source.rsplit(":", 1)
    path, size = Path(file).expanduser().resolve(), arguments["image_size"]
    with _seeded(arguments["seed"]):
        module = load_exported(path) if exported else build_from_code(path, name)
    if arguments.get("part") is not None:
        module = part_of(module, arguments["part"])
    model = adapt(
        module,
        problem=arguments.get("problem"),
        image_size=pair(size),
        graph=graph,
        evaluated=exported,
    )
    kept = {name: value for name, value in arguments.items() if value is not None}
    origin = Origin(
        source=str(path) if exported else f"{path}:{name}",
        loader=model.origin.loader,
        arguments={**kept, "weights": "pretrained", **_digests(path)},
    )
    original = module if exported else module.eval()
    forward = first_output(original, model.spec.output)
    return Loaded(model=replace(model, origin=origin), original=original, first_output=forward)


def _load_graph(source: str, arguments: Mapping[str, Any]) -> Model:
    """Load an ONNX file."""
    _check_whole(source, arguments)
    onnx = import_package("onnx", "optimize", f"loading {source}")
    path, size = Path(source).expanduser().resolve(), arguments["image_size"]
    loader = importlib.import_module("vitfold.sources.onnx.loading")
    kept = {
        name: arguments[name] for name in ("image_size", "problem", "preprocess") if arguments.get(name) is not None
    }
    origin = Origin(
        source=str(path), loader=_loader(onnx), arguments={**kept, "weights": "pretrained", **_digests(path)}
    )
    model: Model = loader.load_file(
        path,
        origin,
        image_size=pair(size),
        problem=arguments.get("problem"),
        preprocess=arguments.get("preprocess"),
        outputs=_outputs(arguments.get("outputs")) or (),
    )
    return model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Built:
    """A module as its zoo made it, what else the zoo says of it, and the digests of the files that it came from."""

    module: torch.nn.Module
    facts: Mapping[str, Any]
    zoo: Any
    translator: Any
    source: str
    digests: Mapping[str, Any]


def _build(source: str, arguments: Mapping[str, Any], *, known: bool) -> _Built:
    """Let a zoo build the module of a source; with `known` refuse classes that have no reader before a download."""
    sizes = {name: arguments[name] for name in ("num_classes", "image_size")}
    prefix, _, name = source.partition(":")
    if prefix not in ZOOS or not name:
        path = _file(source)
        zoo = import_package("timm", "optimize", f"loading {source}")
        module, facts = importlib.import_module("vitfold.sources.files").build(path, arch=arguments["arch"], **sizes)
        return _Built(
            module=module,
            facts=facts,
            zoo=zoo,
            translator=importlib.import_module("vitfold.sources.timm"),
            source=source if source == "demo" else str(path),
            digests=_digests(path),
        )
    package, extra, here = ZOOS[prefix]
    zoo = import_package(package, extra, f"loading {source}")
    digests: dict[str, Any] = {}
    if prefix == "hf" and Path(name).expanduser().is_dir():
        folder = Path(name).expanduser().resolve()
        _refuse_diffusion(folder)
        name, source = str(folder), f"hf:{folder}"
        digests.update(_digests(folder / "model.safetensors"))
        digests.update({f"adapter_{k}": v for k, v in _digests(folder / "adapter_model.safetensors").items()})
    of_timm = hub.timm_name(name) if prefix == "hf" else None
    if of_timm is not None:
        name, zoo, here = of_timm, import_package("timm", "optimize", f"loading {source}"), "timm"
    translator = importlib.import_module(f"vitfold.sources.{here}")
    module, facts = translator.build(name, pretrained=arguments["weights"] == "pretrained", known=known, **sizes)
    return _Built(module=module, facts=facts, zoo=zoo, translator=translator, source=source, digests=digests)


def adapt(
    module: torch.nn.Module,
    *,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] | None = None,
    origin: str | None = None,
    problem: Problem | None = None,
    image_size: tuple[int, int] | None = None,
    input_shape: Sequence[int] | None = None,
    outputs: str | Sequence[str] | None = None,
    graph: bool = True,
    evaluated: bool = False,
) -> Model:
    """Read a torch module in memory; it is left as it is, and its float32 weights are shared.

    Args:
        module: a class of timm, transformers, torchvision or open_clip that vitfold knows, as it is or behind
            torch.compile or DataParallel; any other one is read as a graph, by what it computes for an image.
        preprocess: replaces what the zoo says about the module.
        labels: names of the classes, one per output.
        origin: where the weights came from, for the record.
        problem: what the logits of a classifier stand for, where the module does not say so.
        image_size: height and width of the images of a graph, where nothing else says it.
        input_shape: shape of one example of a module that takes something else than images, where its configuration
            does not say it: (frames, channels, height, width) of a video.
        outputs: as `load_source` takes them; of names of a module's own outputs only these are read.
        graph: whether a module that none of the readers here knows is read as a graph.
        evaluated: whether the module computes as in evaluation and cannot be asked to, as what torch.export saved.

    Raises:
        SourceError: if the class or one of its parts is not supported.
        ParityError: if the program differs from the original.
    """
    torch = import_package("torch", "optimize", "reading a model")
    if not isinstance(module, torch.nn.Module):
        raise SourceError(f"adapt needs a torch.nn.Module, found {type(module).__name__}; for a name use load_source")
    from vitfold.sources.modules import bare_module, find_translator

    _check_problem(problem)
    module = bare_module(module)
    chosen = _outputs(outputs)
    words = chosen is not None and any(asked_of_program([name]) for name in chosen)
    named = None if chosen is None or asked_of_program(chosen) else chosen
    reading: dict[str, Any] = {
        "facts": {"problem": problem}, "preprocess": preprocess, "labels": None if labels is None else tuple(labels),
    }  # fmt: skip
    translator, zoo, reason = None, torch, None
    try:
        translator, zoo = find_translator(module)
    except UnsupportedError as unknown:
        reason = unknown
    where = Origin(source=origin or "memory", loader=_loader(zoo), arguments={})
    with contextlib.nullcontext(module) if evaluated else _evaluated(module) as plain:
        if reason is None and named is None:
            try:
                model, _ = _translate(translator, plain, origin=where, **reading)
            except UnsupportedError as unsupported:
                reason = unsupported
        if reason is not None or named is not None:
            reason = reason or UnsupportedError("outputs were chosen by name")
            if not graph:
                raise reason
            from vitfold.sources.graphs import as_graph

            model, _ = as_graph(
                plain, where, reason, translator=translator, size=image_size,
                shape=None if input_shape is None else tuple(input_shape), outputs=None if words else named, **reading,
            )  # fmt: skip
    return model if chosen is None or not words else with_outputs(model, chosen)


@contextlib.contextmanager
def _evaluated(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module in eval mode, or a copy of it in float32 on the CPU where it is not there; left as it was found."""
    import torch

    if any(
        t.device.type not in ("cpu", "meta") or (t.dtype != torch.float32 and t.is_floating_point())
        for t in (*module.parameters(), *module.buffers())
    ):
        module = copy.deepcopy(module).float().cpu()
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield module
    finally:
        for part in training:
            part.training = True


def _translate(
    translator: Any,
    module: torch.nn.Module,
    facts: Facts,
    origin: Origin,
    preprocess: Preprocess | None,
    labels: tuple[str, ...] | None,
    *,
    unnamed: bool = False,
) -> tuple[Model, Callable[[torch.Tensor], torch.Tensor]]:
    """Translate, describe and check; return also what maps images to the original's output."""
    from vitfold.sources.parity import check_parity

    found: Translation = translator.translate(module)
    spec = _with_problem(found.spec, facts.get("problem"))
    if preprocess is None or labels is None:
        default, names = translator.describe(module, found.spec, facts)
        preprocess = preprocess or default
        labels = labels or (None if unnamed else names)
    if preprocess is None or preprocess.crop_size != found.spec.image_size:
        size = None if preprocess is None else preprocess.crop_size
        raise SourceError(
            f"the preprocessing yields {size} pixels, the model takes {found.spec.image_size}; give a matching one"
        )
    model = Model(spec=spec, params=found.params, preprocess=preprocess, labels=labels, origin=origin)
    check_parity(found.forward, model, blocks=found.blocks)
    return model, found.forward


def _check_problem(problem: str | None) -> None:
    if problem is not None and problem not in get_args(Problem):
        raise SourceError(f"unsupported problem {problem!r}; supported: {', '.join(get_args(Problem))}")


def _with_problem(spec: ViTSpec, problem: Problem | None) -> ViTSpec:
    """Return the spec with what its logits stand for, where somebody says so.

    Raises:
        SourceError: if the word is unknown, or there are no logits.
    """
    if problem is None:
        return spec
    if spec.output != "logits":
        raise SourceError(f"the problem {problem!r} belongs to a classifier, and this model gives features")
    return replace(spec, problem=problem)


def _check_arguments(source: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that do not go with a source, or with each other."""
    arch, num_classes, weights = (arguments[name] for name in ("arch", "num_classes", "weights"))
    if weights not in get_args(Weights):
        raise SourceError(f"weights {weights!r} is neither 'pretrained' nor 'random'")
    if num_classes is not None and num_classes < 0:
        raise SourceError(f"--num-classes must be at least 0, found {num_classes}")
    prefix, colon, _ = source.partition(":")
    in_zoo = bool(colon) and prefix in ZOOS
    if in_zoo and arch is not None:
        raise SourceError(f"--arch {arch} belongs to a file, and {source} names its architecture itself; leave it out")
    if weights == "random" and not in_zoo and _looks_like_file(source):
        raise SourceError(f"--weights random does not go with the file {source}; use timm:NAME --weights random")
    _check_problem(arguments.get("problem"))
    if "preprocess" in arguments and not _is_graph(source):
        raise SourceError(f"--preprocess belongs to an ONNX file, and {source} is none; leave it out")
    if "part" in arguments and _is_graph(source):
        raise SourceError(f"--part names a part of a module, and {source} is a graph; export the part instead")


def _looks_like_file(source: str) -> bool:
    return source == "demo" or Path(source).suffix in (".safetensors", *PICKLES) or os.sep in source


def _file(source: str) -> Path:
    """Return the absolute path that a source without a zoo's prefix names."""
    if source == "demo":
        return _demo()
    path = Path(source).expanduser()
    prefix, colon, name = source.partition(":")
    if path.suffix in PICKLES:
        raise SourceError(
            f"{source} may hold a pickle, which can run any code when opened; save its weights with "
            "safetensors.torch.save_file and pass that file; export a whole module by torch.onnx.export"
        )
    if path.suffix == ".safetensors":
        return path.resolve()
    if colon and prefix in ZOOS and not name:
        raise SourceError(f"{source} names no model; write {prefix}:NAME")
    if colon and not path.exists():
        raise SourceError(f"unknown source {prefix!r} in {source!r}; {nearest(prefix, ZOOS)}; a source is {FORMS}")
    if path.is_dir():
        raise SourceError(f"{source} is a folder; for a folder of transformers write hf:{source}")
    if path.exists():
        raise SourceError(f"{source} is not a .safetensors file; a source is {FORMS}")
    if source == "demo-dit":
        raise SourceError(f"{source} is a Diffusion Transformer; {_STEPS.format(source)}")
    raise SourceError(f"unknown source {source!r}; did you mean timm:{source}? A source is {FORMS}")


def _refuse_diffusion(folder: Path) -> None:
    """Raise for a folder of diffusers, which holds no model that maps an image to a vector."""
    configs = [path for path in (folder / "config.json", folder / "transformer" / "config.json") if path.is_file()]
    if (folder / "model_index.json").is_file() or any(
        "Transformer2DModel" in path.read_text(encoding="utf-8", errors="replace") for path in configs
    ):
        raise SourceError(f"{folder} holds a diffusion model of diffusers; {_STEPS.format(f'hf:{folder}')}")


def demo_folder() -> Path:
    """Return the demo's folder: the one that VITFOLD_DEMO names, or the one in the checkout."""
    named = os.environ.get("VITFOLD_DEMO")
    return Path(named).expanduser().resolve() if named else Path(__file__).resolve().parents[3] / "assets" / "demo"


def _demo() -> Path:
    """Return the demo's weights."""
    path = demo_folder() / "model.safetensors"
    if not path.is_file():
        raise SourceError(
            f"the demo model is not at {path}; it comes with a checkout of the repository, not with the package: clone "
            "it, or set VITFOLD_DEMO to the folder that holds model.safetensors"
        )
    return path


def _digests(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    return {"sha256": file_sha256(path)}


def import_package(package: str, extra: str, purpose: str) -> Any:
    """Import an optional dependency.

    Raises:
        SourceError: saying which extra brings it, if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != package:
            raise
        raise SourceError(missing_extra(package, extra, purpose)) from None


def _loader(zoo: ModuleType) -> str:
    return f"{zoo.__name__} {getattr(zoo, '__version__', 'unknown')}"
