"""What `vitfold evaluate --retrieval` does: captions and images of a table, each looked for by the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.bench.retrieval import Pairs, rank, read_pairs, recalls
from vitfold.bench.zero_shot import SUFFIXES, read_embeds
from vitfold.cli.groups import refuse
from vitfold.cli.terminal import note, out
from vitfold.errors import VitfoldError

if TYPE_CHECKING:
    from vitfold.bench.evaluation import Outputs
    from vitfold.images import ImageSet
    from vitfold.model import Architecture, Array

_SHOWN = {"image_to_text": "image to text", "text_to_image": "text to image"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """Pairs with the embeddings of their captions (J, D), and what embedded them."""

    pairs: Pairs
    captions: Array
    texts: str | None

    def measure(self, outputs: Outputs, expected: Outputs | None) -> dict[str, Any]:
        """Return recall in both directions, beside the unfolded model's where its outputs are there, as JSON values."""
        owner = self.pairs.owner
        unfolded = None if expected is None else rank(expected.values, self.captions, owner)
        found = rank(outputs.values, self.captions, owner)
        head = {"texts": self.texts, "images": len(self.pairs.images), "captions": len(self.pairs.captions)}
        return {**head, **recalls(found, owner, unfolded)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalArgs:
    """Captions of images, and what embeds them."""

    retrieval: Annotated[
        Path | None,
        typer.Option(
            metavar="PAIRS.csv",
            help="Recall of captions by image and of images by caption: a table image,caption whose paths are relative "
            "to --images; an image may have several rows.",
        ),
    ] = None
    text_tower: Annotated[
        str | None,
        typer.Option(
            metavar="TEXTS",
            help="What embeds the captions: open_clip:ARCH/TAG or hf:REPO_OR_FOLDER, or a .npy or .safetensors file "
            "(captions, width) in the order of the rows.",
        ),
    ] = None

    def __post_init__(self) -> None:
        refuse(
            (
                self.retrieval is not None and self.text_tower is None,
                "captions need a text tower: give --text-tower hf:REPO_OR_FOLDER or open_clip:ARCH/TAG, of the model "
                "that the image tower belongs to",
                "--retrieval",
            ),
            (self.retrieval is None and self.text_tower is not None, "needs --retrieval PAIRS.csv", "--text-tower"),
        )

    def asked(self, images: ImageSet, spec: Architecture, *, whole: bool) -> tuple[ImageSet, Asked | None]:
        """Return the images of the table, without class folders, in its order, and what is asked of them.

        Where there is no table the images stay as they are. `whole` says that none of them is left out.

        Raises:
            VitfoldError: if the table is wrong, names an image that is not there, or the model gives no embeddings.
        """
        if self.retrieval is None:
            return images, None
        refuse((not whole, "takes every image of the table; leave --limit and --skip-bad out", "--retrieval"))
        if spec.output != "image_embeds":
            raise VitfoldError(
                f"--retrieval compares image embeddings, and this model's output is {spec.output}; make the bundle of "
                "an image tower, such as open_clip:ViT-B-16/openai or hf:openai/clip-vit-base-patch16"
            )
        found = read_pairs(self.retrieval)
        there = {path.relative_to(images.root).as_posix(): path for path in images.paths}
        lost = [name for name in found.images if name not in there]
        if lost:
            raise VitfoldError(
                f"{self.retrieval} names {len(lost)} images that are not in {images.root}, as {lost[0]}; paths are "
                "relative to --images, with /"
            )
        paths = tuple(there[name] for name in found.images)
        chosen = replace(images, paths=paths, classes=None, class_index=None)
        return chosen, Asked(pairs=found, captions=self._embeds(found, spec), texts=self.text_tower)

    def _embeds(self, pairs: Pairs, spec: Architecture) -> Array:
        """Return one embedding per caption, (J, D).

        Raises:
            VitfoldError: if the tower cannot be loaded or does not fit the model.
        """
        assert self.text_tower is not None
        if Path(self.text_tower).suffix in SUFFIXES:
            embeds = read_embeds(Path(self.text_tower))
        else:
            from vitfold.sources.text_towers import text_embeds

            note(f"embedding {len(pairs.captions)} captions by {self.text_tower}, once")
            embeds = text_embeds(self.text_tower, pairs.captions, ("{}",))
        if embeds.shape != (len(pairs.captions), spec.output_width):
            raise VitfoldError(
                f"{self.text_tower} gives embeddings {embeds.shape}, {len(pairs.captions)} captions and a model of "
                f"width {spec.output_width} need ({len(pairs.captions)}, {spec.output_width}); give the text tower "
                "that was trained with this image tower"
            )
        return embeds


def print_retrieval(values: dict[str, Any]) -> None:
    """Print a line for each recall."""
    for direction, shown in _SHOWN.items():
        for name, one in values[direction].items():
            text = f"{one['recall']:.2%} [{one['low']:.2%}, {one['high']:.2%}]"
            if "unfolded" in one:
                drop = one["drop"]
                points = f"{100 * drop['drop']:+.2f} [{100 * drop['low']:+.2f}, {100 * drop['high']:+.2f}]"
                text += f", unfolded {one['unfolded']:.2%}, drop {points} points"
            out.print(
                f"  {shown}, recall at {name.removeprefix('recall_at_')}: {text}", soft_wrap=True, highlight=False
            )
