"""Which formats there are, and how a file is recognised by its fields."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import pandas as pd

from probekit.errors import ConfigError, PreferenceError
from probekit.preferences import published
from probekit.preferences.readers import KNOWN, PRESETS, General, parse_columns
from probekit.preferences.tables import Opened, Table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """One shape of file of a format.

    Attributes
    ----------
    format
        Name of the format.
    needed
        Fields that each record has; by these it is recognised.
    others
        Further fields that are read.
    read
        Turns a table into pairs.
    official
        Whether a file named ``train.json``, ``test-00000.parquet`` or alike is that split of the publishers.
    packed
        Fields that hold images as bytes, and the fields that identify these images.
    """

    format: str
    needed: tuple[str, ...]
    others: tuple[str, ...]
    read: Callable[[Table], pd.DataFrame]
    official: bool = True
    packed: tuple[tuple[str, str | None], ...] = ()


def _general(table: Table, *, mapping: Mapping[str, str]) -> pd.DataFrame:
    return General(table, mapping).read()


def _preset(name: str) -> Shape:
    mapping = parse_columns(name)
    return Shape(name, tuple(mapping.values()), KNOWN, partial(_general, mapping=mapping), official=False)


def general_shape(mapping: Mapping[str, str]) -> Shape:
    """Return the general form with the columns of a mapping."""
    return Shape("general", (), (*mapping.values(), *KNOWN), partial(_general, mapping=mapping), official=False)


_MODELS = ("model1", "model2")
SHAPES = (
    Shape("hpdv2", ("prompt", "file_path", "human_preference"), (), published.hpdv2_pairs),
    Shape(
        "imagereward",
        ("prompt_id", "prompt", "image_path", "rank"),
        ("classification", "image_amount_in_total"),
        published.imagereward_rows,
    ),
    Shape("imagereward", ("prompt", "generations", "ranking"), ("id",), published.imagereward_groups),
    Shape("hpdv2", ("prompt", "image_path", "rank"), ("raw_annotations",), published.hpdv2_rankings),
    Shape("hpdv3", ("prompt", "path1", "path2"), ("choice_dist", "confidence", *_MODELS), published.hpdv3),
    Shape(
        "pickapic",
        ("caption", "image_0_uid", "image_1_uid", "label_0", "label_1"),
        ("has_label", "best_image_uid", "model_0", "model_1", "ranking_id"),
        published.pickapic,
        packed=(("jpg_0", "image_0_uid"), ("jpg_1", "image_1_uid")),
    ),
    Shape(
        "genai-bench",
        ("prompt", "left_image", "right_image", "vote_type"),
        ("left_model", "right_model"),
        published.genai_bench,
        official=False,
    ),
    *map(_preset, PRESETS),
)
FORMATS = ("general", *dict.fromkeys(shape.format for shape in SHAPES))


def choose(opened: Opened, format: str, mapping: Mapping[str, str]) -> Shape:
    """Return the shape of a file: the one asked for, or the one that its fields are of.

    Raises
    ------
    ConfigError
        If a published format is asked for together with a mapping.
    PreferenceError
        If the file is not of the format asked for.
    """
    if mapping:
        if format not in ("auto", "general"):
            msg = f"{opened.path}: columns with format {format!r}; allowed: format general, or a format alone"
            raise ConfigError(msg)
        return general_shape(mapping)
    if format == "general":
        return general_shape({})
    found = set(opened.found)
    fitting = [shape for shape in SHAPES if found.issuperset(shape.needed) and format in ("auto", shape.format)]
    if fitting:
        if format == "auto":
            logger.info("%s: read as %s, by its fields", opened.path, fitting[0].format)
        return fitting[0]
    if format == "auto" or not found:
        logger.info("%s: read as general, the fields of no published format", opened.path)
        return general_shape({})
    needed = " or ".join(", ".join(shape.needed) for shape in SHAPES if shape.format == format)
    msg = f"{opened.path}: is not {format} (found: {', '.join(opened.found)}); needed: {needed}"
    raise PreferenceError(msg)
