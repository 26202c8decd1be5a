"""From an image file to pixels, by one versioned rule.

Files are hostile until read: three formats only, one frame, a cap on pixels, and every pixel is decoded before the
image counts as good (``verify()`` passes half a JPEG).
"""

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from probekit.errors import ImageError

IMAGE_RULE = (
    "1: EXIF orientation applied, alpha on white, high byte of 16 bits, colour profiles ignored, RGB in [-1, 1]"
)
RESIZE_RULE = "1: largest centre square, Lanczos"
MAX_PIXELS = 89_478_485  # Pillow's own limit for decompression bombs
_FORMATS = ("PNG", "JPEG", "WEBP")
_ALLOWED = f"allowed: PNG, JPEG or WebP with one frame and at most {MAX_PIXELS} pixels"


def read_pixels(path: Path, digest: bytes, resolution: int) -> torch.Tensor:
    """Read an image file as pixels in [-1, 1].

    Parameters
    ----------
    path
        The image file.
    digest
        SHA-256 of its bytes; a file that changed since is refused, since its row would be a lie.
    resolution
        Side of the square in pixels.

    Returns
    -------
    Tensor
        float32, (3, resolution, resolution).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        msg = f"{path}: cannot read the image ({error.strerror})"
        raise ImageError(msg) from error
    if hashlib.sha256(data).digest() != digest:
        msg = f"{path}: the image changed since it was listed; run the command again"
        raise ImageError(msg)
    square = centre_square(_decode(path, data), resolution)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def centre_square(image: Image.Image, resolution: int) -> Image.Image:
    """Cut the largest centred square and resize it; an image that has the size already is returned unchanged."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Cutting first keeps a picture of 1 x 10^7 pixels from being blown up to its shorter side.
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def _decode(path: Path, data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                frames = getattr(image, "n_frames", 1)
                if frames != 1:
                    msg = f"{path}: the image has {frames} frames; {_ALLOWED}"
                    raise ImageError(msg)
                if image.width * image.height > MAX_PIXELS:
                    msg = f"{path}: the image has {image.width} x {image.height} pixels; {_ALLOWED}"
                    raise ImageError(msg)
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image of an allowed format, or damaged"
        msg = f"{path}: cannot decode the image ({reason}); {_ALLOWED}"
        raise ImageError(msg) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # grey with 16 bits; in colour, Pillow itself keeps the high byte only
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
