"""Edits of the preference set: a scene that differs in one respect, and a picture that is worse."""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from probekit.playground.scenes import (
    BACKGROUNDS,
    COLOURS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SIZES,
    Picture,
    Scene,
    Thing,
    crowd,
    sample_scene,
)

DEGRADATIONS = ("blur", "noise", "blocks", "fade")


def edit_colour(scene: Scene, rng: np.random.Generator) -> Scene:
    """Give one thing, or the whole crowd, a colour that does not occur in the scene."""
    return _edit_things(scene, rng, "colour", tuple(COLOURS))


def edit_shape(scene: Scene, rng: np.random.Generator) -> Scene:
    """Give one thing, or the whole crowd, a shape that does not occur in the scene."""
    return _edit_things(scene, rng, "shape", tuple(SHAPES))


def edit_size(scene: Scene, rng: np.random.Generator) -> Scene:
    """Give one thing, or the whole crowd, the other size."""
    chosen = _chosen(scene, rng)
    other = {size: next(name for name in SIZES if name != size) for size in SIZES}
    things = tuple(replace(t, size=other[t.size]) if i in chosen else t for i, t in enumerate(scene.things))
    return replace(scene, things=things)


def edit_background(scene: Scene, rng: np.random.Generator) -> Scene:
    """Change the background."""
    return replace(scene, background=_other(rng, tuple(BACKGROUNDS), {scene.background}))


def edit_count(scene: Scene, rng: np.random.Generator) -> Scene:
    """Add or remove things of a crowd; the others stay in place."""
    number = int(rng.choice([n for n in range(1, len(NUMBERS) + 1) if n != len(scene.things)]))
    free = [
        thing
        for thing in crowd(rng, scene.things[0], 4)
        if all(abs(thing.x - old.x) + abs(thing.y - old.y) > 8 for old in scene.things)
    ]
    return replace(scene, things=(*scene.things, *free)[:number])


def swap_colours(scene: Scene, rng: np.random.Generator) -> Scene:
    """Exchange the colours of the two things."""
    first, second = scene.things
    return replace(scene, things=(replace(first, colour=second.colour), replace(second, colour=first.colour)))


def swap_places(scene: Scene, rng: np.random.Generator) -> Scene:
    """Exchange the places of the two things, which reverses their relation."""
    first, second = scene.things
    things = (replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y))
    return replace(scene, things=things, relation=RELATIONS[scene.relation])


def relayout(scene: Scene, rng: np.random.Generator) -> Scene:
    """Place the same things anew, so that the caption stays true."""
    layout = sample_scene(rng, scene.kind)
    while layout.relation != scene.relation or len(layout.things) != len(scene.things):
        layout = sample_scene(rng, scene.kind)
    places = zip(scene.things, layout.things, strict=True)
    return replace(scene, things=tuple(replace(thing, x=place.x, y=place.y) for thing, place in places))


def degrade(picture: Picture, *, severity: float, rng: np.random.Generator, which: str | None = None) -> Picture:
    """Blur, add noise to, block or fade a picture; severity 1 is strong, 0 leaves it nearly unchanged."""
    which = which or DEGRADATIONS[int(rng.integers(len(DEGRADATIONS)))]
    pixels = picture.astype(np.float64)
    if which == "blur":
        return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.4 + 1.6 * severity)))
    if which == "noise":
        pixels += rng.normal(0.0, 5.0 + 45.0 * severity, size=pixels.shape)
    elif which == "blocks":
        blocks = pixels.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)).repeat(4, axis=0).repeat(4, axis=1)
        pixels += (0.1 + 0.9 * severity) * (blocks - pixels)
    else:
        pixels += (0.1 + 0.7 * severity) * (pixels.mean() - pixels)
    return pixels.round().clip(0, 255).astype(np.uint8)


def _edit_things(scene: Scene, rng: np.random.Generator, attribute: str, options: tuple[str, ...]) -> Scene:
    chosen = _chosen(scene, rng)
    value = _other(rng, options, {getattr(thing, attribute) for thing in scene.things})
    things = tuple(_with(t, attribute, value) if i in chosen else t for i, t in enumerate(scene.things))
    return replace(scene, things=things)


def _with(thing: Thing, attribute: str, value: str) -> Thing:
    return replace(thing, colour=value) if attribute == "colour" else replace(thing, shape=value)


def _chosen(scene: Scene, rng: np.random.Generator) -> set[int]:
    return {int(rng.integers(2))} if scene.kind == "pair" else set(range(len(scene.things)))


def _other(rng: np.random.Generator, options: tuple[str, ...], taken: set[str]) -> str:
    free = [option for option in options if option not in taken]
    return free[int(rng.integers(len(free)))]
