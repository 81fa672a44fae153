"""Retrieval: ranks against a slow loop, recalls with their intervals, tables of captions that are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from vitfold.bench.retrieval import Ranks, rank, read_pairs, recalls
from vitfold.bench.statistics import paired_drop, share_interval
from vitfold.errors import VitfoldError

HEAD = "image,caption\n"


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize(("images", "captions"), [(7, 19), (300, 310)])
def test_ranks_are_those_of_a_slow_loop(images, captions):
    owner = [j % images for j in range(captions)]
    left, right = 3 * drawn(images, 6), 0.2 * drawn(captions, 6, seed=1)
    found = rank(left, right, owner)
    for i in range(0, images, 1 if images < 50 else 37):
        scores = [cosine(left[i], right[j]) for j in range(captions)]
        best = max(score for score, o in zip(scores, owner, strict=True) if o == i)
        assert found.of_images[i] == sum(score > best for score, o in zip(scores, owner, strict=True) if o != i)
    for j in range(0, captions, 1 if images < 50 else 41):
        scores = [cosine(left[i], right[j]) for i in range(images)]
        assert found.of_captions[j] == sum(score > scores[owner[j]] for score in scores)


def test_a_tie_counts_against_the_right_one():
    """A model that gives every image the same embedding finds nothing."""
    found = rank(np.ones((4, 3), np.float32), np.ones((4, 3), np.float32), range(4))
    assert found.of_images.tolist() == found.of_captions.tolist() == [3] * 4


def test_recalls_of_one_caption_each_have_the_intervals_of_shares():
    ranks, before = np.array([0, 1, 4, 5, 0, 9]), np.array([0, 0, 0, 0, 7, 9])
    said = recalls(Ranks(of_images=ranks, of_captions=ranks), range(6), Ranks(of_images=before, of_captions=before))
    for direction in ("image_to_text", "text_to_image"):
        for top in (1, 5):
            one, right, was = said[direction][f"recall_at_{top}"], ranks < top, before < top
            assert one["recall"] == right.mean()
            assert one["unfolded"] == was.mean()
            assert {key: one[key] for key in ("low", "high")} == share_interval(right)
            drop = paired_drop(was, right)
            assert (one["drop"]["drop"], one["drop"]["low"]) == (pytest.approx(drop.drop), drop.low)


def test_captions_of_one_image_count_as_one_draw():
    """Five copies of every caption say as much as one: the interval is as wide, not sqrt(5) times narrower."""
    right = np.random.default_rng(3).random(400) < 0.4
    ranks, owner = np.where(right, 0, 9), np.arange(400)
    one = recalls(Ranks(of_images=ranks, of_captions=ranks), owner.tolist())["text_to_image"]["recall_at_1"]
    five = recalls(Ranks(of_images=ranks, of_captions=np.repeat(ranks, 5)), np.repeat(owner, 5).tolist())
    many = five["text_to_image"]["recall_at_1"]
    assert many["recall"] == one["recall"]
    assert many["high"] - many["low"] == pytest.approx(one["high"] - one["low"], rel=0.15)
    assert many["low"] < many["recall"] < many["high"]


def test_a_table_gives_images_once_and_captions_in_order(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(
        '\ufeffcaption,image,other\na cat,b.png,1\n"a dog, and\na tree",a.png,2\na kitten,b.png,3\n', encoding="utf-8"
    )
    found = read_pairs(path)
    assert found.images == ("b.png", "a.png")
    assert found.captions == ("a cat", "a dog, and\na tree", "a kitten")
    assert found.owner == (0, 1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,a cat\n", "has no column image; its first line must be image,caption"),
        ("image,text\na.png,a cat\n", "has no column caption"),
        ("", "has no column image"),
        (f"{HEAD}a.png,a cat\nb.png, \n", "line 3: no caption; complete the row"),
        (f"{HEAD}a.png\nb.png,x\n", "line 2: no caption"),
        (f"{HEAD},a cat\n", "line 2: no image"),
        (f"{HEAD}a.png,a cat\nb.png,x\na.png,a cat\n", "line 4: a.png has this caption in line 2 already"),
        (f"{HEAD}a.png,a cat\na.png,x\n", "names 1 images; retrieval needs at least two"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(VitfoldError, match=message):
        read_pairs(path)


def test_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"image,caption\n\xff\xfe\n")
    for name in ("a.csv", "none.csv"):
        with pytest.raises(VitfoldError, match=f"cannot read .*{name}"):
            read_pairs(tmp_path / name)
    with pytest.raises(VitfoldError):
        read_pairs(tmp_path)
