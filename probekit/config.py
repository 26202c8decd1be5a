"""The typed contents of the YAML files and of the command line: one model per command, unknown keys refused.

The same models check options and files, so a setting has one name, one type and one default. YAML is read strictly:
no aliases (they can expand without bound), no duplicate keys (the last one would win silently).
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from probekit._types import canonical_sigma
from probekit.errors import ConfigError

SHARD_MIB = 512  # default of the largest shard
STRENGTHS = (
    1e-5,
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1.0,
    10.0,
    100.0,
)  # scikit-learn's C: from next to no fit to next to no penalty


def _allowed_prompts(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"real|empty|shuffled:\d+", value):
        return value
    message = f"allowed: real, empty or shuffled:SEED with a whole number SEED, not {value!r}"
    raise ValueError(message)


def _allowed_layers(value: object) -> object:
    if value == "all":
        return value
    try:
        numbers = [int(str(layer)) for layer in value] if isinstance(value, list) else []
    except ValueError:
        numbers = []
    if numbers and min(numbers) >= 0:
        return numbers
    message = f"allowed: 'all' or layer numbers such as 0,12,24, not {value!r}"
    raise ValueError(message)


def _allowed_worker(value: object) -> object:
    if isinstance(value, str):
        rank, _, world = value.partition("/")
        value = (int(rank), int(world)) if rank.isdecimal() and world.isdecimal() else value
    match value:
        case [int() as number, int() as of] if 0 <= number < of:
            return number, of
    message = f"allowed: RANK/WORLD with RANK from 0 to WORLD - 1, such as 0/4, not {value!r}"
    raise ValueError(message)


Sigma = Annotated[str, BeforeValidator(lambda value: canonical_sigma(str(value)))]
LayerNumbers = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
RelativeDepths = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
BadShare = Annotated[float, Field(ge=0, lt=1)]  # with all rows bad there is nothing to probe
ShardSize = Annotated[int, Field(ge=1, description="largest shard in MiB: what a kill can cost")]


class _Strict(BaseModel):
    """A model that refuses unknown keys and names the allowed ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: object) -> object:
        if isinstance(data, dict):
            unknown = sorted(str(key) for key in data if key not in cls.model_fields)
            if unknown:
                message = f"unknown key {unknown[0]!r}; allowed: {', '.join(cls.model_fields)}"
                raise ValueError(message)
        return data

    @classmethod
    def checked(cls, data: dict[str, Any], *, source: str) -> Self:
        """Validate plain data; the error is one line that names the source, the key, the value and what is allowed.

        Raises
        ------
        ConfigError
            If a key is unknown or a value has the wrong type or range.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_one_line(error, source=source)) from None


class PreferenceOptions(_Strict):
    """How a preference file is read; no part of a feature store's fingerprint, as judgements lie outside it."""

    format: str = Field("auto", description="format of PREFS (default: recognised by its fields)")
    columns: str | dict[str, str] | None = Field(
        None, description="columns of PREFS by our names: prompt=caption,image_a=image0,..., or mj-bench, rapidata"
    )
    min_confidence: float | None = Field(
        None, ge=0, le=1, description="leave out pairs of a lower confidence; those without one stay"
    )

    split_file: Path | None = Field(
        None, description="file of `probekit split` that says which pair is in which split (default: by hash)"
    )

    def loading(self) -> dict[str, Any]:
        """Options of `probekit.load_preferences`."""
        return {name: getattr(self, name) for name in PreferenceOptions.model_fields}


class DumpConfig(PreferenceOptions):
    """Settings of ``probekit dump``: which backbone is run on which images, and what is kept of it."""

    backbone: str = Field(description="diffusers pipeline: a folder or a Hugging Face id")
    prefs: Path = Field(description="preference file as published or in the general form, or a data set of datasets")
    out: Path = Field(description="the feature store: a folder, made or continued")
    transformer: Path | None = Field(None, description="folder of a transformer that replaces the pipeline's own")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    name: str | None = Field(None, description="what to call the backbone in tables and figures")
    sigma: list[Sigma] = Field(
        ["0.005"], min_length=1, description="noise level from 0 (clean latents) to 1; repeatable"
    )
    noise: Literal["shared", "independent", "none"] = Field(
        "shared", description="the images of a prompt share their noise, each image has its own, or none is added"
    )
    pooling: list[str] = Field(["mean"], min_length=1, description="how image tokens become one vector; repeatable")
    layers: Annotated[Literal["all"] | LayerNumbers, BeforeValidator(_allowed_layers)] = Field(
        "all", description="'all' or layer numbers such as 0,12,24"
    )
    output_tokens: bool = Field(
        default=False,
        description="also the tokens that enter the output projection, as one more layer than there are blocks",
    )
    prompts: Annotated[str, BeforeValidator(_allowed_prompts)] = Field(
        "real",
        description="control: 'empty' prompts, or 'shuffled:SEED' (each image gets another row's prompt)",
    )
    draws: int = Field(1, ge=1, description="noise draws of every image")
    resolution: int | None = Field(
        None, ge=16, description="side of the square images in pixels (default: the model's)"
    )
    resize: Literal["crop", "pad", "bucket"] = Field(
        "crop", description="how images get that size: largest centre square, whole image on grey, or nearest aspect"
    )
    decode_workers: int | None = Field(
        None, ge=0, description="processes that decode images ahead of the model (default: 0 on the CPU, else up to 8)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="compute type (default: float32 on the CPU, bfloat16 on CUDA)"
    )
    device: str | None = Field(None, description="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    batch_size: int = Field(8, ge=1, description="images per forward pass")
    seed: int = Field(0, ge=0, description="seed of the noise")
    limit: int | None = Field(None, ge=1, description="use at most this many pairs, in whole groups, nested")
    max_tokens: int | None = Field(None, ge=0, description="longest prompt in tokens (default: the pipeline's)")
    random_weights: str | None = Field(
        None, description="control: 'init:SEED' (untrained) or 'shuffled:SEED' (trained entries permuted)"
    )
    lora: Path | None = Field(None, description="LoRA adapter of the transformer: a safetensors file or its folder")
    offload: Literal["none", "group"] = Field(
        "none", description="'group': weights stay in main memory and visit the device a group at a time"
    )
    compile: bool = Field(default=False, description="compile the forward of each block with torch.compile")
    cache: Path | None = Field(None, description="folder of VAE latents and prompt embeddings shared between dumps")
    training_images: int | None = Field(
        None, ge=0, description="images the transformer was trained on, for the plot against training length"
    )
    shard_size: ShardSize = SHARD_MIB
    max_bad: BadShare = Field(
        0.0,
        description="largest share of rows that may have no features, since their image is missing or unreadable or "
        "the features are not finite; their pairs are left out and counted",
    )
    worker: Annotated[tuple[int, int] | None, BeforeValidator(_allowed_worker)] = Field(
        None,
        description="RANK/WORLD: do every WORLD-th shard from the RANK-th on (default: what torchrun or Slurm say)",
    )


class ImportConfig(PreferenceOptions):
    """Settings of ``probekit import-features``: which file of features becomes a store, and what is said of it."""

    file: Path = Field(description="features of the images: .npz, .safetensors or .parquet")
    prefs: Path = Field(description="preference file as published or in the general form, or a data set of datasets")
    out: Path = Field(description="the feature store: a folder, made or continued")
    definition: str = Field(min_length=1, description="what the features are, in words; part of the store's identity")
    name: str | None = Field(None, min_length=1, description="what tables and figures call them (default: FILE's stem)")
    blocks: int | None = Field(
        None, ge=1, description="blocks of the network, where layers are numbers (default: the largest)"
    )
    parameters: int | None = Field(None, ge=1, description="parameters of the network, for the plot against size")
    max_bad: BadShare = Field(0.0, description="largest share of rows without features that is accepted")
    shard_size: ShardSize = SHARD_MIB


class SubsetSearch(_Strict):
    """A search over subsets of layers inside the training pairs: screened by Gram matrices, the best fitted exactly."""

    max_size: int = Field(3, ge=2, description="layers of the largest sets")
    refit_top: int = Field(5, ge=1, description="sets of each size that are fitted exactly")


def _allowed_layer_set(value: object) -> object:
    """Say in one sentence what a layer set may be, in place of one complaint for each member of the union."""
    match value:
        case "singles" | "pairs" | "all":
            return value
        case {"search": SubsetSearch(), **rest} if not rest:
            return value
        case {"search": dict() as settings, **rest} if not rest:
            return {"search": SubsetSearch.checked(settings, source="search")}
        case {"relative": [*depths], **rest} if depths and not rest:
            if all(type(depth) in (int, float) and 0 <= depth <= 1 for depth in depths):
                return value
        case {"windows": number, **rest} | {"strides": number, **rest} | {"blocks": number, **rest} if not rest:
            if isinstance(number, int) and not isinstance(number, bool) and number >= 1:
                return value
        case [*numbers] if numbers and all(isinstance(number, int) and number >= 0 for number in numbers):
            return value
    message = (
        "allowed: 'singles', 'all', 'pairs', layer numbers such as [3, 7], relative: depths from 0 to 1, windows: K, "
        "strides: K or blocks: N with whole numbers from 1, or search: {max_size, refit_top}; "
        f"not {value!r}"
    )
    raise ValueError(message)


Ties = Literal["drop", "half", "soft"]
TIES_HELP = (
    "training pairs: labels as they are (soft), winners 1 and 0 and ties 0.5 (half), or no tied pairs (drop); "
    "the protocol says what tied test pairs count"
)

LayerSet = Annotated[
    Literal["singles", "pairs", "all"]
    | LayerNumbers
    | dict[Literal["relative"], RelativeDepths]
    | dict[Literal["windows", "strides", "blocks"], int]
    | dict[Literal["search"], SubsetSearch],
    BeforeValidator(_allowed_layer_set),
]


Rule = Literal["concat", "mean", "scalar-mix", "late-fusion"]
"""How several layers become one score: side by side or averaged before one head, by
`probekit.heads.BradleyTerryScalarMix`, or by `probekit.heads.BradleyTerryLateFusion`."""
_T = TypeVar("_T")
Several = Annotated[list[_T], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""One value, or a list of them."""


HeadName = Annotated[str, Field(pattern=r"^[\w.-]+$")]


class _Head(_Strict):
    name: HeadName
    layer_sets: list[LayerSet] = Field(min_length=1)
    across: Several[Literal["sigma", "pooling"]] = Field(
        [], description="what one fit reads side by side, all that the sweep chooses: noise levels, poolings"
    )


class Controls(_Strict):
    """Refits of a head on altered training pairs and fits on altered features: rows of the same results table."""

    permuted: int | None = Field(
        None, ge=20, description="refits on permuted training labels: 50 % on test pairs unless something leaks"
    )
    halves: int | None = Field(
        None, ge=10, description="refits on random halves of the training groups: how much training pairs matter"
    )
    shares: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [], description="shares of the training groups, each a part of the next: accuracy against training pairs"
    )
    sources: bool = Field(
        default=False, description="a head for each source (kind) of pairs, fitted on its training pairs alone"
    )
    nested: int | None = Field(
        None, ge=2, description="outer folds of a nested cross-validation over training and validation pairs"
    )
    conditional: bool = Field(
        default=False,
        description="each layer beside the same layer of each random-weights store of its backbone, against that alone",
    )
    padded: bool = Field(
        default=False,
        description="one trained layer beside random ones, in place of the others of a set: its dimension alone",
    )
    projected: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="numbers of random directions, ten draws each: accuracy against dimension"
    )


class LinearHead(_Head):
    """A linear Bradley-Terry head; its strength is chosen by grouped cross-validation inside the training split."""

    kind: Literal["linear"]
    name: HeadName = "linear"
    combine: Several[Rule] = Field(
        ["concat"], min_length=1, description="how the layers of a set become one score; each rule is a fit of its own"
    )
    strengths: list[Annotated[float, Field(gt=0)]] = Field(
        list(STRENGTHS), min_length=1, description="candidates for scikit-learn's C"
    )
    folds: int = Field(5, ge=2)
    controls: Controls = Field(Controls(), description="refits and altered features, for each of its fits")

    @model_validator(mode="after")
    def _rules_without_controls(self) -> Self:
        others = [rule for rule in self.combine if rule not in ("concat", "mean")]
        if others and self.controls != Controls():
            message = f"controls: combine has {others[0]!r}; allowed: concat and mean (others in a head of their own)"
            raise ValueError(message)
        return self


PRESETS: dict[str, dict[str, Any]] = {
    # Four blocks of SD3.5-Large, {15, 23, 28, 37} counted from 0, as relative depths; pooling "mean".
    "dit-reward": {
        "name": "dit-reward",
        "layer_sets": [{"relative": [0.42105, 0.63158, 0.76316, 1.0]}],
        "hidden": [1024, 16],
        "dropout": 0.05,
    }
}
"""Settings of MLP heads by name; what a configuration says beside the name wins, and is said in the head's name."""
OF_THE_PLAN = {"layer_sets", "seeds", "combine", "across", "preset", "controls"}
"""Settings of a head that say which fits there are; a fit has its own value of each."""


class MLPHead(_Head):
    """A multi-layer Bradley-Terry head on the features of each layer set."""

    kind: Literal["mlp"]
    preset: str | None = Field(None, description="fills in what is not given: see `PRESETS`")
    name: HeadName = "mlp"
    combine: Several[Literal["concat", "mean"]] = Field(
        ["concat"], min_length=1, description="how the layers of a set become the input; each rule is a fit of its own"
    )
    hidden: list[Annotated[int, Field(ge=1)]] = Field([1024, 16], min_length=1)
    linear_skip: bool = Field(default=False, description="add the exact linear head; the network learns what is left")
    dropout: float = Field(0.05, ge=0, lt=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    max_epochs: int = Field(200, ge=1)
    batch_size: int = Field(128, ge=1)
    patience: int = Field(5, ge=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1)

    @field_validator("seeds")
    @classmethod
    def _seeds_once(cls, seeds: list[int]) -> list[int]:
        twice = [seed for seed, times in Counter(seeds).items() if times > 1]
        if twice:
            message = f"{twice[0]} stands {seeds.count(twice[0])} times; allowed: each seed once"
            raise ValueError(message)
        return seeds

    @model_validator(mode="wrap")
    @classmethod
    def _filled_in(cls, data: Any, handler: Callable[[Any], Self]) -> Self:
        """Fill in what a preset says; a head that is trained otherwise is not called by the preset's name alone."""
        if not isinstance(data, dict) or data.get("preset") is None:
            return handler(data)
        preset = data["preset"]
        if not isinstance(preset, str) or preset not in PRESETS:
            message = f"preset is {preset!r}; allowed: {', '.join(PRESETS)}"
            raise ValueError(message)
        filled = PRESETS[preset] | data
        head = handler(filled)
        if "name" in data:
            return head
        usual = handler({"kind": "mlp"} | PRESETS[preset])
        told = [head.name]
        for setting in cls.model_fields:
            value = getattr(head, setting)
            if setting not in OF_THE_PLAN and value != getattr(usual, setting):
                told.append("-".join(map(str, [setting, *(value if isinstance(value, list) else [value])])))
        return head.model_copy(update={"name": "-".join(told)})


class TestSet(_Strict):
    """Pairs of one split of one data set in one store: heads are judged on them."""

    __test__ = False  # no test class of pytest's
    store: Path = Field(description="feature store, relative to the current folder")
    dataset: str | None = Field(None, description="judgements in the store; may be left out where it holds one")
    name: str | None = Field(None, min_length=1, description="what results call the data set (default: as the store)")
    split: Literal["train", "validation", "test"] = "test"


class TrainSet(_Strict):
    """Pairs that heads are fitted on; the validation pairs of the same data set help to choose the layer."""

    store: Path = Field(description="feature store, relative to the current folder")
    dataset: str | None = Field(None, description="judgements in the store; may be left out where it holds one")
    name: str | None = Field(None, min_length=1, description="what results call the data set (default: as the store)")
    split: Literal["train", "test"] = "train"  # validation pairs choose, so they are never fitted on
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="of each pair: 2 is having every pair twice")


ProtocolName = Literal[
    "strict",
    "imagereward",
    "hpsv2-inversion",
    "hpsv2-inversion-listed",
    "mps-inversion",
    "hpsv2-imagereward",
    "pickscore",
]
"""Named definitions of accuracy: see `probekit.stats.protocols`."""


class Primary(_Strict):
    """The one endpoint that was named beforehand; everything else that a report shows is exploratory."""

    backbone: str | None = Field(None, description="name of a backbone (default: the largest trained one)")
    head: str | None = Field(None, description="name of a head (default: the first that reads single layers)")
    layers: Literal["chosen", "all"] = Field("chosen", description="the layer chosen on validation, or all together")
    dataset: str | None = Field(None, description="test pairs (default: those of the first data set)")


class SweepConfig(_Strict):
    """Settings of ``probekit sweep``: which heads are fitted on which layers of the stores."""

    heads: list[Annotated[LinearHead | MLPHead, Field(discriminator="kind")]] = Field(min_length=1)
    train: list[TrainSet] | None = Field(None, min_length=1, description="mixture to fit on, in place of --store")
    test: list[TestSet] | None = Field(None, min_length=1, description="data sets to judge on, in place of --store")
    ties: Ties = Field("soft", description=TIES_HELP)
    protocol: ProtocolName = "strict"
    primary: Primary = Field(default_factory=Primary, description="the endpoint that a report is about")
    sigmas: Literal["all"] | Annotated[list[Sigma], Field(min_length=1)] = "all"
    draws: Literal["all"] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        "all", description="noise draws; each is a setting of its own, never averaged"
    )
    poolings: Literal["all"] | Annotated[list[str], Field(min_length=1)] = "all"
    resamples: int = Field(2000, ge=100, description="bootstrap resamples of groups behind each interval")
    level: float = Field(0.95, gt=0.5, lt=1, description="coverage of the intervals")

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.train is None) != (self.test is None):
            message = (
                f"{'test' if self.test is None else 'train'}: is required where the other of train and test is given"
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _known_head(self) -> Self:
        names = [head.name for head in self.heads]
        if self.primary.head not in (None, *names):
            message = f"primary: head is {self.primary.head!r}; allowed: {', '.join(names)}"
            raise ValueError(message)
        return self

    @field_validator("heads")
    @classmethod
    def _distinct_names(cls, heads: list[LinearHead | MLPHead]) -> list[LinearHead | MLPHead]:
        names = [head.name for head in heads]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            message = f"two heads are named {twice[0]!r}; each needs a name of its own"
            raise ValueError(message)
        return heads


class ScoreTableConfig(PreferenceOptions):
    """Settings of ``probekit score-table``: whose scores are judged on which pairs."""

    scores: Path | None = Field(None, description="CSV or Parquet: columns image, score, perhaps prompt")
    prefs: Path = Field(description="preference file; its stem is the name of the data set")
    out: Path = Field(description="the run: a folder, new or that of a sweep on the same preference file")
    name: str | None = Field(None, min_length=1, description="what tables call the scorer (default: SCORES' stem)")
    protocol: ProtocolName | None = Field(None, description="accuracy (default: that of the run, else strict)")
    split: list[Literal["train", "validation", "test"]] | None = Field(
        None, min_length=1, description="split to judge; repeatable (default: validation and test)"
    )
    threshold: float | None = Field(
        None, ge=0, le=1, description="tie threshold of protocol pickscore (default: tuned on validation pairs)"
    )
    agreement: float | None = Field(
        None,
        ge=0,
        le=1,
        description="in place of SCORES: a published share of pairs on which one annotator agrees with the label; a "
        "line beside the heads, no ceiling",
    )

    @model_validator(mode="after")
    def _scores_or_agreement(self) -> Self:
        if (self.scores is None) == (self.agreement is None):
            given = "neither SCORES nor --agreement is" if self.scores is None else "both SCORES and --agreement are"
            message = f"{given} given; allowed: one of them"
            raise ValueError(message)
        if self.agreement is not None and self.name is None:
            message = "--agreement needs --name, which says whose it is"
            raise ValueError(message)
        if self.agreement is not None and self.split is not None:
            message = "--split and --agreement are given; allowed: one of them, as a given share has no split"
            raise ValueError(message)
        return self


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping strictly.

    Raises
    ------
    ConfigError
        If the file is missing, is no YAML mapping, has aliases or duplicate keys, or is nested too deeply.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        message = f"{path}: {error.strerror or error}"
        raise ConfigError(message) from None
    except RecursionError:
        message = f"{path}: nested too deeply"
        raise ConfigError(message) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a number or date that cannot be
        message = f"{path}: {' '.join(str(error).split())}"
        raise ConfigError(message) from None
    if not isinstance(data, dict):
        message = f"{path}: must hold 'key: value' lines, not {type(data).__name__}"
        raise ConfigError(message)
    return data


class _StrictLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", mark)
        return super().compose_node(parent, index)

    # the signature is PyYAML's
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, times in keys.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_NEEDED = {
    "too_short": "at least {min_length} entry",
    "string_too_short": "text",
    "string_pattern_mismatch": "letters, digits and . _ -",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
    "greater_than_equal": "{ge:g} or more",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "{le:g} or less",
    "less_than": "less than {lt:g}",
    "finite_number": "a finite number",
    "path_type": "a path",
    "list_type": "a list",
    "string_type": "text",
    "model_type": "settings such as {{key: value}}",
    "model_attributes_type": "settings such as {{key: value}}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}
"""What is allowed where a value is not, by pydantic's name of the mistake."""


def _one_line(error: ValidationError, *, source: str) -> str:
    errors = error.errors(include_url=False)
    # The alternatives of one union each report the same value: they are one mistake, and all that is allowed is said;
    # one that was wrong further inside is what was meant.
    about = [one for one in errors if _keys(one)[: len(_keys(errors[0]))] == _keys(errors[0])]
    first = max(about, key=lambda one: len(_keys(one)))
    same = [one for one in about if one["input"] is first["input"]]
    keys, kind = _keys(first), first["type"]
    if kind == "value_error":
        text = str(first["ctx"]["error"])
    elif kind in ("missing", "union_tag_not_found"):
        keys, text = keys + ["kind"] * (kind == "union_tag_not_found"), "is required"
    else:
        tagged = kind == "union_tag_invalid"
        keys, value = keys + ["kind"] * tagged, first["ctx"]["tag"] if tagged else first["input"]
        allowed = " or ".join(
            dict.fromkeys(_NEEDED.get(one["type"], one["msg"]).format(**one.get("ctx", {})) for one in same)
        )
        text = f"is {value!r}; allowed: {allowed}"
    more = len(errors) - len(about)
    return f"{source}: {'.'.join(keys) + ': ' if keys else ''}{text}" + (f" (and {more} more)" if more else "")


def _keys(error: ErrorDetails) -> list[str]:
    """Where a mistake is in the YAML file, without the names of types that a value might have had."""
    return [str(part) for part in error["loc"] if "[" not in str(part) and part not in ("linear", "mlp")]
