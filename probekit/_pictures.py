"""Image files that are opened: which count as images, and their pixels as RGB.

Files are hostile until read: three formats only, one frame, a cap on pixels, and every pixel is decoded before the
image counts as good (``verify()`` passes half a JPEG).
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from probekit.errors import ImageError

MAX_PIXELS = 89_478_485  # Pillow's own limit for decompression bombs
FORMATS = ("PNG", "JPEG", "WEBP")
_ALLOWED = f"allowed: PNG, JPEG or WebP with one frame and at most {MAX_PIXELS} pixels"


def unreadable(path: Path, error: OSError) -> ImageError:
    """Say that the file itself cannot be read."""
    return ImageError(f"{path}: cannot read the image ({error.strerror})")


@contextmanager
def opened(path: Path, file: io.BytesIO) -> Iterator[Image.Image]:
    """Open an image that passes the checks of its header; whatever fails while it is open is one clear line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                frames = getattr(image, "n_frames", 1)
                if frames != 1:
                    msg = f"{path}: the image has {frames} frames; {_ALLOWED}"
                    raise ImageError(msg)
                if image.width * image.height > MAX_PIXELS:
                    msg = f"{path}: the image has {image.width} x {image.height} pixels; {_ALLOWED}"
                    raise ImageError(msg)
                yield image
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image of an allowed format, or damaged"
        msg = f"{path}: cannot decode the image ({reason}); {_ALLOWED}"
        raise ImageError(msg) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Give colours (H, W, 3 bytes): the high byte of 16 bits, transparent parts on white."""
    if image.mode.startswith("I"):  # grey with 16 bits; in colour, Pillow itself keeps the high byte only
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
