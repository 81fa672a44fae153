"""Bundles and peers made ready to be timed against each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from vitfold.artifacts.bundle import Bundle
from vitfold.bench.comparison import Subject
from vitfold.bench.evaluation import Outputs, run_over
from vitfold.bench.fidelity import Fidelity
from vitfold.bench.peers import Calibration, load_original, open_peer
from vitfold.bench.reference import compare_outputs, optional_reference, reference_outputs
from vitfold.engines import ENGINES, Session, open_session
from vitfold.errors import VitfoldError, nearest
from vitfold.images import ImageSet
from vitfold.pipeline import bundle_work, count_costs
from vitfold.progress import Advance
from vitfold.recipe import MergeRecipe


class Lineup:
    """Subjects in the order in which they were added; closes their sessions at the end of `with`.

    `engine` runs the bundles, not the peers, instead of the one that each was made for. `calibration` are the images
    from which INT8 peers take the ranges of activations.
    """

    def __init__(
        self,
        *,
        folder: Path,
        images: ImageSet | None,
        engine: str | None = None,
        threads: int | None = None,
        reference: Bundle | None = None,
        calibration: ImageSet | None = None,
    ) -> None:
        self._folder = folder
        self._calibration = calibration
        self._images = images
        self._engine = engine
        self._threads = threads
        self._reference = reference
        self._original: Any = None
        self._expected: dict[str, Outputs] = {}
        self._peers: list[Subject] = []
        self._bundles: list[Subject] = []

    @property
    def fidelity_images(self) -> int:
        """Images over which every subject's fidelity is measured."""
        return 0 if self._images is None else len(self._images.paths)

    def _fidelity(self, session: Session, bundle: Bundle, advance: Advance) -> Fidelity | None:
        manifest = bundle.manifest
        if self._images is None or not manifest.has_trained_weights:
            return None
        outputs = run_over(session, self._images, manifest.preprocess, advance=advance)
        digest = manifest.model_digest
        if digest not in self._expected:
            self._expected[digest] = reference_outputs(
                digest, self._images, manifest.preprocess, optional_reference(bundle, self._reference)
            )
        return compare_outputs(
            outputs,
            self._images,
            labels=manifest.labels,
            head=manifest.spec.head,
            reference=self._expected[digest],
        )

    def add_bundle(self, bundle: Bundle, advance: Advance) -> None:
        """Open a bundle and measure its fidelity.

        Raises:
            VitfoldError: if it is given twice, or has no speed on that engine.
        """
        _check_timed(bundle, self._engine)
        session = open_session(bundle, engine=self._engine, threads=self._threads)
        taken = {subject.name for subject in self._bundles}
        name = bundle.name if bundle.name not in taken else str(bundle.path)
        if name in taken:
            raise VitfoldError(f"{bundle.path} is given twice; give each bundle once")
        self._bundles.append(
            Subject(
                name=name,
                session=session,
                preprocess=bundle.manifest.preprocess,
                fidelity=None,
                tokens=bundle.manifest.tokens[-1],
                macs=bundle.manifest.macs,
                size_bytes=bundle.size_bytes,
                work=bundle_work(bundle),
            )
        )
        self._bundles[-1] = replace(self._bundles[-1], fidelity=self._fidelity(session, bundle, advance))

    def add_peer(self, name: str, bundle: Bundle) -> None:
        """Set up a peer of the model that `bundle` was made from.

        Raises:
            VitfoldError: if that model is not at hand, the peer's tool refuses it, or the peer lacks images.
        """
        manifest = bundle.manifest
        if self._original is None:
            self._original = load_original(manifest.origin, manifest.spec.output)
        shape = manifest.spec.input_shape
        calibration = None
        if self._calibration is not None:
            calibration = Calibration(images=self._calibration, preprocess=manifest.preprocess)
        peer = open_peer(name, self._original, shape, self._folder, threads=self._threads, calibration=calibration)
        costs = count_costs(manifest.spec, MergeRecipe(r=()), every_row=True)
        self._peers.append(
            Subject(
                name=name,
                session=peer.session,
                preprocess=manifest.preprocess,
                fidelity=None,
                tokens=manifest.spec.tokens,
                macs=sum(cost.macs for cost in costs),
                size_bytes=peer.size_bytes,
                untimed=peer.untimed,
            )
        )

    def measure_peers(self, bundle: Bundle, advance: Advance) -> None:
        """Measure the fidelity of every peer like that of a bundle."""
        self._peers = [replace(peer, fidelity=self._fidelity(peer.session, bundle, advance)) for peer in self._peers]

    def ordered(self, baseline: str | None) -> list[Subject]:
        """Return peers, then bundles, with the baseline first.

        Raises:
            VitfoldError: if no subject has that name, or that one is not timed.
        """
        subjects = [*self._peers, *self._bundles]
        if baseline is None:
            return subjects
        names = [subject.name for subject in subjects]
        if baseline not in names:
            raise VitfoldError(f"no row is called {baseline!r}; {nearest(baseline, names)}")
        if subjects[names.index(baseline)].untimed is not None:
            raise VitfoldError(f"{baseline} is never timed; name another row as --baseline")
        return sorted(subjects, key=lambda subject: subject.name != baseline)

    def __enter__(self) -> Lineup:
        """Enter a context that closes all sessions."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all sessions."""
        for subject in (*self._peers, *self._bundles):
            subject.session.close()


def _check_timed(bundle: Bundle, engine: str | None) -> None:
    """Check that the time of a bundle on an engine says something about the bundle.

    Raises:
        VitfoldError: if it is simulated, or written for TensorRT and asked for elsewhere.
    """
    if bundle.manifest.simulated:
        raise VitfoldError(
            f"{bundle.path} is simulated: no engine executes it, so it has no speed; measure its accuracy with: "
            f"vitfold evaluate {bundle.path} --images DIR"
        )
    made_for = ENGINES[bundle.manifest.target["engine"]]
    if made_for.gpu and engine not in (None, made_for.name):
        raise VitfoldError(
            f"{bundle.path} is written for TensorRT and is not timed on {engine}: a time there says nothing about a "
            f"GPU; bench it without --engine on a machine with an NVIDIA GPU, or see: vitfold audit {bundle.path}; "
            f"for its accuracy: vitfold evaluate {bundle.path} --images DIR --engine onnxruntime"
        )
