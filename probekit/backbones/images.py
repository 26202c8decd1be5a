"""From an image file to pixels, by versioned rules; what counts as an image is in `probekit._pictures`.

Nothing here needs torch: decoding processes start quickly.
"""

import hashlib
import io
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from probekit._pictures import FORMATS, opened, to_rgb, unreadable
from probekit.errors import ImageChangedError

IMAGE_RULE = (
    "1: EXIF orientation applied, alpha on white, high byte of 16 bits, colour profiles ignored, RGB in [-1, 1]"
)
Resize = Literal["crop", "pad", "bucket"]
RESIZE_RULES: dict[str, str] = {
    "crop": "1: largest centre square, Lanczos",
    "pad": "1: whole image, Lanczos to the longer side, centred on grey 128",
    "bucket": "1: nearest aspect of up to 17 sizes from 1:4 to 4:1 of at most resolution**2 pixels, sides in whole "
    "steps; largest centre part of that aspect, Lanczos",
}
"""How an image gets its size; the text is part of fingerprints and cache keys."""

_GREY = 128  # the middle of the range, as what fills up a batch: white or black bars would be the strongest edges
_SIZES = 16  # a bucket's short side goes down by a 16th of the resolution, as SDXL's 64 of 1024 pixels


@cache
def bucket_sizes(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """Return the (height, width) that the rule ``bucket`` chooses from, the square first.

    Short sides go from the resolution down to its half; the long side is the largest that keeps at most resolution**2
    pixels, so no bucket costs more than the square, and none has a side above twice the resolution.

    Parameters
    ----------
    resolution
        Side of the square in pixels, a multiple of `step`.
    step
        What both sides are multiples of: the pixels of one token of the transformer.
    """
    stride = step * -(-resolution // (_SIZES * step))
    sizes = [(resolution, resolution)]
    for short in range(resolution - stride, (resolution - 1) // 2, -stride):
        long = resolution**2 // short // step * step
        sizes += [(short, long), (long, short)]
    return tuple(sizes)


def target_size(width: int, height: int, *, resolution: int, step: int, resize: Resize) -> tuple[int, int]:
    """Return the (height, width) in pixels that an image gets.

    Parameters
    ----------
    width, height
        Size of the image with its EXIF orientation applied.
    resolution, step
        See `bucket_sizes`.
    resize
        Name of one of `RESIZE_RULES`.
    """
    if resize != "bucket":
        return resolution, resolution

    def distance(size: tuple[int, int]) -> Fraction:  # |log ratio| as a ratio of integers, so that ties are exact
        ratio = Fraction(width * size[0], height * size[1])
        return max(ratio, 1 / ratio)

    return min(bucket_sizes(resolution, step), key=distance)


def header(path: Path) -> tuple[int, int]:
    """Return the (width, height) that the header of a readable image states."""
    with Image.open(path, formats=FORMATS) as image:
        return image.size


def read_image(path: Path, digest: bytes, *, resolution: int, step: int, resize: Resize) -> NDArray[np.uint8]:
    """Read an image file and give it its size.

    Parameters
    ----------
    path
        The image file.
    digest
        SHA-256 of its bytes; a file that changed since is refused, since its row would be a lie.
    resolution, step, resize
        See `target_size`.

    Returns
    -------
    array
        (H, W, 3), RGB.

    Raises
    ------
    ImageError
        If the file is missing, damaged or refused.
    ImageChangedError
        If it has other bytes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    if hashlib.sha256(data).digest() != digest:
        msg = f"{path}: the image changed since it was listed; run the command again"
        raise ImageChangedError(msg)
    with opened(path, io.BytesIO(data)) as file:
        file.load()
        image = to_rgb(ImageOps.exif_transpose(file))
    height, width = target_size(*image.size, resolution=resolution, step=step, resize=resize)
    return np.array(_pad(image, resolution) if resize == "pad" else _cover(image, height, width))


def to_pixels(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turn (H, W, 3) bytes into float32 (3, H, W) in [-1, 1]."""
    return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / np.float32(127.5) - np.float32(1)


def read_pixels(path: Path, digest: bytes, *, resolution: int, step: int, resize: Resize) -> NDArray[np.float32]:
    """Read an image file as pixels in [-1, 1], float32 (3, H, W); see `read_image`."""
    return to_pixels(read_image(path, digest, resolution=resolution, step=step, resize=resize))


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut the largest centred part of an aspect and resize it; what has the size already is unchanged."""
    across, down = min(image.width, image.height * width / height), min(image.height, image.width * height / width)
    left, top = (image.width - across) / 2, (image.height - down) / 2
    # Cutting first keeps a picture of 1 x 10^7 pixels from being blown up to its shorter side.
    return image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + across, top + down))


def _pad(image: Image.Image, resolution: int) -> Image.Image:
    """Fit a whole image into the square; what is narrower than a pixel then stays one pixel wide."""
    width, height = (max(1, round(side * resolution / max(image.size))) for side in image.size)
    square = Image.new("RGB", (resolution, resolution), (_GREY, _GREY, _GREY))
    fitted = image.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(fitted, ((resolution - width) // 2, (resolution - height) // 2))
    return square
