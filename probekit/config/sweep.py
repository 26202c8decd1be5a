"""Settings of sweeps and of score tables."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from probekit.config.features import PreferenceOptions
from probekit.config.heads import LinearHead, MLPHead
from probekit.config.strict import Sigma, Strict

Ties = Literal["drop", "half", "soft"]
TIES_HELP = (
    "training pairs: labels as they are (soft), winners 1 and 0 and ties 0.5 (half), or no tied pairs (drop); "
    "the protocol says what tied test pairs count"
)


class TestSet(Strict):
    """Pairs of one split of one data set in one store: heads are judged on them."""

    __test__ = False  # no test class of pytest's
    store: Path = Field(description="feature store, relative to the current folder")
    dataset: str | None = Field(None, description="judgements in the store; may be left out where it holds one")
    name: str | None = Field(None, min_length=1, description="what results call the data set (default: as the store)")
    split: Literal["train", "validation", "test"] = "test"


class TrainSet(Strict):
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


class Primary(Strict):
    """The one endpoint that was named beforehand; everything else that a report shows is exploratory."""

    backbone: str | None = Field(None, description="name of a backbone (default: the largest trained one)")
    head: str | None = Field(None, description="name of a head (default: the first that reads single layers)")
    layers: Literal["chosen", "all"] = Field("chosen", description="the layer chosen on validation, or all together")
    dataset: str | None = Field(None, description="test pairs (default: those of the first data set)")


class SweepConfig(Strict):
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
