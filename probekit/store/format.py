"""The format of a feature store: names, canonical JSON, fingerprint and the dtype rule.

``FORMAT.md`` beside this file is the specification; this module and ``records.py`` are its only home in code.
m = rows of a shard, d = channels of a feature vector.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from probekit.errors import StoreError, VersionError
from probekit.store.half import convert

FORMAT = "probekit-features"
FORMAT_VERSION = "1.3"
FORMAT_MAJOR = 1
IMAGE_DIGESTS = "image_digests.parquet"  # a dump's cache beside the shards
STATUS_OK, STATUS_UNREADABLE, STATUS_NON_FINITE = 0, 1, 2

FP16_LIMIT = 32752.0  # half of float16's largest value
FP16_NOISE_RATIO = 1e-3
FP16_PAIRS = 2048
_CHOICE_VALUES = 2**16  # looked at together: few enough to stay in the cache
DTYPE_POLICY = f"float16 if absmax < {FP16_LIMIT:.0f} and p99 pair noise ratio <= {FP16_NOISE_RATIO}, else float32"

# Made once: a scan encodes some fifty texts for each shard.
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

SEAL = "self_sha256"
UNBOUND = ("1.0", "1.1")  # versions whose shards do not hold the digest of their record, nor judgements a sidecar
RECORD = "record_sha256"  # attribute of a shard's root: what its sidecar says, so that the two cannot be parted
_OF_THE_FILE = ("bytes", "sha256", "meta_sha256")  # not in that digest, since they depend on it
# Those members and the seal as they stand in a sidecar, where `sigma` comes last and so a comma follows each; in a text
# the quotes would be escaped.
_MEMBER = re.compile(rf'"({"|".join((*_OF_THE_FILE, SEAL))})":("[^"\\\\]*"|-?[0-9]+),'.encode())
_NOT_SEALED = "not a record that carries its own SHA-256"
MAX_METADATA_BYTES = 2**26  # of a shard, outside its datasets: more would only keep a reader busy
SIGMA_RESOLUTION = "sigma_resolution"  # member of ``describe``

# The tables of a shard: dataset -> (dtype, length in terms of (rows, prompts), further dimension or none).
TABLES: dict[str, tuple[str, str]] = {
    "rows/row_id": ("|u1", "rows x 32"),
    "rows/image_sha256": ("|u1", "rows x 32"),
    "rows/prompt_index": ("<i8", "rows"),
    "rows/image_id_utf8": ("|u1", "any"),
    "rows/image_id_offsets": ("<i8", "rows + 1"),
    "rows/width": ("<i8", "rows"),
    "rows/height": ("<i8", "rows"),
    "rows/file_bytes": ("<i8", "rows"),
    "rows/status": ("|u1", "rows"),
    "prompts/text_utf8": ("|u1", "any"),
    "prompts/text_offsets": ("<i8", "prompts + 1"),
    "prompts/sha256": ("|u1", "prompts x 32"),
}


def canonical_json(value: Any) -> str:
    """Write a JSON-plain value in the one form that is hashed: sorted keys, no spaces, no NaN.

    Raises
    ------
    TypeError, ValueError
        If the value is not JSON-plain.
    """
    return _ENCODER.encode(value)


def fingerprint(config: Mapping[str, Any]) -> str:
    """Hex SHA-256 of the canonical JSON of a configuration."""
    return _sha256(canonical_json(dict(config)).encode())


def seal(content: Mapping[str, Any]) -> bytes:
    """Encode a record as canonical JSON that carries its own SHA-256."""
    bare = {key: value for key, value in content.items() if key != SEAL}
    return canonical_json(bare | {SEAL: _sha256(canonical_json(bare).encode())}).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """Decode a sealed record.

    Raises
    ------
    ValueError
        If a single byte differs from what ``seal`` wrote.
    """
    try:
        content: dict[str, Any] = json.loads(data)
        intact = isinstance(content, dict) and seal(content) == data
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(_NOT_SEALED)
    return content


def record_digest(sidecar: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what a sidecar says of its shard, but for the size and digests of the file."""
    left_out = (*_OF_THE_FILE, SEAL)
    return _sha256(canonical_json({key: value for key, value in sidecar.items() if key not in left_out}).encode())


def unsealed_record_digest(data: bytes) -> str:
    """Check the seal of a sidecar and return its `record_digest`, both from its bytes: a scan does so for each shard.

    Raises
    ------
    ValueError
        If the bytes are not those that were sealed.
    """
    found = dict(_MEMBER.findall(data))
    sealed, times = _MEMBER.subn(lambda one: b"" if one[1] == SEAL.encode() else one[0], data)
    if times != len(found) or len(found) != len(_OF_THE_FILE) + 1:
        raise ValueError(_NOT_SEALED)
    if found[SEAL.encode()] != f'"{_sha256(sealed)}"'.encode():
        raise ValueError(_NOT_SEALED)
    return _sha256(_MEMBER.sub(b"", data))


def refuse_twice(data: bytes) -> None:
    """Refuse JSON in which a key stands twice in an object, or that holds NaN or an infinity.

    Raises
    ------
    ValueError
        If so.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) < len(pairs):
            raise ValueError(_NOT_SEALED)

    def no_number(_: str) -> NoReturn:
        raise ValueError(_NOT_SEALED)

    json.loads(data, object_pairs_hook=distinct, parse_constant=no_number)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_version(where: str, content: Mapping[str, Any]) -> None:
    """Accept every minor version of this major version.

    Raises
    ------
    StoreError
        If the record is of another format.
    VersionError
        If it is of another major version.
    """
    version = str(content.get("format_version"))
    if content.get("format") != FORMAT:
        msg = f"{where}: format is {content.get('format')!r}; allowed: {FORMAT!r}"
        raise StoreError(msg)
    if version.split(".")[0] != str(FORMAT_MAJOR):
        msg = (
            f"{where}: format version is {version}; this probekit reads {FORMAT_MAJOR}.x: use one that reads {version}"
        )
        raise VersionError(msg)


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the format itself decides to a caller's configuration, as JSON would give it back.

    Raises
    ------
    ValueError
        If ``layers`` or ``poolings``, which the format needs, are absent, or ``pooling_layers`` does not fit them.
    """
    if not config.get("layers") or not config.get("poolings"):
        msg = "config needs 'layers': [{'index', 'name', 'stream'}, ...] and 'poolings': {name: definition}"
        raise ValueError(msg)
    check_pooling_layers(config)
    own = {"format": f"{FORMAT}/{FORMAT_MAJOR}", "dtype_policy": DTYPE_POLICY}
    return dict(json.loads(canonical_json(dict(config) | own)))


def check_pooling_layers(config: Mapping[str, Any]) -> None:
    """Check which poolings a configuration has at which layers.

    Raises
    ------
    ValueError
        If ``pooling_layers`` names an unknown pooling, or not some of the layers in their order, or ``inputs`` names
        something else than some of the poolings, at the first layer.
    """
    layers = [layer["index"] for layer in config["layers"]]
    inputs = config.get("inputs", [])
    elsewhere = [
        name for name in inputs if name not in config["poolings"] or layers_of(config, name) != config["layers"][:1]
    ]
    if elsewhere or not config["poolings"].keys() - set(inputs):
        msg = f"inputs: {elsewhere or inputs} should be some but not all of the poolings, at layer {layers[0]} only"
        raise ValueError(msg)
    for pooling, some in config.get("pooling_layers", {}).items():
        in_order = [layer for layer in layers if layer in some]
        if pooling not in config["poolings"] or not some or some != in_order or some == layers:
            msg = (
                f"pooling_layers: {pooling!r} is at {some}; allowed: some but not all of the layers {layers}, in their "
                f"order, for one of {', '.join(config['poolings'])}"
            )
            raise ValueError(msg)


def rows_per_shard(*, values_per_row: int, shard_bytes: int) -> int:
    """Rows that fit into one shard when every value takes 4 bytes.

    Parameters
    ----------
    values_per_row
        Sum of the widths of all feature datasets.
    shard_bytes
        Largest shard.
    """
    return max(1, shard_bytes // (4 * values_per_row))


def block_name(row_ids: list[str] | tuple[str, ...]) -> str:
    """Name of the block of these rows in this order: 32 hex digits of the SHA-256 of their keys."""
    return hashlib.sha256(bytes.fromhex("".join(row_ids))).hexdigest()[:32]


def plan_name(blocks: list[list[str]]) -> str:
    """Name of the plan of these blocks: 32 hex digits of the SHA-256 of their canonical JSON."""
    return hashlib.sha256(canonical_json(blocks).encode()).hexdigest()[:32]


def dataset_name(pooling: str, layer: int) -> str:
    """HDF5 path of one layer's features, without the leading slash."""
    return f"features/{pooling}/{layer:03d}"


def layers_of(config: Mapping[str, Any], pooling: str) -> list[dict[str, Any]]:
    """Layers of a configuration at which a pooling exists: all, but for poolings that ``pooling_layers`` names."""
    layers: Sequence[dict[str, Any]] = config["layers"]
    some = config.get("pooling_layers", {}).get(pooling)
    return [layer for layer in layers if some is None or layer["index"] in some]


def feature_keys(config: Mapping[str, Any]) -> set[tuple[str, int]]:
    """(pooling, layer) of every feature dataset that a shard of this configuration holds."""
    return {(pooling, layer["index"]) for pooling in config["poolings"] for layer in layers_of(config, pooling)}


class Figures(NamedTuple):
    """What the dtype rule saw: largest magnitude, p99 noise ratio of float16, noise of what is stored."""

    absmax: float
    noise_ratio: float | None
    quantisation_noise: float


def first_of_pairs(ok: NDArray[np.bool_], prompt_index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of the first rows of all pairs: neighbours of one prompt that both count."""
    return np.flatnonzero(ok[:-1] & ok[1:] & (prompt_index[:-1] == prompt_index[1:]))


def choose_dtype(
    values: NDArray[np.float32], ok: NDArray[np.bool_], prompt_index: NDArray[np.int64]
) -> tuple[str, Figures]:
    """Decide whether float16 is safe for a probe, which sees differences between images of one prompt.

    Parameters
    ----------
    values
        Features (m, d).
    ok
        Rows (m,) that count.
    prompt_index
        Prompt of each row (m,), rows of one prompt adjacent.

    Returns
    -------
    dtype
        ``<f2`` or ``<f4``.
    figures
        ``noise_ratio`` is None where no pair of rows shares a prompt or float16 would overflow: nothing shows that
        float16 is safe then, so float32 is kept. ``quantisation_noise`` is the median over channels of the RMS
        rounding error of a pair difference, 0 for float32.
    """
    where = True if ok.all() else ok[:, None]
    absmax = float(max(values.max(where=where, initial=0), -values.min(where=where, initial=0)))
    first = first_of_pairs(ok, prompt_index)
    if not (absmax < FP16_LIMIT and len(first)):
        return "<f4", Figures(absmax, None, 0.0)
    if len(first) > FP16_PAIRS:
        first = first[np.linspace(0, len(first) - 1, FP16_PAIRS).astype(np.int64)]
    signal, noise = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    step = max(1, _CHOICE_VALUES // values.shape[1])
    # Used again for every piece: new memory of this size would come from the system each time.
    sides, lost = (np.empty((2, step, values.shape[1]), np.float32) for _ in range(2))
    half, difference = np.empty(sides[0].size, np.float16), np.empty(sides[0].shape)
    for start in range(0, len(first), step):
        part = first[start : start + step]
        for side, (pair, error) in enumerate(zip(sides, lost, strict=True)):
            np.take(values, part + side, axis=0, out=pair[: len(part)], mode="clip")  # "clip": without a copy
            _rounding_errors(pair[: len(part)], error[: len(part)], half)
        # Errors fit into float32; differences and their squares need float64.
        here = difference[: len(part)]
        signal = _add_squares(signal, _difference(sides, here))
        noise = _add_squares(noise, _difference(lost, here))
    # Second moments, not variances: which row of a pair comes first is arbitrary.
    # A channel that never differs within a pair rounds to no difference either: 0 / 0 is no noise.
    ratio = float(np.quantile(np.divide(noise, signal, out=np.zeros_like(noise), where=signal > 0), 0.99))
    if ratio > FP16_NOISE_RATIO:
        return "<f4", Figures(absmax, ratio, 0.0)
    return "<f2", Figures(absmax, ratio, float(np.median(np.sqrt(noise / len(first)))))


def _rounding_errors(values: NDArray[np.float32], out: NDArray[np.float32], half: NDArray[np.float16]) -> None:
    """Fill `out` with what rounding to float16 adds to contiguous values; `half` is memory to work in."""
    half = half[: values.size]
    convert(values.reshape(-1), half)
    convert(half, out.reshape(-1))
    np.subtract(out, values, out=out)


def _difference(sides: NDArray[np.float32], out: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fill `out` (n, d) with first minus second of the first n of two sides (2, at least n, d)."""
    return np.subtract(sides[0, : len(out)], sides[1, : len(out)], out=out, dtype=np.float64)


def _add_squares(total: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add the squares of values (n, d) to totals (d,) row by row, so that the size of a piece changes nothing."""
    squares = np.square(values, out=values)
    squares[0] += total
    added: NDArray[np.float64] = squares.sum(axis=0)
    return added
