"""A procedural preference set: PNG files and ``preferences.jsonl`` in the general form, labels known by construction.

Every pair belongs to a kind, stored as its `source`. Written down before any probing: where along the depth of a
transformer each kind should become readable from pooled image tokens.

=========== ============================================================ ==========================================
kind        the two pictures                                             prediction
=========== ============================================================ ==========================================
degradation clean against blurred, noisy, blocky or faded                from layer 0 on: needs no text
colour      one thing has another colour than the caption says           the first blocks that mix text and image
background  the ground has another colour than the caption says          the first blocks that mix text and image
size        one thing has the other size                                 the middle
count       one, two or three things                                     the middle
shape       one thing has another shape                                  the middle or later; weak if the VAE blurs it
binding     the colours of two things swapped                            late, or absent
relation    the places of two things swapped                             late, or absent
ranking     four pictures of a caption with 0, 1, 2 and 3 defects        between degradation and colour
tie         two layouts of the same caption, both right                  nowhere: the label is 0.5
tradeoff    right but degraded against clean but wrong                   no earlier than colour; ceiling below 100 %
=========== ============================================================ ==========================================

The seven kinds from colour to relation are *swap-balanced*: both pictures appear under both captions and the winner is
reversed, in one group, so whatever looks at the pictures only, or at the text only, is right exactly half of the time.

Captions are split between train, validation and test by a hash, pictures are drawn from a random stream that training
of the playground's models never used, and no picture occurs in two groups. No caption does either, except in `count`,
which keeps the captions of crowds to itself: there a group is at most the three numbers of one kind of thing. So groups
stay small, and intervals over groups honest but narrow.

What was found (``probekit demo``, 8x128, linear head, test pairs; readable: the 95 % interval lies above 0.5). The
predicted order in depth failed: layer 2 of 8 reads every swap-balanced kind. Binding and relation, predicted late or
absent, go from 0.50 at layer 1 to 0.87 and 0.83 at layer 2, further than colour (0.56, then 0.71). Count, predicted for
the middle, has 0.74 at layer 1. Size and shape are readable before the middle too, but weakly: 0.57 at layer 2, then
0.70 and 0.63 at layer 8. As predicted: degradation from layer 0 (0.67); background, colour and ranking from layer 1;
the trade-off from layer 4, at most 0.64. Not all of it is learnt: at layer 1, untrained copies have 0.67 to 0.79 in
count, 0.74 to 0.80 in background and 0.57 to 0.62 in colour.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from probekit.errors import ConfigError
from probekit.playground.edits import (
    DEGRADATIONS,
    degrade,
    edit_background,
    edit_colour,
    edit_count,
    edit_shape,
    edit_size,
    relayout,
    swap_colours,
    swap_places,
)
from probekit.playground.scenes import Picture, Scene, SceneKind, caption, draw, sample_scene
from probekit.store.files import write_atomically

FLIP_SHARE = 0.05
VALIDATION_SHARE = 0.15
SWAPPED_KINDS = ("colour", "background", "size", "count", "shape", "binding", "relation")
# Pairs of a kind relative to the others. A tie says nothing about accuracy, so a few are enough.
KIND_WEIGHTS: dict[str, float] = (
    {"degradation": 1.0} | dict.fromkeys(SWAPPED_KINDS, 1.0) | {"ranking": 1.0, "tie": 0.25, "tradeoff": 1.0}
)
# Utilities of the trade-off kind, in logits: a wrong attribute costs 2, full degradation costs 4.
MISMATCH_COST = 2.0
DEGRADATION_COST = 4.0
MAX_ATTEMPTS = 50_000  # in a row, before captions count as used up
# Share of captions in each split; two captions of a group must fall into the same one.
_CAPTION_LIMITS = {"train": 0.5, "validation": 0.7, "test": 1.0}


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A judgement: pictures are positions in the unit's list; label is the share preferring `first`."""

    prompt: str
    first: int
    second: int
    label: float
    n_votes: int | None = None
    utility: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Judgements that belong together, hence one group, and their pictures."""

    captions: tuple[str, ...]
    pictures: tuple[Picture, ...]
    rows: tuple[_Row, ...]


def write_pairs(out: Path, *, n_train: int, n_test: int, seed: int) -> Path:
    """Write a preference set, pictures first; the same arguments give the same bytes.

    Kinds are equally frequent in every split, except for ties, of which there are a quarter as many. Numbers are
    rounded up to whole groups, so the file holds at least as many pairs as asked for.

    Parameters
    ----------
    out
        The folder to write ``preferences.jsonl`` and ``images/`` into.
    n_train
        Number of training pairs; 15 % of them get the split ``validation``.
    n_test
        Number of test pairs.
    seed
        Determines scenes, captions' splits, sides, label flips and votes.

    Returns
    -------
    The path of ``preferences.jsonl``; where it exists, the set is complete. Beyond the general form's columns it has
    ``flipped`` (5 % of the hard labels with split ``train``), ``ranking_id``, ``n_votes`` and ``utility`` (of A minus
    B, in logits; trade-offs only).

    Raises
    ------
    ConfigError
        If the folder holds another set, or there are not enough captions for so many pairs.
    """
    n_validation = round(VALIDATION_SHARE * n_train)
    sizes = {"train": n_train - n_validation, "validation": n_validation, "test": n_test}
    seen: set[bytes | str] = set()
    lines: list[str] = []
    pictures: dict[Path, Picture] = {}
    for number, (split, size) in enumerate(sizes.items()):
        rng = np.random.default_rng([seed, 1, number])  # training of the models draws from [seed, 0]
        folder = Path("images") / split
        units = [
            (kind, index, unit)
            for kind, count in _counts(size).items()
            for index, unit in enumerate(_units(kind, count, split=split, seed=seed, rng=rng, seen=seen))
        ]
        for position in rng.permutation(len(units)):
            kind, index, unit = units[position]
            group = f"{split}-{kind}-{index}"
            files = [(folder / f"{kind}-{index:05d}-{place}.png").as_posix() for place in range(len(unit.pictures))]
            pictures |= {out / file: picture for file, picture in zip(files, unit.pictures, strict=True)}
            for row in unit.rows:
                line = _judgement(row, kind, files, split=split, group=group, rng=rng)
                lines.append(json.dumps(line))
    path = out / "preferences.jsonl"
    content = "".join(line + "\n" for line in lines).encode()
    if path.exists():
        if path.read_bytes() != content:
            message = f"{path}: holds another set of pairs; choose another folder"
            raise ConfigError(message)
        return path
    for file, picture in pictures.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file, compress_level=1)
    write_atomically(path, content)
    return path


def _counts(size: int) -> dict[str, int]:
    total = sum(KIND_WEIGHTS.values())
    return {kind: math.ceil(size * weight / total) for kind, weight in KIND_WEIGHTS.items()}


def _units(
    kind: str, count: int, *, split: str, seed: int, rng: np.random.Generator, seen: set[bytes | str]
) -> Iterator[_Unit]:
    """Yield units until they hold `count` rows, rejecting captions of other splits, and what was seen before."""
    make = _MAKERS[kind]
    rows, attempts = 0, 0
    while rows < count:
        attempts += 1
        if attempts > MAX_ATTEMPTS:
            message = (
                f"cannot draw {count} {split} pairs of kind {kind}: there are not enough captions; ask for fewer pairs"
            )
            raise ConfigError(message)
        unit = make(rng, lambda text: _split_of(text, seed) == split)
        if unit is None:
            continue
        keys: list[bytes | str] = [picture.tobytes() for picture in unit.pictures]
        if kind != "count":
            keys += unit.captions
        if len(set(keys)) < len(keys) or not seen.isdisjoint(keys):
            continue
        seen.update(keys)
        rows, attempts = rows + len(unit.rows), 0
        yield unit


def _split_of(text: str, seed: int) -> str:
    share = zlib.crc32(f"{seed}:{text}".encode()) / 2**32
    return next(split for split, limit in _CAPTION_LIMITS.items() if share < limit)


def _judgement(
    row: _Row, kind: str, files: list[str], *, split: str, group: str, rng: np.random.Generator
) -> dict[str, Any]:
    first, second, label, utility = row.first, row.second, row.label, row.utility
    # Swapped kinds have a winner on either side within the group already; everything else draws its sides.
    if kind not in SWAPPED_KINDS and rng.random() < 0.5:
        first, second, label = second, first, 1.0 - label
        utility = None if utility is None else -utility
    flipped = split == "train" and label in (0.0, 1.0) and row.n_votes is None and bool(rng.random() < FLIP_SHARE)
    return {
        "prompt": row.prompt,
        "image_a": files[first],
        "image_b": files[second],
        "label": 1.0 - label if flipped else label,
        "group": group,
        "split": split,
        "source": kind,
        "flipped": flipped,
        "ranking_id": group if kind == "ranking" else None,
        "n_votes": row.n_votes,
        "utility": utility,
    }


# Makers: one random unit of a kind, or None when a caption belongs to another split.

_Allowed = Callable[[str], bool]


def _swapped(
    edit: Callable[[Scene, np.random.Generator], Scene], kinds: tuple[SceneKind, ...]
) -> Callable[..., _Unit | None]:
    def make(rng: np.random.Generator, allowed: _Allowed) -> _Unit | None:
        scene = sample_scene(rng, kinds[int(rng.integers(len(kinds)))])
        other = edit(scene, rng)
        captions = (caption(scene), caption(other))
        if not all(map(allowed, captions)):
            return None
        rows = tuple(
            _Row(prompt=text, first=0, second=1, label=label) for text, label in zip(captions, (1.0, 0.0), strict=True)
        )
        return _Unit(captions=captions, pictures=(draw(scene), draw(other)), rows=rows)

    return make


def _degraded(rng: np.random.Generator, allowed: _Allowed) -> _Unit | None:
    scene = sample_scene(rng, _ANY[int(rng.integers(len(_ANY)))])
    text = caption(scene)
    if not allowed(text):
        return None
    clean = draw(scene)
    spoilt = degrade(clean, severity=rng.uniform(0.35, 1.0), rng=rng)
    return _Unit(captions=(text,), pictures=(clean, spoilt), rows=(_Row(prompt=text, first=0, second=1, label=1.0),))


def _ranking(rng: np.random.Generator, allowed: _Allowed) -> _Unit | None:
    scene = sample_scene(rng, _ANY[int(rng.integers(len(_ANY)))])
    text = caption(scene)
    if not allowed(text):
        return None
    pictures, severity = [draw(scene)], 0.0
    noise = int(rng.integers(2**31))
    which = DEGRADATIONS[int(rng.integers(len(DEGRADATIONS)))]
    for defect in rng.permutation(3):
        if defect == 0:
            scene = edit_colour(scene, rng)
        elif defect == 1:
            scene = edit_background(scene, rng)
        else:
            severity = rng.uniform(0.35, 1.0)
        picture = draw(scene)
        if severity:  # a defect stays the same in all worse pictures
            picture = degrade(picture, severity=severity, rng=np.random.default_rng(noise), which=which)
        pictures.append(picture)
    rows = tuple(_Row(prompt=text, first=i, second=j, label=1.0) for i in range(4) for j in range(i + 1, 4))
    return _Unit(captions=(text,), pictures=tuple(pictures), rows=rows)


def _tie(rng: np.random.Generator, allowed: _Allowed) -> _Unit | None:
    scene = sample_scene(rng, _ANY[int(rng.integers(len(_ANY)))])
    text = caption(scene)
    if not allowed(text):
        return None
    other = relayout(scene, rng)
    return _Unit(
        captions=(text,), pictures=(draw(scene), draw(other)), rows=(_Row(prompt=text, first=0, second=1, label=0.5),)
    )


def _tradeoff(rng: np.random.Generator, allowed: _Allowed) -> _Unit | None:
    scene = sample_scene(rng, _ANY[int(rng.integers(len(_ANY)))])
    text = caption(scene)
    if not allowed(text):
        return None
    wrong = (edit_colour, edit_background)[int(rng.integers(2))](scene, rng)
    severity = rng.uniform(0.05, 0.95)
    utility = MISMATCH_COST - DEGRADATION_COST * severity  # of the right but degraded picture minus the other's
    n_votes = int(rng.choice((5, 7, 9, 11)))  # odd, so that only ties have label 0.5
    votes = int(rng.binomial(n_votes, 1 / (1 + math.exp(-utility))))
    row = _Row(prompt=text, first=0, second=1, label=votes / n_votes, n_votes=n_votes, utility=utility)
    return _Unit(
        captions=(text,), pictures=(degrade(draw(scene), severity=severity, rng=rng), draw(wrong)), rows=(row,)
    )


_ANY: tuple[SceneKind, ...] = ("single", "pair")
_MAKERS: dict[str, Callable[..., _Unit | None]] = {
    "degradation": _degraded,
    "colour": _swapped(edit_colour, _ANY),
    "background": _swapped(edit_background, _ANY),
    "size": _swapped(edit_size, _ANY),
    "count": _swapped(edit_count, ("count",)),
    "shape": _swapped(edit_shape, _ANY),
    "binding": _swapped(swap_colours, ("pair",)),
    "relation": _swapped(swap_places, ("pair",)),
    "ranking": _ranking,
    "tie": _tie,
    "tradeoff": _tradeoff,
}
