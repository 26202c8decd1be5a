"""What a file of features will become: the numbers of its layers, and the counts that are said before it is written."""

from dataclasses import dataclass

from probekit._types import LayerPoint, scaled
from probekit.errors import ConfigError, FeatureFileError
from probekit.imports.feature_files import FeatureFile

POOLING = "given"
_MOST_LAYERS = 999  # the store writes layer numbers with three digits


@dataclass(frozen=True)
class ImportPlan:
    """What a file of features gives for a preference file; made by `plan_import`.

    Attributes
    ----------
    rows
        Distinct (prompt, image) of the preference file.
    absent, not_finite
        Rows without a vector at some layer, and rows with a value that is not finite.
    bad
        Keys of these rows, in words, each once.
    pairs, pairs_left_out
        Pairs of the preference file, and those of them with such a row.
    unused
        Keys of the file that the preference file does not name.
    other
        One of these, in words.
    layers
        Layer number, name and channels.
    n_blocks
        Blocks of the network: a layer's relative depth is its number over this; 0 for one layer without a depth.
    keys
        What the file's keys name: ``image``, or ``image and prompt``.
    dtypes
        Types of the file's numbers.
    shards, nbytes
        Shards, and the most bytes of features that they take (float16 where that is safe takes half).
    held
        Rows of the preference file that the store holds already, in shards that are whole.
    """

    rows: int
    absent: int
    not_finite: int
    bad: tuple[str, ...]
    pairs: int
    pairs_left_out: int
    unused: int
    other: str | None
    layers: tuple[tuple[int, str, int], ...]
    n_blocks: int
    keys: str
    dtypes: tuple[str, ...]
    shards: int
    nbytes: int
    held: int

    def lines(self) -> list[tuple[str, str]]:
        """Return headings and texts for the terminal."""
        first, last = self.layers[0], self.layers[-1]
        span = f"{first[0]} ({first[1]}, {first[2]} channels)"
        if len(self.layers) > 1:
            span += f" to {last[0]} ({last[1]}, {last[2]} channels)"
        depth = f"relative depth = number / {self.n_blocks}" if self.n_blocks else "one layer, without a depth"
        bad = f"{self.absent:,} without features, {self.not_finite:,} not finite"
        such_as = f", such as {self.other}" if self.other else ""
        return [
            ("keys", f"{self.keys}; {self.unused:,} of the file are not in the preference file{such_as}"),
            ("rows", f"{self.rows:,}; {self.held:,} in the store already; {bad}"),
            ("pairs", f"{self.pairs:,}; {self.pairs_left_out:,} left out for their rows"),
            ("layers", f"{len(self.layers)}: {span}; {depth}"),
            ("numbers", f"{', '.join(self.dtypes)}, read as float32"),
            (
                "store",
                f"{self.shards:,} shards, at most {scaled(self.nbytes, 'B')} of features, and as much while it runs",
            ),
        ]


def number_layers(source: FeatureFile, blocks: int | None) -> tuple[dict[str, LayerPoint], int]:
    """Give each layer of a file its number.

    Parameters
    ----------
    source
        The file.
    blocks
        Blocks of the network, where the user knows.

    Returns
    -------
    points
        Name in the file -> layer.
    n_blocks
        Number of blocks; 0 for one layer without a depth.

    Raises
    ------
    ConfigError
        If `blocks` is given for layers with names, or a number lies beyond the output point blocks + 1.
    FeatureFileError
        If there is no layer, there are too many, or two have the same number.
    """
    names = list(source.layers)
    if not 0 < len(names) <= _MOST_LAYERS:
        msg = f"{source.path}: holds {len(names)} layers; allowed: 1 to {_MOST_LAYERS}"
        raise FeatureFileError(msg)
    numbered = all(name.isdecimal() and name.isascii() for name in names)
    if blocks is not None and not numbered:
        name = next(name for name in names if not (name.isdecimal() and name.isascii()))
        msg = f"blocks is {blocks} with a layer named {name!r}; allowed where all layers are named by whole numbers"
        raise ConfigError(msg)
    numbers = [int(name) for name in names] if numbered and (len(names) > 1 or blocks) else list(range(len(names)))
    if len(set(numbers)) < len(numbers):
        first = next(name for name, number in zip(names, numbers, strict=True) if numbers.count(number) > 1)
        msg = f"{source.path}: two layers have the number {int(first)}; allowed: each number once"
        raise FeatureFileError(msg)
    n_blocks = max(numbers) if blocks is None else blocks
    if max(numbers) > min(n_blocks + 1, _MOST_LAYERS):
        msg = f"{source.path}: holds layer {max(numbers)}; allowed: 0 to {min(n_blocks + 1, _MOST_LAYERS)}"
        raise ConfigError(msg)
    points = {n: LayerPoint(index=k, name=n, stream=POOLING) for n, k in zip(names, numbers, strict=True)}
    return points, n_blocks
