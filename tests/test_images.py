"""Tests of the way from image files to pixels: what a picture becomes, and decoding ahead in other processes."""

import hashlib
import io
import math
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from probekit.backbones import noise
from probekit.backbones.decode_ahead import PixelStream
from probekit.backbones.images import RESIZE_RULES, bucket_sizes, read_image, read_pixels, target_size
from probekit.backbones.latents import encode_batch
from probekit.errors import ImageChangedError, ImageError, ProbekitError

GRIDS = st.tuples(st.integers(1, 128), st.sampled_from([1, 4, 8, 16, 28, 64])).map(lambda n: (n[0] * n[1], n[1]))
"""(resolution, step)."""
SIDES = st.integers(1, 10_000)
QUARTERS = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (240, 240, 20)]


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def _save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def _random(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def _read(path: Path, resolution: int, resize: Any = "crop", step: int = 4) -> np.ndarray:
    return read_image(path, _digest(path), resolution=resolution, step=step, resize=resize)


@given(GRIDS)
def test_buckets_cost_at_most_the_square(grid: tuple[int, int]) -> None:
    resolution, step = grid
    sizes = bucket_sizes(resolution, step)
    assert sizes[0] == (resolution, resolution)
    assert len(set(sizes)) == len(sizes) <= 17
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert resolution**2 - step * resolution < height * width <= resolution**2
        assert resolution / 2 <= min(height, width) <= max(height, width) <= 2 * resolution


def test_buckets_at_1024_pixels() -> None:
    short = [height for height, width in bucket_sizes(1024, 64) if height < width]
    assert short == [960, 896, 832, 768, 704, 640, 576, 512]
    assert bucket_sizes(1024, 64)[-2:] == ((512, 2048), (2048, 512))
    assert bucket_sizes(16, 4) == ((16, 16), (12, 20), (20, 12), (8, 32), (32, 8))


@given(SIDES, SIDES, GRIDS)
def test_the_nearest_aspect_is_taken(width: int, height: int, grid: tuple[int, int]) -> None:
    resolution, step = grid

    def target(width: int, height: int) -> tuple[int, int]:
        return target_size(width, height, resolution=resolution, step=step, resize="bucket")

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(width / height) - math.log(size[1] / size[0]))

    sizes = bucket_sizes(resolution, step)
    assert target(width, height) in sizes
    assert distance(target(width, height)) <= min(map(distance, sizes)) + 1e-9
    assert target(height, width) == target(width, height)[::-1]
    assert target(3 * width, 3 * height) == target(width, height)
    assert target(width, width) == (resolution, resolution)
    for size in sizes:
        assert target(*size) == size[::-1]
    for resize in ("crop", "pad"):
        assert target_size(width, height, resolution=resolution, step=step, resize=resize) == (resolution, resolution)


def test_images_follow_the_rule(tmp_path: Path) -> None:
    plain = _random(6, 6)
    assert np.array_equal(_read(_save(tmp_path / "plain.png", plain), 6), plain)
    assert np.array_equal(_read(_save(tmp_path / "plain.webp", plain, lossless=True), 6), plain)
    deep = np.random.default_rng(1).integers(0, 65535, (6, 6), dtype=np.uint16)
    assert np.array_equal(_read(_save(tmp_path / "deep.png", deep), 6)[..., 0], (deep >> 8).astype(np.uint8))
    clear = np.dstack([plain, np.zeros((6, 6), np.uint8)])
    assert (_read(_save(tmp_path / "clear.png", clear), 6) == 255).all()
    wide = np.zeros((6, 30, 3), dtype=np.uint8)
    wide[:, 12:18] = plain
    assert np.array_equal(_read(_save(tmp_path / "wide.png", wide), 6), plain)
    pixels = read_pixels(tmp_path / "plain.png", _digest(tmp_path / "plain.png"), resolution=6, step=2, resize="crop")
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, plain.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)


@pytest.mark.parametrize("resize", RESIZE_RULES)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (1, 1_000_000), (1_000_000, 1), (7, 300)])
def test_tiny_and_extreme_pictures_get_their_size(height: int, width: int, resize: Any, tmp_path: Path) -> None:
    path = _save(tmp_path / "picture.png", np.full((height, width, 3), 200, np.uint8))
    pixels = _read(path, 16, resize)
    assert pixels.shape[:2] == target_size(width, height, resolution=16, step=4, resize=resize)
    assert set(np.unique(pixels)) <= ({128, 200} if resize == "pad" else {200})
    assert 200 in pixels


@pytest.mark.parametrize(("height", "width"), [(20, 60), (60, 20), (37, 23), (48, 48), (9, 11)])
def test_pad_keeps_the_whole_picture(height: int, width: int, tmp_path: Path) -> None:
    picture = np.zeros((height, width, 3), np.uint8)
    rows, columns = np.arange(height) >= height / 2, np.arange(width) >= width / 2
    picture[:] = np.array(QUARTERS, np.uint8)[2 * rows[:, None] + columns[None]]
    padded = _read(_save(tmp_path / "picture.png", picture), 48, "pad").astype(int)
    inside = (padded != 128).any(axis=2)
    high, wide = inside.any(axis=1), inside.any(axis=0)
    assert np.array_equal(inside, high[:, None] & wide[None])
    assert max(high.sum(), wide.sum()) == 48
    assert abs(high.sum() / wide.sum() / (height / width) - 1) < 0.05
    for side in (high, wide):
        assert abs(side.argmax() - side[::-1].argmax()) <= 1, "centred"
    found = padded[high][:, wide]
    for corner, colour in zip([found[0, 0], found[0, -1], found[-1, 0], found[-1, -1]], QUARTERS, strict=True):
        assert np.abs(corner - colour).max() <= 10


@pytest.mark.parametrize("resize", ["crop", "bucket"])
@pytest.mark.parametrize(("height", "width"), [(20, 61), (90, 17), (33, 32), (8, 100)])
def test_crops_are_centred(height: int, width: int, resize: Any, tmp_path: Path) -> None:
    picture = _random(height, width)
    here = _read(_save(tmp_path / "here.png", picture), 16, resize).astype(int)
    turned = _read(_save(tmp_path / "turned.png", picture[::-1, ::-1]), 16, resize)[::-1, ::-1]
    assert np.abs(here - turned).max() <= 1


def test_a_bucket_cuts_only_what_its_aspect_lacks(tmp_path: Path) -> None:
    picture = _random(8, 40)
    assert np.array_equal(_read(_save(tmp_path / "wide.png", picture), 16, "bucket"), picture[:, 4:36])
    tall = np.ascontiguousarray(picture.transpose(1, 0, 2))
    assert np.array_equal(_read(_save(tmp_path / "tall.png", tall), 16, "bucket"), tall[4:36])


SHOWN: dict[int, Any] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: stored.transpose(1, 0, 2)[:, ::-1],
    7: lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda stored: stored.transpose(1, 0, 2)[::-1],
}
"""What each EXIF orientation looks like."""


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_exif_orientation_comes_first(orientation: int, ending: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if ending == "webp" else {}
    plain = _save(tmp_path / f"plain.{ending}", _random(8, 32), **options)
    path = _save(tmp_path / f"turned.{ending}", _random(8, 32), exif=exif, **options)
    expected = SHOWN[orientation](np.asarray(Image.open(plain).convert("RGB")))
    assert np.array_equal(_read(path, 16, "bucket"), expected)


def test_bad_images_are_one_clear_line(tmp_path: Path, monkeypatch: Any) -> None:
    def fails(name: str, pattern: str, digest: bytes | None = None, *, error: type[Exception] = ImageError) -> None:
        path = tmp_path / name
        with pytest.raises(error, match=pattern) as caught:
            read_image(path, digest or _digest(path), resolution=16, step=4, resize="bucket")
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    _save(tmp_path / "whole.png", _random(64, 64))
    _save(tmp_path / "whole.jpg", _random(64, 64))
    for name in ("whole.png", "whole.jpg"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"half-{name}").write_bytes(data[: len(data) // 2])
        fails(f"half-{name}", "cannot decode the image")
    (tmp_path / "text.png").write_text("not a picture")
    fails("text.png", "not an image of an allowed format, or damaged.*allowed: PNG, JPEG or WebP")
    _save(tmp_path / "other.bmp", _random(64, 64))
    fails("other.bmp", "not an image of an allowed format")
    noisy = Image.fromarray(_random(64, 64))
    noisy.save(tmp_path / "moving.webp", save_all=True, append_images=[noisy.rotate(90)])
    fails("moving.webp", "the image has 2 frames")
    fails("whole.png", "the image changed since it was listed", digest=b"x" * 32, error=ImageChangedError)
    fails("missing.png", r"cannot read the image \(No such file", digest=b"x" * 32)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    fails("whole.png", "cannot decode the image .*decompression bomb")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr("probekit._pictures.MAX_PIXELS", 1000)
    fails("whole.png", "the image has 64 x 64 pixels")


def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Encode a black PNG that claims a size, with further chunks."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [header, *chunks, (b"IDAT", zlib.compress(bytes(64))), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _saved(format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(_random(64, 64)).save(file, format, **options)
    return file.getvalue()


def _moving(format: str) -> bytes:
    return _saved(format, save_all=True, append_images=[Image.fromarray(_random(64, 64, seed=1))])


_BOMB = b"x\0\0" + zlib.compress(bytes(10**7))
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not an image of an allowed format"),
    "bomb": (lambda: _png(60_000, 60_000), "decompression bomb"),
    "smaller bomb": (lambda: _png(12_000, 9_000), "decompression bomb"),
    "text bomb": (lambda: _png(4, 4, (b"zTXt", _BOMB)), "Decompressed data too large"),
    "profile bomb": (lambda: _png(4, 4, (b"iCCP", _BOMB)), "Decompressed data too large"),
    "EPS": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        "not an image of an allowed",
    ),
    "GIF": (lambda: _saved("GIF"), "not an image of an allowed format"),
    "TIFF": (lambda: _saved("TIFF"), "not an image of an allowed format"),
    "moving GIF": (lambda: _moving("GIF"), "not an image of an allowed format"),
    "moving PNG": (lambda: _moving("PNG"), "the image has 2 frames"),
    "moving WebP": (lambda: _moving("WEBP"), "the image has 2 frames"),
    "MPO": (lambda: _moving("MPO"), "the image has 2 frames"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused(name: str, tmp_path: Path) -> None:
    build, pattern = HOSTILE[name]
    path = tmp_path / "picture.png"
    path.write_bytes(build())
    with pytest.raises(ImageError, match=pattern) as caught:
        _read(path, 16)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    sizes = [(16, 16), (40, 23), (9, 30), (100, 20), (5, 5)] * 8
    return [_save(folder / f"{place}.png", _random(*size, seed=place)) for place, size in enumerate(sizes)]


def _stream(paths: list[Path], workers: int) -> PixelStream:
    digests = [_digest(path) for path in paths]
    return PixelStream(paths, digests, resolution=16, step=4, resize="bucket", workers=workers)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_neither_order_nor_values(workers: int, pictures: list[Path]) -> None:
    for paths in (pictures, pictures[:2], []):
        with _stream(paths, workers) as stream:
            found = list(stream)
        assert not active_children()
        assert len(found) == len(paths)
        for path, pixels in zip(paths, found, strict=True):
            assert pixels.dtype == np.float32
            assert np.array_equal(pixels, read_pixels(path, _digest(path), resolution=16, step=4, resize="bucket"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_an_error_at_its_turn(workers: int, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(pictures[0].read_bytes()[:200])
    with _stream([*pictures[:3], tmp_path / "bad.png", pictures[3]], workers) as stream:
        assert len([next(stream) for _ in range(3)]) == 3
        with pytest.raises(ImageError, match=r"bad\.png: cannot decode the image") as caught:
            next(stream)
        assert "\n" not in str(caught.value)
        assert len(list(stream)) == 1, "the caller may go on"


def test_leaving_early_ends_the_workers(pictures: list[Path]) -> None:
    with _stream(pictures, 2) as stream:
        next(stream)
        assert len(active_children()) == 2
    assert not active_children()

    def fail() -> None:
        with _stream(pictures, 2) as stream:
            next(stream)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not active_children()


def test_a_killed_worker_is_one_clear_line(pictures: list[Path]) -> None:
    with _stream(pictures, 1) as stream:
        next(stream)
        (worker,) = active_children()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(ProbekitError, match=r"^a process that decodes .* unexpectedly.*--decode-workers.*guard\)$"):
            list(stream)
    assert not active_children()


SCRIPT = """
import signal, sys, time
from pathlib import Path
from probekit.backbones.decode_ahead import PixelStream

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started to ignore it
    path, digest = Path(sys.argv[1]), bytes.fromhex(sys.argv[2])
    try:
        with PixelStream([path] * 999, [digest] * 999, resolution=16, step=4, resize="crop", workers=2) as stream:
            print("started", flush=True)
            time.sleep(int(sys.argv[3]) / 10)
            while True:
                next(stream)
                time.sleep(1)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("wait", ["0", "5"], ids=["starting", "running"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(number: int, wait: str, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(pictures[0]), _digest(pictures[0]).hex(), wait]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "started\n"
        if number == signal.SIGINT:  # Ctrl-C reaches the whole group
            os.killpg(process.pid, number)
            assert process.communicate(timeout=60) == ("interrupted\n", "")
        else:
            process.send_signal(number)
            process.communicate(timeout=60)  # returns only once no worker holds the output any more


def test_decoding_processes_need_no_torch() -> None:
    code = "import sys, probekit.backbones.decode_ahead; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "diffusers", "transformers", "pandas", "scipy"}


def test_batches_of_the_vae_depend_on_the_size_only() -> None:
    assert [encode_batch(side, side) for side in (16, 64, 128, 256, 1024)] == [16, 16, 4, 1, 1]
    assert encode_batch(64, 128) == encode_batch(128, 64) == 8


def test_noise_of_all_shapes_is_cut_from_one_canvas() -> None:
    canvas = noise(0, "tree", 0, (4, 16, 16))
    assert torch.equal(noise(0, "tree", 0, (4, 16, 16), canvas=(16, 16)), canvas)
    for high, wide in [(8, 8), (4, 16), (16, 4), (6, 10)]:
        top, left = (16 - high) // 2, (16 - wide) // 2
        part = noise(0, "tree", 0, (4, high, wide), canvas=(16, 16))
        assert torch.equal(part, canvas[:, top : top + high, left : left + wide])
        assert part.is_contiguous()
