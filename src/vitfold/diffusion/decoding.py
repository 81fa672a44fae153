"""From latents to images: by a graph within a bundle of steps, lifted from a VAE, or by the VAE itself in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitfold.artifacts.bundle import Bundle, graph_name
from vitfold.artifacts.steps import DECODE, DecodeGraph
from vitfold.diffusion.parts import Part
from vitfold.engines import DEFAULT, Ends, Port, Session, check_ends, open_graph
from vitfold.engines.graphs import check_graph
from vitfold.errors import ParityError, SourceError, VitfoldError
from vitfold.model import Array
from vitfold.sources.diffusers import LatentDecoder, read_vae
from vitfold.sources.onnx.exporting import Given, ModuleProgram, read_program
from vitfold.target import find_target

Decode = Callable[[Array], Array]
"""From latents (B, *latent) to images (B, C, Y, X) in [0, 1]."""
LATENTS, SAMPLES = "latents", "samples"
TOLERANCE = 1e-3
"""Largest error of an image relative to its largest value: images are shown with 8 bits."""
_CURE = "leave the decoder out: --no-vae (vae=False)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoder:
    """A module that decodes latents of one shape, and the same as a program."""

    module: nn.Module
    shape: tuple[int, ...]
    lifted: ModuleProgram


def lift_decoder(module: nn.Module, shape: Sequence[int]) -> Decoder:
    """Return what decodes latents (B, *shape) as a program.

    Raises:
        SourceError: if it cannot be exported.
        ParityError: if the program differs from the module's export.
    """
    try:
        given = Given(name=LATENTS, shape=tuple(shape))
        lifted = read_program(module, [given], (SAMPLES,), attending=False)
    except VitfoldError as error:
        raise type(error)(f"the VAE has no form as a graph ({error}); {_CURE}") from None
    return Decoder(module=module, shape=tuple(shape), lifted=lifted)


def lift_folder(folder: str | Path, shape: Sequence[int]) -> Decoder:
    """Return the decoder of an `AutoencoderKL` in a folder as a program, for latents (B, *shape).

    Raises:
        SourceError: if diffusers cannot read it, or it cannot be exported.
        ParityError: if the program differs from the module's export.
    """
    return lift_decoder(LatentDecoder(read_vae(Path(folder))), shape)


def write_decoder(decoder: Decoder, folder: Path, target: str = "cpu") -> DecodeGraph:
    """Write the graph of a decoder in single precision, and compare it with the module on random latents.

    Raises:
        ParityError: if its images differ by more than `TOLERANCE`.
        EngineError: if ONNX Runtime refuses it.
    """
    from vitfold.ops.emit import emit_ports, write_onnx

    part = Part(program=decoder.lifted.program)
    graph = emit_ports(part.run, decoder.lifted.params, find_target(target), inputs=part.inputs, outputs=[SAMPLES])
    path = folder / graph_name(DECODE)
    write_onnx(graph, path)
    latents = torch.randn((1, *decoder.shape), generator=torch.Generator().manual_seed(0))
    with open_graph({DECODE: path}, DEFAULT) as session, torch.inference_mode():
        found, expected = _run(session, latents.numpy()), decoder.module(latents).numpy()
    error = difference(expected, found)
    if found.ndim != 4 or not error <= TOLERANCE:
        raise ParityError(
            f"the graph of the VAE decodes other images than the VAE (by {error:.2g}, relative; at most {TOLERANCE:g} "
            f"is allowed); {_CURE}"
        )
    _, *image_shape = found.shape
    return DecodeGraph(image_shape=tuple(image_shape), relative_error=error)


def difference(expected: Array, found: Array) -> float:
    """Return max|a - b| / max|a|; infinite where shapes differ."""
    if expected.shape != found.shape:
        return float("inf")
    return float(np.abs(expected - found).max()) / (float(np.abs(expected).max()) or 1.0)


def open_decoder(bundle: Bundle, *, threads: int | None = None) -> Decode:
    """Return what decodes the latents of a bundle: its own graph, which needs no torch, else the VAE's folder.

    Raises:
        SourceError: if neither is there.
        BundleError: if the graph is damaged.
        EngineError: if ONNX Runtime refuses the graph.
    """
    steps = bundle.manifest.steps
    if steps.decode is None:
        return load_decoder(steps.decoder, steps.origin.source)
    path = bundle.decode_path
    check_graph(path)
    session = open_graph({DECODE: path}, DEFAULT, threads=threads)
    latents, samples = (
        Port(name=LATENTS, shape=steps.spec.image_shape),
        Port(name=SAMPLES, shape=steps.decode.image_shape),
    )
    check_ends(session, {DECODE: Ends((latents,), (samples,))}, {DECODE: path})
    return lambda given: in_unit_range(_run(session, given))


def decoded_by(graph: DecodeGraph | None, folder: Path) -> Decode | None:
    """Return what decodes by the graph that was written to a folder; None where there is none."""
    if graph is None:
        return None

    def decode(latents: Array) -> Array:
        with open_graph({DECODE: folder / graph_name(DECODE)}, DEFAULT) as session:
            return in_unit_range(_run(session, latents))

    return decode


def load_decoder(folder: str | None, source: str) -> Decode:
    """Return what decodes latents by the VAE in a folder, in torch and diffusers.

    Raises:
        SourceError: if there is none, or diffusers cannot read it.
    """
    if folder is None or not Path(folder).is_dir():
        where = "" if folder is None else f" ({folder})"
        raise SourceError(
            f"{source} makes latents, and the VAE that turns them into images is not there{where}; put it into the "
            "folder vae beside the transformer, or write the latents: --latents"
        )
    module = LatentDecoder(read_vae(Path(folder)))

    def decode(latents: Array) -> Array:
        with torch.inference_mode():
            images = [module(latent) for latent in torch.from_numpy(latents)[:, None]]
        return in_unit_range(torch.cat(images).numpy())

    return decode


def in_unit_range(samples: Array) -> Array:
    """Return images of samples: from [-1, 1] to [0, 1]."""
    found: Array = (samples.clip(-1, 1) + 1) / 2
    return found


def _run(session: Session, latents: Array) -> Array:
    """Decode one by one: activations of a decoder are some hundred times as large as its latents."""
    images: list[Any] = []
    for latent in latents[:, None]:
        session.bind({LATENTS: latent})
        session.run(DECODE)
        images.append(session.fetch(SAMPLES)[SAMPLES])
    return np.concatenate(images)
