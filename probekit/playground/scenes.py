"""Drawn scenes: 32 x 32 anti-aliased pictures of coloured shapes, each with its caption.

A scene is one object ("a small red circle on a white background"), two objects in a relation ("a small red circle left
of a large blue square on a black background") or one to three of a kind ("three small green crosses on a grey
background"). Everything follows from the `Scene` record: `draw` and `caption` are pure functions of it, so an edited
record gives a picture that differs from the first one in that attribute only.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

PICTURE_SIZE = 32
SUPERSAMPLE = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
    "orange": (245, 130, 30),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "grey": (150, 150, 150),
    "black": (25, 25, 25),
    "pink": (250, 190, 210),
}
SHAPES: dict[str, str] = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
}  # plurals
# Half the extent in pixels. A smaller "small" loses its shape in the VAE; a larger "large" leaves no room for two.
SIZES: dict[str, float] = {"small": 5.0, "large": 7.5}
RELATIONS: dict[str, str] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}  # opposites
NUMBERS: tuple[str, ...] = ("one", "two", "three")

SceneKind = Literal["single", "pair", "count"]
Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: what it is, and where its centre lies in pixels from the upper left corner."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture before it is drawn.

    Parameters
    ----------
    kind
        ``single``: one thing. ``pair``: two things, the first in `relation` to the second. ``count``: one to three
        things of the same shape, colour and size, captioned with their number.
    things
        The objects, in the order of the caption.
    background
        A key of `BACKGROUNDS`.
    relation
        A key of `RELATIONS`; empty unless `kind` is ``pair``.
    """

    kind: SceneKind
    things: tuple[Thing, ...]
    background: str
    relation: str = ""


def caption(scene: Scene) -> str:
    """Describe a scene completely, apart from exact positions."""
    first = scene.things[0]
    ground = f"on a {scene.background} background"
    if scene.kind == "count":
        number = len(scene.things)
        noun = first.shape if number == 1 else SHAPES[first.shape]
        return f"{NUMBERS[number - 1]} {first.size} {first.colour} {noun} {ground}"
    phrases = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in scene.things]
    return f"{f' {scene.relation} '.join(phrases)} {ground}"


def draw(scene: Scene) -> Picture:
    """Draw a scene at four times the size and average down: uint8, (32, 32, 3)."""
    extent = PICTURE_SIZE * SUPERSAMPLE
    image = Image.new("RGB", (extent, extent), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(canvas, thing)
    return np.asarray(image.reduce(SUPERSAMPLE), dtype=np.uint8)


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, radius = thing.x * SUPERSAMPLE, thing.y * SUPERSAMPLE, SIZES[thing.size] * SUPERSAMPLE
    colour = COLOURS[thing.colour]
    if thing.shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif thing.shape == "square":
        side = 0.9 * radius  # equal extent would make squares look larger than circles
        canvas.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif thing.shape == "triangle":
        canvas.polygon([(x, y - radius), (x + radius, y + 0.9 * radius), (x - radius, y + 0.9 * radius)], fill=colour)
    else:
        arm = 0.34 * radius
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def sample_scene(rng: np.random.Generator, kind: SceneKind | None = None) -> Scene:
    """Draw a random scene; half of them are pairs when `kind` is not given.

    Positions always leave room for the large size, so that a size can be edited without moving anything.
    """
    if kind is None:
        kind = _KINDS[int(np.searchsorted(_KIND_LIMITS, rng.random(), side="right"))]
    background = _pick(rng, tuple(BACKGROUNDS))
    if kind == "single":
        x, y = rng.uniform(8.0, 24.0, size=2)
        return Scene(kind=kind, things=(_thing(rng, x, y),), background=background)
    if kind == "count":
        number = int(rng.integers(1, len(NUMBERS) + 1))
        return Scene(kind=kind, things=crowd(rng, _thing(rng, 0.0, 0.0), number), background=background)
    relation = _pick(rng, tuple(RELATIONS))
    # Along the axis of the relation the two sit in different halves; across it they differ by three pixels at most.
    near, far = 8.0 + rng.uniform(-0.5, 0.5), 24.0 + rng.uniform(-0.5, 0.5)
    across = rng.uniform(9.5, 22.5) + rng.uniform(-1.5, 1.5, size=2)
    first, second = (near, far) if relation in ("left of", "above") else (far, near)
    if relation in ("left of", "right of"):
        places = ((first, across[0]), (second, across[1]))
    else:
        places = ((across[0], first), (across[1], second))
    a = _thing(rng, *places[0])
    b = _thing(rng, *places[1])
    while b.colour == a.colour or b.shape == a.shape:  # else swapping colours or places could change nothing
        b = _thing(rng, *places[1])
    return Scene(kind=kind, things=(a, b), background=background, relation=relation)


def crowd(rng: np.random.Generator, model: Thing, number: int) -> tuple[Thing, ...]:
    """Place `number` copies of a thing in distinct quarters of the picture."""
    quarters = rng.permutation(4)[:number]
    jitter = rng.uniform(-0.5, 0.5, size=(number, 2))
    return tuple(
        Thing(
            shape=model.shape,
            colour=model.colour,
            size=model.size,
            x=float(8.0 + 16.0 * (quarter % 2) + shift[0]),
            y=float(8.0 + 16.0 * (quarter // 2) + shift[1]),
        )
        for quarter, shift in zip(quarters, jitter, strict=True)
    )


_KINDS: tuple[SceneKind, ...] = ("single", "count", "pair")
_KIND_LIMITS = np.array([0.2, 0.5])  # 20 % single, 30 % count, 50 % pair


def _thing(rng: np.random.Generator, x: float, y: float) -> Thing:
    return Thing(
        shape=_pick(rng, tuple(SHAPES)),
        colour=_pick(rng, tuple(COLOURS)),
        size=_pick(rng, tuple(SIZES)),
        x=float(x),
        y=float(y),
    )


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
