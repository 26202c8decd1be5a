"""Which rows of the tidy frame a figure or a table shows: one setting, one entry for each model, its own controls.

A setting is one noise level, one noise draw and one pooling among others: rows of several are never drawn as one.
Imported features know none of the three, so they belong to every setting.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import pandas as pd

from probekit._types import RESOLVED_RATIO
from probekit.results import ALL_SOURCES, JOINED, UNPROBED, as_they_are

if TYPE_CHECKING:
    Mask = pd.Series[bool]
else:  # the subscript exists for type checkers only
    Mask = pd.Series

CHOSEN = "chosen layer"
ALL_LAYERS = "all layers"
OUTPUT = "output point"
RANDOM, PROMPTS = ("init", "shuffled"), ("empty-prompts", "shuffled-prompts")

_TRAINING_LENGTH = re.compile(r"-[^-]*\d[^-]*$")
_TRAINING_SEED = re.compile(r"[-_.]?(?:seed|run)[-_]?\d+$")
_CONTROL_SEED = r":\d+"


@dataclass(frozen=True)
class Setting:
    """One value for everything that is neither a backbone, a control, a layer set, a split nor a source."""

    dataset: str
    protocol: str
    sigma: str
    draw: int
    pooling: str
    head: str
    seed: int


@dataclass(frozen=True)
class Model:
    """Backbones shown as one: a single backbone, or training seeds of the same shape and training length.

    Attributes
    ----------
    label
        What figures and tables call it.
    backbones
        Names in the frame.
    shape
        Blocks, width and parameters (None if unknown).
    images
        Training images, where known.
    imported
        Whether its features were computed elsewhere: set beside the backbones, and never one end of an effect of size.
    """

    label: str
    backbones: tuple[str, ...]
    shape: tuple[int, int, int | None]
    images: int | None
    imported: bool = False

    @property
    def name(self) -> str:
        """The name that its backbones share."""
        return self.backbones[0] if len(self.backbones) == 1 else _TRAINING_SEED.sub("", self.backbones[0])

    @property
    def n_blocks(self) -> int:
        """Blocks of the transformer; 0 for one imported layer without a depth."""
        return self.shape[0]

    @property
    def parameters(self) -> int | None:
        """Parameters of the transformer, or of the network whose features were imported where they are known."""
        return self.shape[2]


def probed(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of heads on features as they are: baselines, scores and altered fits have tables of their own."""
    return as_they_are(frame[~frame["head_kind"].isin(UNPROBED)])


def unsliced(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of all pairs and of the kinds that the file names; other slices have a table of their own."""
    return frame[frame["slice_by"].isin(("all", "source"))]


def joined_setting(frame: pd.DataFrame) -> Mask:
    """Tell of each row whether its head reads several noise levels or poolings side by side."""
    return frame["sigma"].str.contains(JOINED, regex=False) | frame["pooling"].str.contains(JOINED, regex=False)


def settings(frame: pd.DataFrame) -> list[Setting]:
    """Return the primary setting of each data set: what the run lists first, with a linear head if any.

    One noise level and one pooling come before several side by side, and a head that was fitted on single layers before
    others, since depth is drawn with it.

    The rows of a results table are in the order of the run's configuration.
    """
    frame, found = probed(frame), []
    for dataset in frame["dataset"].unique():
        rows = frame[frame["dataset"] == dataset]
        rows = rows if rows["imported"].all() else rows[~rows["imported"]]
        joined = joined_setting(rows)
        rows = rows if joined.all() else rows[~joined]
        unresolved = rows["sigma_ratio"] < RESOLVED_RATIO
        rows = rows if unresolved.all() else rows[~unresolved]  # a noise level that is resolved leads
        single, linear = rows["combination"] == "single", rows["head_kind"] == "linear"
        first = next(part for part in (rows[single & linear], rows[single], rows[linear], rows) if len(part)).iloc[0]
        found.append(
            Setting(
                dataset=str(dataset),
                protocol=str(first["protocol"]),
                sigma=str(first["sigma"]),
                draw=int(first["draw"]),
                pooling=str(first["pooling"]),
                head=str(first["head"]),
                seed=int(first["seed"]),
            )
        )
    return found


def narrow(
    frame: pd.DataFrame,
    setting: Setting | None = None,
    *,
    any_head: bool = False,
    any_level: bool = False,
    slices: bool = False,
) -> pd.DataFrame:
    """Keep the rows of one setting (default: the first); with `any_head`, of every head and seed in it.

    With `any_level`, also those of every other noise level, draw and pooling.

    Slices other than the kinds that the file names are there with `slices` only, and baselines never. Imported features
    are kept whatever the noise level, draw and pooling of the setting.
    """
    wanted = asdict(setting or settings(frame)[0])
    frame = probed(frame) if slices else unsliced(probed(frame))
    if any_head:
        del wanted["head"], wanted["seed"]
    if any_level:
        del wanted["sigma"], wanted["draw"], wanted["pooling"]
    for column, value in wanted.items():
        same = frame[column] == value
        frame = frame[same | frame["imported"]] if column in ("sigma", "draw", "pooling") else frame[same]
    return frame


def reported_rows(frame: pd.DataFrame, source: str = ALL_SOURCES) -> pd.DataFrame:
    """Keep the rows that may be reported: the test split, all sources together or one of them."""
    slicing = "all" if source == ALL_SOURCES else "source"
    return frame[(frame["split"] == "test") & (frame["slice_by"] == slicing) & (frame["source"] == source)]


def all_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows whose head sees every layer concatenated at which the pooling exists, without the output point."""
    last = frame["layer_set"].str.split("+").str[-1].astype("int64")
    every = (frame["n_layers"] == frame["pooling_layers"]) & (last <= frame["n_blocks"])
    return frame[(frame["combination"] == "concat") & every]


def single_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of single layers, without the output point."""
    return frame[(frame["combination"] == "single") & (frame["layer"] <= frame["n_blocks"])]


def output_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of the output point: the tokens entering the output projection, a function of the last layer."""
    return frame[(frame["combination"] == "single") & (frame["layer"] > frame["n_blocks"])]


def only_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of imported features that have a single layer: none was chosen, and it is all layers together."""
    return single_layers(frame[frame["imported"] & (frame["pooling_layers"] == 1)])


def layer_rows(frame: pd.DataFrame, layers: str) -> pd.DataFrame:
    """Keep the rows of the validation-chosen single layer (`CHOSEN`) or of all layers together (`ALL_LAYERS`).

    The only layer of imported features stands for both.
    """
    rows = frame[frame["chosen"]] if layers == CHOSEN else all_layers(frame)
    return frame[frame.index.isin(rows.index.union(only_layers(frame).index))]


def sources(frame: pd.DataFrame) -> list[str]:
    """Kinds of pairs, in the order of the frame."""
    return [str(source) for source in frame["source"].unique() if source not in (ALL_SOURCES, "")]


def trained_models(frame: pd.DataFrame, *, every_length: bool = False) -> list[Model]:
    """List imported features, then trained backbones, each from small to large (unknown sizes first).

    Of a training series (see `training_series`) only the longest is there.

    Training seeds (equal names but for a final ``seed0`` or ``run0``, equal shape and training length) are one model.
    """
    trained = frame[frame["control"] == "trained"].drop_duplicates("backbone")
    groups: dict[tuple[str, tuple[int, int, int | None], int | None, bool], list[str]] = {}
    for row in trained.to_dict("records"):
        images = None if pd.isna(row["training_images"]) else int(row["training_images"])
        parameters = None if pd.isna(row["backbone_parameters"]) else int(row["backbone_parameters"])
        shape = (int(row["n_blocks"]), int(row["width"]), parameters)
        key = (_TRAINING_SEED.sub("", row["backbone"]), shape, images, bool(row["imported"]))
        groups.setdefault(key, []).append(row["backbone"])
    models = []
    for (stem, shape, images, imported), names in groups.items():
        label = names[0] if len(names) == 1 else f"{stem} ({len(names)} seeds)"
        if not trained.loc[trained["backbone"].isin(names), "family_tested"].all():
            label += " (untested)"
        models.append(Model(label=label, backbones=tuple(names), shape=shape, images=images, imported=imported))
    if not every_length:
        shorter = [model for series in _series(models) for model in series if model.images != series[-1].images]
        models = [model for model in models if model not in shorter]
    return sorted(models, key=_by_size)


def training_series(frame: pd.DataFrame) -> list[list[Model]]:
    """Models that differ in training length alone, from short to long; one list for each series.

    They have the same shape and names that are equal but for a last ``-part`` with a number in it, or none:
    ``3x96-at3``, ``3x96-at10`` and ``3x96`` are a series, ``sd3-anime`` and ``sd3-photo`` are two backbones.
    """
    return _series(trained_models(frame, every_length=True))


def dumped_models(frame: pd.DataFrame) -> list[Model]:
    """Trained backbones from small to large, without imported features: what an effect of size is about."""
    return [model for model in trained_models(frame) if not model.imported]


def trained_rows(frame: pd.DataFrame, model: Model) -> pd.DataFrame:
    """Keep the trained rows of a model."""
    return frame[(frame["control"] == "trained") & frame["backbone"].isin(model.backbones)]


def control_rows(frame: pd.DataFrame, model: Model) -> pd.DataFrame:
    """Keep the rows of a model's controls, each network once.

    ``init`` weights depend on nothing but shape and seed: those of another backbone of the same shape stand in where
    the model has none of its own, and those that several backbones have are one network. ``shuffled`` weights and
    other prompts are a backbone's own.
    """
    control = frame["control"] != "trained"
    own = frame[control & frame["backbone"].isin(model.backbones)]
    if of_kind(own, "init").empty and not model.imported:
        n_blocks, width, parameters = model.shape
        same = (frame["n_blocks"] == n_blocks) & (frame["width"] == width)
        same &= frame["backbone_parameters"] == parameters
        own = pd.concat([own, of_kind(frame[same], "init")])
    init = own["control"].str.startswith("init:")
    home = own[init].drop_duplicates("control").set_index("control")["backbone"]
    return own[~init | (own["backbone"] == own["control"].map(home))]


def control_kinds(frame: pd.DataFrame, kinds: Sequence[str] = (*RANDOM, *PROMPTS)) -> list[str]:
    """Kinds of controls in the frame, of those in question; random weights with other prompts are of no kind."""
    found = set(frame["control"].str.replace(_CONTROL_SEED, "", regex=True))
    return [kind for kind in kinds if kind in found]


def of_kind(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Keep the rows of one kind of controls."""
    return frame[frame["control"].str.replace(_CONTROL_SEED, "", regex=True) == kind]


def _by_size(model: Model) -> tuple[bool, int, int, str]:
    return not model.imported, model.parameters or 0, model.images or 0, model.label


def _series(models: list[Model]) -> list[list[Model]]:
    """Group the models of one training series each, from short to long; models in none are left out."""
    groups: list[list[Model]] = []
    for model in (model for model in models if model.images is not None):
        related = [group for group in groups if any(_same_series(model, other) for other in group)]
        groups = [group for group in groups if group not in related]
        groups.append([model, *(other for group in related for other in group)])
    groups = [sorted(group, key=_by_size) for group in groups if len({model.images for model in group}) > 1]
    return sorted(groups, key=lambda group: _by_size(group[-1]))


def _same_series(one: Model, other: Model) -> bool:
    names = [_TRAINING_SEED.sub("", model.backbones[0]) for model in (one, other)]
    stems = [{name, _TRAINING_LENGTH.sub("", name)} for name in names]
    return one.shape == other.shape and bool(stems[0] & stems[1])
