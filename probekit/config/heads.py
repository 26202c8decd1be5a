"""Settings of heads: on which layer sets they are fitted, how, and with which controls."""

from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from probekit.config.strict import Strict

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
LayerNumbers = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
RelativeDepths = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]


class SubsetSearch(Strict):
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


class _Head(Strict):
    name: HeadName
    layer_sets: list[LayerSet] = Field(min_length=1)
    across: Several[Literal["sigma", "pooling"]] = Field(
        [], description="what one fit reads side by side, all that the sweep chooses: noise levels, poolings"
    )


class Controls(Strict):
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
