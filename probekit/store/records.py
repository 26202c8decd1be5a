"""The sealed records of a feature store: exact types, every rule that needs no other file checked on reading.

``FORMAT.md`` says what each member means.
"""

import math
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from probekit._types import RESOLVED_RATIO, canonical_sigma
from probekit.store import format as fmt

Count = Annotated[int, Field(ge=0, lt=2**63)]
Hex64 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Format = Literal["probekit-features"]
Version = Annotated[str, Field(pattern=rf"^{fmt.FORMAT_MAJOR}\.")]


class _Record(BaseModel):
    """A record of the format: exact types, finite numbers, unknown members ignored."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


R = TypeVar("R", bound=_Record)


class _Layer(_Record):
    index: Count
    name: str
    stream: str


class _Config(_Record):
    format: Literal["probekit-features/1"]
    dtype_policy: str
    layers: list[_Layer] = Field(min_length=1)
    poolings: dict[str, str] = Field(min_length=1)
    pooling_layers: dict[str, list[Count]] = {}
    inputs: list[str] = []

    @model_validator(mode="after")
    def _poolings_fit(self) -> "_Config":
        fmt.check_pooling_layers(self.model_dump())
        return self


class _Resolution(_Record):
    ratio: float | None
    resolved: bool | None
    rows: Count
    note: str

    @model_validator(mode="after")
    def _follows_from_ratio(self) -> "_Resolution":
        if self.resolved is not (None if self.ratio is None else self.ratio >= RESOLVED_RATIO):
            msg = f"resolved is {self.resolved} at a ratio of {self.ratio}"
            raise ValueError(msg)
        return self


def _noise_level(text: str) -> str:
    if text == "0" or canonical_sigma(text) != text:
        msg = f"{text!r} is no noise level above 0 in its one form"
        raise ValueError(msg)
    return text


class _Describe(_Record):
    name: str = ""
    n_blocks: Count = 0
    width: Count = 0
    n_parameters: Count | None = None
    random_weights: str | None = None
    training_images: Count | None = None
    prompts: str = "real"
    imported: bool = False
    sigma_resolution: dict[Annotated[str, AfterValidator(_noise_level)], _Resolution] = {}


class StoreFile(_Record):
    """Content of ``store.json`` as far as a reader relies on it; see FORMAT.md."""

    fingerprint: Hex64
    config: _Config
    describe: _Describe


def _distinct(rows: list[str]) -> list[str]:
    if len(set(rows)) != len(rows):
        msg = "a row stands there twice"
        raise ValueError(msg)
    return rows


class _Plan(_Record):
    format: Format = "probekit-features"
    format_version: Version = fmt.FORMAT_VERSION
    blocks: list[Annotated[list[Hex64], Field(min_length=1), AfterValidator(_distinct)]]


class JudgementsSidecar(_Record):
    """What is said of a set of judgements."""

    format: Format
    format_version: Version
    name: str
    bytes: Count
    sha256: Hex64


class DatasetRecord(_Record):
    """What a sidecar says of one dataset; the last four fields are given for features only."""

    dtype: Literal["<f2", "<f4", "<i8", "|u1"]
    shape: list[Count] = Field(min_length=1, max_length=2)
    offset: Count | None  # none where the dataset is empty
    nbytes: Count
    crc32: Count
    absmax: float | None = None
    noise_ratio: float | None = None
    quantisation_noise: float | None = None
    nonfinite_rows: int | None = None


class Sidecar(_Record):
    """Commit record of a shard; see FORMAT.md for the meaning of each field."""

    format: str
    format_version: str
    fingerprint: str
    block: str
    sigma: str
    draw: Count
    n_rows: Count
    n_prompts: Count
    rows_sha256: Hex64
    bytes: Count
    sha256: Hex64
    meta_sha256: Hex64
    datasets: dict[str, DatasetRecord]
    self_sha256: Hex64
    record_sha256: Hex64  # not stored: what the file must say of this record

    @model_validator(mode="after")
    def _tables_fit(self) -> "Sidecar":
        rows, prompts = self.n_rows, self.n_prompts
        lengths = {
            "rows": [rows],
            "rows + 1": [rows + 1],
            "rows x 32": [rows, 32],
            "prompts + 1": [prompts + 1],
            "prompts x 32": [prompts, 32],
        }
        for name, (dtype, length) in fmt.TABLES.items():
            record = self.datasets.get(name)
            if record is None or record.dtype != dtype or record.shape != lengths.get(length, record.shape[:1]):
                msg = f"dataset {name} should be {dtype} with {length} entries"
                raise ValueError(msg)
        taken, ranges = 0, list[tuple[int, int]]()
        for name, record in self.datasets.items():
            dtype, shape, nbytes = record.dtype, record.shape, record.nbytes
            if nbytes != math.prod(shape) * int(dtype[-1]):  # dtypes are spelled as numpy does
                msg = f"{nbytes} bytes do not hold {shape} of {dtype}"
                raise ValueError(msg)
            if (record.offset is None) != (nbytes == 0):
                msg = "an offset is given if and only if the dataset holds bytes"
                raise ValueError(msg)
            if name.startswith("features/") and (dtype not in ("<f2", "<f4") or len(shape) != 2 or shape[0] != rows):
                msg = f"dataset {name} should be <f2 or <f4 with rows x d entries"
                raise ValueError(msg)
            taken += nbytes
            if record.offset is not None:
                ranges.append((record.offset, nbytes))
        if self.rows_sha256[:32] != self.block:
            msg = "the block is not named after its rows"
            raise ValueError(msg)
        if self.bytes - taken > fmt.MAX_METADATA_BYTES:
            msg = f"more than {fmt.MAX_METADATA_BYTES} bytes outside of datasets"
            raise ValueError(msg)
        ranges = [*sorted(ranges), (self.bytes, 0)]
        if any(offset + nbytes > after for (offset, nbytes), (after, _) in pairwise(ranges)):
            msg = "datasets overlap or pass the end of the file"
            raise ValueError(msg)
        return self


def parse_sidecar(data: bytes) -> Sidecar:
    """Decode a sidecar.

    Raises
    ------
    ValueError
        In one line, if it is not intact or does not fit the format.
    """
    digest = fmt.unsealed_record_digest(data)
    # decoded and checked in one go, which takes a third of the time of both
    data = data[:-1] + f',"{fmt.RECORD}":"{digest}"}}'.encode()
    sidecar = _checked(Sidecar, data)
    keys = sum(len(record.model_fields_set) + 1 for record in sidecar.datasets.values())
    if data.count(b'":') != keys + len(sidecar.model_fields_set):
        fmt.refuse_twice(data)  # or it holds members of a later version
    return sidecar


def parse_judgements_sidecar(data: bytes) -> JudgementsSidecar:
    """Decode the sidecar of a set of judgements.

    Raises
    ------
    ValueError
        In one line, if it is not intact or does not fit the format.
    """
    return _checked(JudgementsSidecar, fmt.unseal(data))


def parse_store_file(content: dict[str, Any]) -> None:
    """Check the content of ``store.json``.

    Raises
    ------
    ValueError
        In one line, if a member is absent or of the wrong kind, or the fingerprint is not that of the configuration.
    """
    if _checked(StoreFile, content).fingerprint != fmt.fingerprint(content["config"]):
        msg = "the fingerprint is not that of the configuration beside it"
        raise ValueError(msg)


def parse_plan(data: bytes, *, name: str) -> list[list[str]]:
    """Decode a plan that is stored under this name.

    Returns
    -------
    list of list of str
        Row keys of each block.

    Raises
    ------
    ValueError
        In one line, if it is not intact or not the plan of this name.
    """
    blocks = _checked(_Plan, fmt.unseal(data)).blocks
    if fmt.plan_name(blocks) != name:
        msg = "not the plan of this name"
        raise ValueError(msg)
    return blocks


def _checked(model: type[R], content: dict[str, Any] | bytes) -> R:
    try:
        return model.model_validate_json(content) if isinstance(content, bytes) else model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        msg = f"{'.'.join(str(part) for part in first['loc']) or 'record'}: {first['msg']}"
        raise ValueError(" ".join(msg.split())) from None
