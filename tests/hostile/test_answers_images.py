"""What is no image, as a file, a folder or a value in memory: one clear error each, and never a hang."""

from __future__ import annotations

import io
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitfold.decoding import as_image, listed
from vitfold.errors import ImageError
from vitfold.images import find_images

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def encoded(kind: str = "PNG", keep: int | None = None) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, kind)
    return stream.getvalue()[:keep]


def closed(path: Path) -> Image.Image:
    (path / "a.png").write_bytes(encoded())
    image = Image.open(path / "a.png")
    image.close()
    return image


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.jpg")
    return folder / "a.jpg"


def bound(folder: Path) -> Path:
    os.chdir(folder)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("a.jpg")
    return folder / "a.jpg"


def file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def link(to: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "link.jpg").symlink_to(to)
        return folder / "link.jpg"

    return make


@dataclass(frozen=True)
class Case:
    id: str
    make: Callable[[Path], Any]
    said: tuple[str, ...]


IMAGES = (
    Case("a folder", lambda f: f, ("is a folder", "give the files in it")),
    Case("a pipe", pipe, ("is a pipe", "save the image to a file")),
    Case("a socket", bound, ("is a socket",)),
    Case("a device", lambda _: "/dev/null", ("is a device",)),
    Case("an endless device", lambda _: "/dev/zero", ("is a device",)),
    Case("nothing there", lambda f: f / "none.png", ("no such image",)),
    Case("an empty path", lambda _: "", ("no such image",)),
    Case("a path through a file", lambda f: file("a.png", b"")(f) / "b.png", ("cannot be opened", "check the path")),
    Case("a path with a zero", lambda _: "a\0b.png", ("cannot be opened",)),
    Case("a very long path", lambda _: "a" * 5000, ("cannot be opened",)),
    Case("a link to nothing", link("nowhere.jpg"), ("no such image",)),
    Case("a link to itself", link("link.jpg"), ("cannot be opened",)),
    Case("text", file("a.png", b"hello"), ("not an image that Pillow can read",)),
    Case("HEIC", file("a.heic", b"\0\0\0\x18ftypheic" + bytes(40)), ("a.heic",)),
    Case("SVG", file("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), ("not an image", "convert it")),
    Case("a film", file("a.mp4", b"\0\0\0\x18ftypmp42" + bytes(40)), ("not an image",)),
    Case("cut short", file("a.jpg", encoded("JPEG", 900)), ("damaged or cut short",)),
    Case("PNG with a bad chunk", file("a.png", encoded()[:60] + b"\xff" * 900), ("damaged or cut short",)),
    Case("GIF without a frame", file("a.gif", b"GIF89a\x01\0\x01\0\0\0\0;"), ("not an image",)),
    Case("empty bytes", lambda _: b"", ("an image of 0 bytes", "not an image")),
    Case("bytes of text", lambda _: b"hello", ("an image of 5 bytes", "not an image")),
    Case("bytes cut short", lambda _: encoded(keep=1500), ("an image of 1500 bytes is damaged or cut short",)),
    Case("a stream cut short", lambda _: io.BytesIO(encoded(keep=1500)), ("the open file is damaged",)),
    Case("a stream of text", lambda _: io.StringIO("hello"), ("the open file",)),
    Case("lazy and cut short", lambda _: Image.open(io.BytesIO(encoded("JPEG", 900))), ("Pillow image is damaged",)),
    Case("closed", closed, ("the Pillow image is damaged",)),
    Case("no size", lambda _: Image.new("RGB", (0, 5)), ("the Pillow image", "0")),
    Case("32-bit integers", lambda _: Image.new("I", (4, 4)), ("no defined white",)),
    Case("floats in a file", lambda _: Image.new("F", (4, 4)), ("no defined white",)),
    Case("float array", lambda _: PIXELS / 255, ("float64 has no defined white", "(array * 255).round()")),
    Case("half array", lambda _: (PIXELS / 255).astype(np.float16), ("float16 has no defined white",)),
    Case("int64 array", lambda _: PIXELS.astype(np.int64), ("int64 has no defined white", "uint8")),
    Case("object array", lambda _: np.array([[None]]), ("object has no defined white",)),
    Case("channels first", lambda _: PIXELS.transpose(2, 0, 1), ("(3, 40, 50)", "array.transpose(1, 2, 0)")),
    Case("two channels", lambda _: PIXELS[..., :2], ("(40, 50, 2) is no image", "(H, W, 3)")),
    Case("five channels", lambda _: np.zeros((4, 4, 5), np.uint8), ("(4, 4, 5)", "transpose")),
    Case("one dimension", lambda _: PIXELS[0, :, 0], ("(50,) is no image",)),
    Case("no pixels", lambda _: PIXELS[:0], ("(0, 50, 3) is no image",)),
    Case("no dimension", lambda _: np.uint8(3) + np.zeros((), np.uint8), ("uint8", "give a path")),
    Case("float tensor", lambda _: torch.rand(3, 8, 8), ("torch.float32 has no defined white", "to(torch.uint8)")),
    Case("tensor of channels last", lambda _: torch.from_numpy(PIXELS), ("(40, 50, 3)", "tensor.permute(2, 0, 1)")),
    Case("None", lambda _: None, ("NoneType", "give a path, a Pillow image")),
    Case("a number", lambda _: 7, ("int", "give a path")),
    Case("a class", lambda _: Image.Image, ("type", "give a path")),
)  # fmt: skip


@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.id)
def test_what_is_no_image_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError) as caught:
        as_image(case.make(tmp_path))
    for words in case.said:
        assert words in str(caught.value)
    assert not re.search(r"Errno 2\b", str(caught.value)), "what Python says of a missing file is no cure"


SEVERAL = (
    Case("None", lambda _: None, ("expected an image or several, found NoneType",)),
    Case("a number", lambda _: 5, ("found int", "give a path")),
    Case("a mapping", lambda _: {"image": "a.png"}, ("found dict",)),
    Case("nothing at all", lambda _: object(), ("found object",)),
)


@pytest.mark.parametrize("case", SEVERAL, ids=lambda case: case.id)
def test_what_is_not_several_images_is_refused(tmp_path, case):
    with pytest.raises(ImageError) as caught:
        listed(case.make(tmp_path))
    for words in case.said:
        assert words in str(caught.value)


def only(name: str, content: bytes = b"") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file(name, content)(folder)
        return folder

    return make


def piped(folder: Path) -> Path:
    pipe(folder)
    return folder


FOLDERS = (
    Case("empty", lambda f: f, ("no images in", "expected files that Pillow reads")),
    Case("text alone", only("notes.txt"), ("no images in", "left out", "1 (notes.txt)")),
    Case("a pipe alone", piped, ("no images in", "1 (a.jpg)")),
    Case("a file", file("a.png", b""), ("is a file", "give a folder of images")),
    Case("a device", lambda _: "/dev/null", ("is a file",)),
    Case("nothing there", lambda f: f / "none", ("no such folder",)),
    Case("a zero in it", lambda _: "a\0b", ("cannot be read as a folder",)),
    Case("a very long name", lambda _: "a" * 5000, ("cannot be read as a folder", "check the path")),
    Case("a link to itself", link("link.jpg"), ("link.jpg",)),
)


@pytest.mark.parametrize("case", FOLDERS, ids=lambda case: case.id)
def test_folders_without_images_say_what_is_in_them(tmp_path, case):
    with pytest.raises(ImageError) as caught:
        find_images(case.make(tmp_path))
    for words in case.said:
        assert words in str(caught.value)
