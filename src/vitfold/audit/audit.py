"""An audit: a graph compiled for a GPU, its kernels counted, explained and priced."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitfold.audit.compiler import Compiled, compile_graph
from vitfold.audit.facts import GraphFacts, read_facts
from vitfold.audit.findings import find_problems
from vitfold.audit.kernels import KINDS, PRECISIONS, Kernel, read_kernel
from vitfold.audit.layers import parse_layers
from vitfold.audit.limits import Finding
from vitfold.audit.pricing import costs, priced
from vitfold.errors import EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What the compiler made of one graph at one batch size for one GPU."""

    name: str
    gpu: str
    batch: int
    compiled: Compiled
    facts: GraphFacts
    kernels: tuple[Kernel, ...]
    findings: tuple[Finding, ...]
    not_understood: tuple[str, ...]

    @property
    def kinds(self) -> dict[str, int]:
        """Kernels by kind."""
        counts = Counter(kernel.kind for kernel in self.kernels)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}

    @property
    def per_block(self) -> dict[int, tuple[Kernel, ...]]:
        """The kernels of each transformer block; what comes before and behind is left out."""
        blocks = sorted({kernel.block for kernel in self.kernels if kernel.block is not None})
        return {block: tuple(kernel for kernel in self.kernels if kernel.block == block) for block in blocks}

    @property
    def middle_block(self) -> tuple[Kernel, ...]:
        """The kernels of the block in the middle of the plan, none where no block was recognized."""
        blocks = tuple(self.per_block.values())
        return blocks[len(blocks) // 2] if blocks else ()

    @property
    def gemms(self) -> dict[str, int]:
        """Linear layers by the type that they multiply in."""
        counts = Counter(kernel.precision for kernel in self.kernels if kernel.kind == "gemm")
        return {precision: counts[precision] for precision in PRECISIONS}

    @property
    def fused(self) -> int:
        """Attentions that are one kernel."""
        return sum(kernel.kind == "attention" for kernel in self.kernels)

    @property
    def attention_types(self) -> dict[str, int]:
        """Fused attentions by the type that they multiply in."""
        counts = Counter(kernel.precision for kernel in self.kernels if kernel.kind == "attention")
        return {precision: counts[precision] for precision in PRECISIONS if counts[precision]}

    @property
    def unfused(self) -> int:
        """Attentions that are several kernels."""
        return max(0, len(self.facts.attentions) - self.fused)

    @property
    def copies(self) -> int:
        """Kernels that only move data, but for the conversion of the input."""
        return sum(kernel.kind == "copy" for kernel in self.kernels)

    @property
    def bytes_moved(self) -> int:
        """Bytes of activations that the kernels read and write, per batch."""
        return sum(kernel.bytes_moved for kernel in self.kernels)

    def to_dict(self, tiles_on: str | None = None) -> dict[str, Any]:
        """Return plain JSON values, with the tiles of products on a GPU if one is named."""
        return {
            "name": self.name,
            "gpu": self.gpu,
            "batch": self.batch,
            "compiler": f"tensorrt-rtx {self.compiled.version}",
            "kernels": len(self.kernels),
            "kernels_per_block": {str(block): len(kernels) for block, kernels in self.per_block.items()},
            "kinds": self.kinds,
            "gemms": self.gemms,
            "attention": {"fused": self.fused, "unfused": self.unfused, **self.attention_types},
            "copies": self.copies,
            "bytes_moved": self.bytes_moved,
            "bytes_per_block": {str(b): sum(k.bytes_moved for k in kernels) for b, kernels in self.per_block.items()},
            "middle_block": [
                {
                    "kind": kernel.kind,
                    "precision": kernel.precision,
                    "sites": list(kernel.sites),
                    "bytes_moved": kernel.bytes_moved,
                    "macs": kernel.macs,
                }
                for kernel in self.middle_block
            ],
            "weight_bytes": sum(kernel.weight_bytes for kernel in self.kernels),
            "macs": sum(kernel.macs for kernel in self.kernels),
            "engine_bytes": self.compiled.engine_bytes,
            **priced(self.kernels, tiles_on),
            "findings": [finding.to_dict() for finding in self.findings],
            "not_understood": list(self.not_understood),
            "build_seconds": self.compiled.seconds,
            "build_peak_bytes": self.compiled.peak_bytes,
            "costs": costs(self.kernels),
        }


def audit_graph(path: Path, *, gpu: str = "sm86", batch: int = 8, name: str | None = None) -> Audit:
    """Compile an ONNX file ahead of time and explain its plan.

    Raises:
        TargetError: if the GPU is unknown.
        EngineError: if the compiler is missing, or does not take the file.
    """
    facts = read_facts(path)
    compiled = compile_graph(path, gpu=gpu, batch=batch)
    read = parse_layers(compiled.layers)
    if not read.kernels:
        raise EngineError(
            f"TensorRT {compiled.version} lists no kernels of {path}; its log has a form unknown to vitfold"
        )
    kernels = tuple(read_kernel(layer, facts.site_of, facts.inputs) for layer in read.kernels)
    unknown = tuple(f"layer type {kind}" for kind in read.unknown_types)
    return Audit(
        name=name or path.stem,
        gpu=gpu,
        batch=batch,
        compiled=compiled,
        facts=facts,
        kernels=kernels,
        findings=find_problems(facts, kernels),
        not_understood=(*unknown, *(f"line {line}" for line in read.unread)),
    )
