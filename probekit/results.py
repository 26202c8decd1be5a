"""The results table of a run: one atomically renamed part per record, loaded as one tidy frame.

A run folder holds::

    config.json                    the resolved configuration
    parts/<record_id>.parquet      rows of one record: one for each test set, split and slice of the pairs
    margins/<record_id>.parquet    margin s(A) - s(B) of every validation and test pair of that record
    results.parquet                the parts of the current plan, joined, with ``chosen`` filled in
    beyond_generator.parquet       what chosen layers add to the generators' names, where the data name them
    controls.parquet               what refits and altered features say, where a head asked for them
    blocks.parquet                 blocks of similar layers where a head asked for them, and pairs within and across
    families.parquet               single layers judged together: band, plateau, comparisons, best of many, null
    trajectories.parquet           at which layers each test pair is right

A record is one fitted head in one setting, or a baseline that sees no features (`UNPROBED`). Its part is written
after its margins, both through a temporary file that is renamed, so a record is done exactly when its part exists;
whatever was under way when a run was killed is simply missing. Equal rows give equal bytes: the files carry no time and
no machine.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.lib as pa
from pyarrow.parquet import ParquetFile, ParquetWriter

from probekit._types import RESOLVED_RATIO
from probekit.errors import ResultsError
from probekit.stats import Expectations

RESULTS_VERSION = "1.5"
ALL_SOURCES = "all"
UNPROBED = ("metadata", "inputs", "external")
"""Kinds of heads that see no features: of metadata, of what enters a backbone, and scores from elsewhere."""
JOINED = "+"  # between the layers of a set, and between noise levels or poolings that one head reads side by side
PLAN = "plan"
"""Key of ``config.json``: ids of all records of the sweep, baselines included."""
JUDGED = "judged"
"""Key of ``config.json``: true once what is said of several records together is written too."""
EXTERNAL = "external-"  # what ids of records of scores from elsewhere begin with: no plan lists them
SPLITS = ("train", "validation", "test")

#: Every column of the tidy frame and its pandas dtype, in order; ``Int64`` and ``float64`` values may be missing.
RESULT_COLUMNS: dict[str, str] = {
    "record_id": "str",
    "backbone": "str",
    "family_tested": "bool",  # whether probekit's own tests run the backbone's family; filled in by `rebuild`
    "control": "str",  # "trained", or what was replaced: see `CONTROLS`
    "dataset": "str",  # of the test pairs; validation rows are there again for each data set that is tested on
    "trained_on": "str",  # of the training and validation pairs: the data set, or those of a mixture joined by "+"
    "split": "str",
    "slice_by": "str",  # "all", or by what pairs are told apart: "source" (both splits), others (test): see `SLICES`
    "source": "str",  # "all", or one kind of pair: the value of what `slice_by` names
    "protocol": "str",  # named accuracy definition of probekit.stats
    "sigma": "str",  # canonical decimal text, or several side by side: "0.005+0.1"
    "sigma_ratio": "float64",  # feature change from sigma 0 over bf16 rounding; filled in by `rebuild`
    "draw": "int64",  # draw of the noise
    "pooling": "str",  # or several side by side: "mean+max"
    "layer_set": "str",  # "3" or "0+1+2"
    "layer": "Int64",  # single layers only; n_blocks + 1 = the output point
    "n_layers": "int64",
    "pooling_layers": "int64",  # layers at which the pooling exists in the backbone; filled in by `rebuild`
    "combination": "str",  # "single", or by which of probekit.config.Rule the layers become one score
    "head": "str",
    "head_kind": "str",  # "linear", "mlp", or one of `UNPROBED`, whose columns of features are empty
    "seed": "int64",
    "altered": "str",  # "", or what of the training pairs or features was altered for this fit: see `ALTERED`
    "n_train": "int64",  # training pairs of the fit
    "accuracy": "float64",  # as the protocol defines it, 0 to 1; none where no training pair differed
    "low": "float64",
    "high": "float64",
    "se": "float64",
    "micro_accuracy": "float64",  # of what the protocol scores, the mean over pairs
    "prompt_accuracy": "float64",  # and the mean over prompts (rankings); one of the two is the accuracy, but for
    # validation rows of a mixture with weights, of which only accuracy, low, high, se and macro use the weights
    "threshold": "float64",  # tie threshold of protocol "pickscore", tuned on validation pairs, which weigh alike
    "expected_random": "float64",  # accuracy that random scores get on these pairs by this protocol,
    "expected_constant": "float64",  # that a constant gets,
    "expected_first": "float64",  # and preferring what the file lists first, where that is known
    "macro_accuracy": "float64",  # mean over sources, on rows of source "all" only
    "macro_low": "float64",
    "macro_high": "float64",
    "n_pairs": "int64",
    "true_ties": "int64",
    "predicted_ties": "int64",
    "left_out": "int64",  # pairs of this split and source that could not be scored; 0 in slices by other than source
    "n_groups": "int64",
    "effective_groups": "float64",
    "strength": "float64",  # chosen C of a linear head
    "edge_of_grid": "bool",
    "converged": "bool",  # MLP: stopped by its validation loss
    "n_iter": "Int64",  # iterations of the refit; alternations of a scalar mix; epochs of an MLP
    "gradient_norm": "float64",  # of the objective per pair at the solution; none for an MLP
    "n_dropped": "int64",  # channels that do not vary, or no more than rounding in the store explains
    "n_less_than_d": "bool",  # fewer training pairs than fitted channels
    "matrix_free": "bool",  # fitted without a factorisation, for want of memory
    "train_accuracy": "float64",
    "train_left_out": "int64",  # training pairs that could not be fitted on
    "train_ties": "int64",  # training pairs that are true ties, however the fit treats them
    "train_connected": "int64",  # training pairs left out since their group reaches into pairs of another data set
    "head_parameters": "int64",
    "backbone_parameters": "Int64",  # unknown for some imported features
    "width": "int64",
    "n_blocks": "int64",
    "relative_depth": "float64",  # layer / n_blocks, single layers only; 1 for the output point; none if n_blocks is 0
    "training_images": "Int64",  # images the backbone saw in training, where known
    "imported": "bool",  # features computed elsewhere, no backbone of a family; filled in by `rebuild`
    "chosen": "bool",  # best single layer on validation; filled in by `rebuild`
    "store_fingerprint": "str",
    "data_digest": "str",
    "probekit_version": "str",
}

#: What `rebuild` fills in: parts do not hold it (or, for ``chosen``, only False), since it is no part of one fit.
_FILLED_IN = ("family_tested", "sigma_ratio", "pooling_layers", "imported")
_PART_COLUMNS = {name: dtype for name, dtype in RESULT_COLUMNS.items() if name not in _FILLED_IN}

#: Kinds of controls and what they are called: random weights of the transformer, or the trained transformer told
#: nothing or the prompt of another row. A control is a kind with its seed where it has one (``init:0``,
#: ``empty-prompts``); random weights and other prompts in one store are joined by ``+`` and are neither of the two.
CONTROLS = {
    "init": "random weights (init)",
    "shuffled": "random weights (shuffled)",
    "empty-prompts": "empty prompts",
    "shuffled-prompts": "shuffled prompts",
}

#: What a refit or control of a head alters. A value of the column is one of these, perhaps with a parameter behind a
#: colon; ``seed`` counts the draws.
ALTERED = {
    "permuted": "training labels permuted",
    "half": "a random half of the training groups",
    "share": "part of the training groups",
    "source": "training pairs of one source",
    "beside": "beside the same layer of random weights",
    "padded": "one trained layer, the others of random weights",
    "projected": "random directions in the channels",
    "nested": "outer folds of a nested cross-validation",  # test rows are of the outer fold, none of the test split
}

#: By what pairs are told apart, in `slice_by`: kinds of the file; the two generators (frequent ones, "other",
#: "unknown"); whether they are the same; the share of votes of the preferred side; the images that were compared
#: under a prompt (or in a ranking). Every test pair is in one slice of each. Intervals of slices other than "source"
#: rest on a quarter of the resamples. Of altered fits (`ALTERED`) only heads by source have slices: "source".
SLICES = ("source", "generators", "same_generator", "vote_share", "images")

MARGIN_COLUMNS: dict[str, str] = {
    "pair_id": "str",
    "dataset": "str",
    "group": "str",
    "split": "str",
    "source": "str",
    "prompt_id": "str",  # ranking, or hash of the prompt: what a mean over prompts counts alike
    "row_a": "int64",  # place of each side's row (prompt and picture) in what the record was fitted on: pairs of one
    "row_b": "int64",  # ranking share rows
    "label": "float64",  # P(A preferred), 0.5 = tie
    "margin": "float64",  # s(A) - s(B)
    "correct": "float64",  # by the protocol of the record: 1 right, 0 wrong, 0.5 half a point, none if not scored
}

#: What chosen layers add to what the generators' names say of a pair, on test pairs; `accuracy_*` count half a pair
#: where a score says nothing (a pair of one generator, or with one unseen in training, has no generator logit), and
#: decided pairs alike, whatever the protocol weighs.
BEYOND_COLUMNS: dict[str, str] = {
    "record_id": "str",
    "baseline_id": "str",  # record of the generator baseline
    "dataset": "str",
    "head_coefficient": "float64",  # of the head's margin, fitted on validation pairs
    "generator_coefficient": "float64",  # of the generators' logit
    "n_pairs": "int64",
    "n_same": "int64",  # pairs without a generator logit
    "accuracy_generator": "float64",
    "accuracy_both": "float64",
    "difference": "float64",
    "low": "float64",
    "high": "float64",
    "se": "float64",
    "detectable": "float64",
}

#: What tables about a setting, not about a single fit, begin with.
_SETTING: dict[str, str] = {
    "backbone": "str",
    "control": "str",
    "dataset": "str",
    "trained_on": "str",
    "protocol": "str",
    "sigma": "str",
    "draw": "int64",
    "pooling": "str",
    "head": "str",
}

#: Blocks of similar layers, and test accuracies of heads on pairs of layers within one block and across two.
BLOCK_COLUMNS: dict[str, str] = {
    **_SETTING,
    "seed": "int64",
    "blocks": "str",  # ranges of layers, such as "0-3, 4-6, 7"
    "n_within": "int64",  # pairs of layers
    "within": "float64",  # their mean accuracy
    "best_within": "float64",
    "n_across": "int64",
    "across": "float64",
    "best_across": "float64",
    "difference": "float64",  # of the means, across minus within
    "low": "float64",
    "high": "float64",
}

#: Single layers of one backbone, head and setting (`CHOICE_KEYS`, without the output point) judged together on the same
#: test pairs: one row for each layer. Definitions and sources: `probekit.stats`. Shares from 0 to 1.
FAMILY_COLUMNS: dict[str, str] = {
    "record_id": "str",
    **_SETTING,
    "seed": "int64",
    "layer": "int64",
    "relative_depth": "float64",
    "chosen": "bool",  # on validation
    "converged": "bool",
    "tried": "int64",  # layers of the family, which every correction here is for
    "n_pairs": "int64",  # that all layers judged
    "n_groups": "int64",
    "effective_groups": "float64",
    "accuracy": "float64",
    "band_low": "float64",  # limits that hold for all layers of the family together
    "band_high": "float64",
    "in_plateau": "bool",  # not shown to be worse than any other layer
    "plateau_p": "float64",  # of "this layer is one of the best"
    "behind": "float64",  # upper limit of the distance to the best layer, whichever that is
    "within_point": "bool",  # that limit is at most one point: equivalence, not only indistinguishable
    "n_refits": "int64",  # on halves of the training groups: with any, the four columns above are about layers
    "difference": "float64",  # to the chosen layer; none without one, and on its own row
    "difference_low": "float64",  # limits that hold for all these differences together
    "difference_high": "float64",
    "p": "float64",  # of the difference alone
    "p_adjusted": "float64",  # Romano and Wolf's step-down over the layers of the family
    "detectable": "float64",  # difference that would be found in 80 % of samples, after correction
    "best": "bool",  # highest on test: exploratory
    "frequency": "float64",  # share of resamples in which the layer is the highest
    "best_naive": "float64",  # of the family: accuracy of the highest layer on the pairs that chose it,
    "best_corrected": "float64",  # and of choosing the highest, judged on pairs that did not choose it
    "best_low": "float64",
    "best_high": "float64",
    "permutation_p": "float64",  # of "labels have nothing to do with the margins": ranks permuted within prompts
    "permutation_adjusted": "float64",  # where the best of all layers was looked for
    "brier": "float64",  # calibration, where some labels are shares of votes (none otherwise)
    "log_loss": "float64",
    "ece": "float64",
    "ece_low": "float64",
    "ece_high": "float64",
    "ece_by_chance": "float64",  # what a perfectly calibrated head stays below in 95 % of samples
}

#: At which layers each decided test pair is right, for every family of `FAMILY_COLUMNS`.
TRAJECTORY_COLUMNS: dict[str, str] = {
    "backbone": "str",
    "control": "str",
    "dataset": "str",
    "protocol": "str",
    "sigma": "str",
    "draw": "int64",
    "pooling": "str",
    "head": "str",
    "seed": "int64",
    "pair_id": "str",
    "source": "str",
    "label": "float64",
    "layers": "str",  # of the path: "0+1+2+3"
    "path": "str",  # a digit for each of them: 1 right, 0 wrong; h half a point, by protocols that give one
    "flips": "int64",  # changes from one layer to the next
    "last_flip": "Int64",  # layer from which on nothing changes; none where nothing ever does
    "right_share": "float64",  # mean over layers
    "right_at_chosen": "float64",  # none where no layer is chosen
    "right_at_last": "float64",
}

#: What refits and altered features say, one row for each fit as it is and value of ``altered``. "half" is about the
#: fit as it is: ``se_train`` and the limits say how it varies with the training pairs as well, and ``difference``
#: what it has over the chosen layer, with the same two in its limits. Of several draws the accuracy is their mean, and
#: the limits cover other draws. "nested" is about choosing a layer, and belongs to no fit: ``selected`` says how often
#: each layer was chosen. The difference of "beside" is that of both layers and the random one alone; of "padded" that
#: of the fit as it is and the best on validation of those with one trained layer, which ``selected`` names.
CONTROL_COLUMNS: dict[str, str] = {
    "record_id": "str",  # of the fit as it is; empty where the row belongs to none
    **_SETTING,
    "layer_set": "str",
    "combination": "str",
    "layer": "Int64",
    "n_layers": "int64",
    "chosen": "bool",
    "altered": "str",
    "n_fits": "int64",
    "n_train": "int64",
    "converged": "bool",
    "train_accuracy": "float64",
    "accuracy": "float64",
    "low": "float64",
    "high": "float64",
    "se_test": "float64",
    "se_train": "float64",
    "se": "float64",
    "selected": "str",  # layers that the folds chose and how often, such as "3: 4, 2: 1"
    "against": "str",  # what a difference is taken from; empty without one
    "difference": "float64",
    "difference_low": "float64",
    "difference_high": "float64",
}

#: Columns of records that see no features, whose kinds of heads are `UNPROBED`.
NO_FEATURES: dict[str, Any] = {
    "sigma": "",
    "draw": 0,
    "pooling": "",
    "layer_set": "",
    "layer": None,
    "n_layers": 0,
    "combination": "",
    "seed": 0,
    "altered": "",
    "backbone_parameters": None,
    "width": 0,
    "n_blocks": 0,
    "relative_depth": np.nan,
    "training_images": None,
    "store_fingerprint": "",
}

#: Columns of records to which nothing was fitted.
NO_FIT: dict[str, Any] = {
    "strength": np.nan,
    "edge_of_grid": False,
    "converged": True,
    "n_iter": None,
    "gradient_norm": np.nan,
    "n_dropped": 0,
    "n_less_than_d": False,
    "matrix_free": False,
    "head_parameters": 0,
}

#: What a fit and its altered ones have in common, on whichever pairs they are tested.
FIT_KEYS = [*(key for key in _SETTING if key != "dataset"), "layer_set", "combination"]

#: What a layer is chosen within: everything of a record but its layer set; altered fits choose among themselves.
CHOICE_KEYS = ["backbone", "control", "dataset", "protocol", "sigma", "draw", "pooling", "head", "seed"]

_ARROW = {"str": pa.string(), "int64": pa.int64(), "Int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
_RECORD_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


def set_label(layer_set: str, combination: str) -> str:
    """Layers of a set and, where they are not simply side by side, the rule that makes one score of them."""
    return layer_set if combination in ("single", "concat") else f"{layer_set} ({combination})"


def write_part(run: str | Path, record_id: str, rows: pd.DataFrame, margins: pd.DataFrame) -> None:
    """Write the rows and the margins of one record; the part comes last and makes the record count as done.

    Parameters
    ----------
    run
        Run folder; made if absent.
    record_id
        Name of the record: letters, digits, ``_`` and ``-``.
    rows
        `RESULT_COLUMNS`, in any order, without ``chosen`` and those that `rebuild` fills in, which depend on
        other records or on the store alone.
    margins
        `MARGIN_COLUMNS`: one row for each validation and test pair.
    """
    if not _RECORD_ID.fullmatch(record_id):
        msg = f"record_id is {record_id!r}; allowed: letters, digits, '_' and '-', at most 128"
        raise ResultsError(msg)
    run = Path(run)
    rows = rows.assign(chosen=False)
    _check_rows(rows, f"record {record_id}")
    if set(rows["record_id"]) != {record_id}:
        msg = f"record {record_id}: column record_id holds {sorted(set(rows['record_id']))[:3]}"
        raise ResultsError(msg)
    _write_table(run / "margins" / f"{record_id}.parquet", margins, MARGIN_COLUMNS)
    _write_table(_part_path(run, record_id), rows, _PART_COLUMNS)


def done_records(run: str | Path) -> set[str]:
    """Ids of the records whose part exists and reads; a damaged part is an error that names it."""
    paths = sorted((Path(run) / "parts").glob("*.parquet"))
    for path in paths:
        _read_arrow(path, _PART_COLUMNS)
    return {path.stem for path in paths}


def rebuild(run: str | Path, record_ids: Sequence[str], *, facts: pd.DataFrame | None = None) -> int:
    """Join the parts of the current plan into ``results.parquet``, in the order of the plan, and mark chosen layers.

    Parts of earlier configurations stay on disk and are not read. Scores from elsewhere (ids that begin with
    `EXTERNAL`) come after the plan, whichever it is.

    Parameters
    ----------
    run
        Run folder.
    record_ids
        Records of the plan.
    facts
        What the stores say of the records, indexed by record: ``family_tested``, ``sigma_ratio``, ``pooling_layers``
        and ``imported``. Without it every family counts as tested, no noise level as measured, every pooling as
        existing at all ``n_blocks + 1`` layers, and nothing as imported.

    Returns
    -------
    int
        How many such other parts the run holds.
    """
    run = Path(run)
    outside = sorted(path.stem for path in (run / "parts").glob(f"{EXTERNAL}*.parquet"))
    keys = [*record_ids, *(key for key in outside if key not in set(record_ids))]
    if not keys:
        msg = f"{run}: the plan holds no record, so there is no results table to write"
        raise ResultsError(msg)
    parts = [_read_arrow(_part_path(run, key), _PART_COLUMNS).replace_schema_metadata() for key in keys]
    frame = _to_pandas(pa.concat_tables(parts), _PART_COLUMNS)
    known = frame.assign(family_tested=True, sigma_ratio=np.nan, pooling_layers=frame["n_blocks"] + 1, imported=False)
    if facts is not None:
        stored = frame["record_id"].isin(facts.index)
        filled = {name: frame["record_id"].map(facts[name]).where(stored, known[name]) for name in _FILLED_IN}
        known = frame.assign(**{name: values.astype(known[name].dtype) for name, values in filled.items()})
    frame = known
    _write_table(run / "results.parquet", mark_chosen(frame), RESULT_COLUMNS)
    return len({path.stem for path in (run / "parts").glob("*.parquet")} - set(keys))


def add_external(run: str | Path, record_id: str, rows: pd.DataFrame, margins: pd.DataFrame) -> None:
    """Write the part of scores from elsewhere and put it into ``results.parquet``, behind what is there.

    Scores of the same name, data set and protocol take the place of earlier ones.

    Parameters
    ----------
    run, record_id, rows, margins
        As in `write_part`; the id begins with `EXTERNAL`.
    """
    run = Path(run)
    write_part(run, record_id, rows, margins)
    same = ["backbone", "dataset", "protocol"]
    for path in (run / "parts").glob(f"{EXTERNAL}*.parquet"):
        other = _read_table(path, _PART_COLUMNS)
        if path.stem != record_id and (other[same].iloc[0] == rows[same].iloc[0]).all():
            path.unlink()
            (run / "margins" / path.name).unlink(missing_ok=True)
    if not (run / "results.parquet").is_file():
        rebuild(run, [])
        return
    frame = load_results(run)
    planned = frame[frame["head_kind"] != "external"].drop_duplicates("record_id").set_index("record_id")
    rebuild(run, list(planned.index), facts=planned[list(_FILLED_IN)])


def load_results(run: str | Path) -> pd.DataFrame:
    """Read the tidy frame of a run, checked against `RESULT_COLUMNS`."""
    path = Path(run) / "results.parquet"
    if not path.is_file():
        check_finished(run)
        msg = f"{path}: no results table; a run folder is what `probekit sweep --out` writes"
        raise ResultsError(msg)
    frame = _read_table(path, RESULT_COLUMNS)
    _check_rows(frame, str(path))
    return frame


def as_they_are(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of fits on training pairs and features as they are: neither refits nor altered features."""
    return frame[frame["altered"] == ""]


def load_margins(run: str | Path, record_ids: Iterable[str] | None = None) -> pd.DataFrame:
    """Read the margins of some records (default: of every record in the results table).

    Returns
    -------
    pandas.DataFrame
        ``record_id`` and `MARGIN_COLUMNS`; the pairs of a record in the order in which they were written.
    """
    if record_ids is None:
        record_ids = load_results(run)["record_id"].unique()
    frames = []
    for record_id in record_ids:
        frame = _read_table(Path(run) / "margins" / f"{record_id}.parquet", MARGIN_COLUMNS)
        frame.insert(0, "record_id", record_id)
        frames.append(frame)
    if not frames:
        return pd.DataFrame(
            {name: pd.Series(dtype=dtype) for name, dtype in ({"record_id": "str"} | MARGIN_COLUMNS).items()}
        )
    return pd.concat(frames, ignore_index=True)


def write_beyond(run: str | Path, rows: pd.DataFrame) -> None:
    """Write what chosen layers add to the generators' names (`BEYOND_COLUMNS`); without rows the table goes."""
    _write_or_remove(Path(run) / "beyond_generator.parquet", rows, BEYOND_COLUMNS)


def load_beyond(run: str | Path) -> pd.DataFrame:
    """Read what chosen layers add to the generators' names; empty where the run has no generator baseline."""
    return _read_or_none(Path(run) / "beyond_generator.parquet", BEYOND_COLUMNS)


def write_controls(run: str | Path, rows: pd.DataFrame) -> None:
    """Write what refits and altered features say (`CONTROL_COLUMNS`); without rows the table goes."""
    _write_or_remove(Path(run) / "controls.parquet", rows, CONTROL_COLUMNS)


def load_controls(run: str | Path) -> pd.DataFrame:
    """Read what refits and altered features say; empty where no head asked for them."""
    return _read_or_none(Path(run) / "controls.parquet", CONTROL_COLUMNS)


def write_blocks(run: str | Path, rows: pd.DataFrame) -> None:
    """Write blocks of layers and what pairs within and across them read (`BLOCK_COLUMNS`); without rows it goes."""
    _write_or_remove(Path(run) / "blocks.parquet", rows, BLOCK_COLUMNS)


def load_blocks(run: str | Path) -> pd.DataFrame:
    """Read blocks of layers and what pairs within and across them read; empty where no head asked for blocks."""
    return _read_or_none(Path(run) / "blocks.parquet", BLOCK_COLUMNS)


def write_families(run: str | Path, families: pd.DataFrame, trajectories: pd.DataFrame) -> None:
    """Write layers judged together (`FAMILY_COLUMNS`) and the paths of pairs (`TRAJECTORY_COLUMNS`)."""
    _write_or_remove(Path(run) / "families.parquet", families, FAMILY_COLUMNS)
    _write_or_remove(Path(run) / "trajectories.parquet", trajectories, TRAJECTORY_COLUMNS)


def load_families(run: str | Path) -> pd.DataFrame:
    """Read what holds for the layers of each backbone together; empty where no head reads two single layers."""
    return _read_or_none(Path(run) / "families.parquet", FAMILY_COLUMNS)


def load_trajectories(run: str | Path) -> pd.DataFrame:
    """Read at which layers each test pair is right; empty where no head reads two single layers."""
    return _read_or_none(Path(run) / "trajectories.parquet", TRAJECTORY_COLUMNS)


def _write_or_remove(path: Path, rows: pd.DataFrame, columns: Mapping[str, str]) -> None:
    if rows.empty:
        path.unlink(missing_ok=True)
    else:
        _write_table(path, rows, columns)


def _read_or_none(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    if not path.is_file():
        return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in columns.items()})
    return _read_table(path, columns)


def write_config(run: str | Path, config: Mapping[str, Any]) -> None:
    """Write the resolved configuration of a run as ``config.json``."""
    _replace(Path(run) / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def load_config(run: str | Path) -> dict[str, Any]:
    """Read the resolved configuration of a run; empty where the run has none."""
    path = Path(run) / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path}: not readable as JSON ({error}); run the same sweep again to write it anew"
        raise ResultsError(msg) from error
    if not isinstance(config, dict):
        msg = f"{path}: holds a {type(config).__name__}; a configuration is an object"
        raise ResultsError(msg)
    return config


def check_finished(run: str | Path) -> None:
    """Refuse a run of which some planned fits are missing, or stand in parts and not yet in the results table.

    Raises
    ------
    ResultsError
        If its sweep was stopped.
    """
    run = Path(run)
    config = load_config(run)
    planned = config.get(PLAN)
    if planned is None:  # no sweep wrote it
        return
    parts = {path.stem for path in (run / "parts").glob("*.parquet")}
    held = set(load_results(run)["record_id"]) if (run / "results.parquet").is_file() else set()
    if {key for key in held if not key.startswith(EXTERNAL)} != set(planned) or not config.get(JUDGED):
        msg = (
            f"{run}: not finished: {len(parts & set(planned)):,} of {len(planned):,} fits are done; the same "
            "`probekit sweep` command finishes it"
        )
        raise ResultsError(msg)


def describe_run(run: str | Path) -> dict[str, Any]:
    """Plain facts of a run for ``inspect``: what was fitted, and the test accuracy of the chosen layers.

    Raises
    ------
    ResultsError
        If the run is not finished or its results are damaged.
    """
    check_finished(run)
    frame = as_they_are(load_results(run))
    test = frame[(frame["split"] == "test") & (frame["slice_by"] == "all")]
    beside = test[test["head_kind"].isin(UNPROBED)]
    frame, test = (rows[~rows["head_kind"].isin(UNPROBED)] for rows in (frame, test))
    shown = [
        "backbone",
        "control",
        "dataset",
        "sigma",
        "draw",
        "pooling",
        "head",
        "seed",
        "layer_set",
        "accuracy",
        "low",
        "high",
        "converged",
    ]
    unresolved = frame.loc[frame["sigma_ratio"] < RESOLVED_RATIO, ["backbone", "control", "sigma", "sigma_ratio"]]
    return {
        "path": str(run),
        "records": int(frame["record_id"].nunique()),
        "fits": frame.drop_duplicates("record_id").groupby("head", sort=False).size().to_dict(),
        **{
            f"{column}s": sorted(frame[column].unique().tolist())
            for column in ("dataset", "protocol", "sigma", "draw", "pooling", "backbone", "control", "head")
        },
        "splits": load_config(run).get("splits", {}),
        "left_out": load_config(run).get("left_out", {}),
        "unresolved": unresolved.drop_duplicates().to_dict("records"),
        "test_pairs": int(test["n_pairs"].max()) if len(test) else 0,
        "chosen": test.loc[test["chosen"], shown].to_dict("records"),
        "scorers": beside[["backbone", "control", "dataset", "protocol", "accuracy", "low", "high"]].to_dict("records"),
    }


def knowing_nothing(rows: pd.DataFrame) -> str:
    """Say what scorers that know nothing get, of the row with the most pairs; empty where no pair was scored."""
    known = rows[rows["expected_random"].notna()].sort_values("n_pairs", kind="stable")
    columns = ["expected_random", "expected_constant", "expected_first"]
    return str(Expectations(*known[columns].iloc[-1])) if len(known) else ""


def knowing_nothing_lines(run: str | Path) -> list[tuple[str, str]]:
    """Say this of the test pairs of each data set of a run, by the protocol of its heads, as (heading, text)."""
    frame = as_they_are(load_results(run))
    test = frame[(frame["split"] == "test") & (frame["slice_by"] == "all") & ~frame["head_kind"].isin(UNPROBED)]
    return [
        (f"knowing nothing, {dataset}", f"{text}; by {protocol} on {rows['n_pairs'].max():,} test pairs")
        for (dataset, protocol), rows in test.groupby(["dataset", "protocol"], sort=False)
        if (text := knowing_nothing(rows))
    ]


def mark_chosen(frame: pd.DataFrame) -> pd.DataFrame:
    """Fill ``chosen``: all rows of the single layer with the best validation accuracy within `CHOICE_KEYS`.

    The output point is no layer and is never chosen. Equal accuracies go to the earlier layer. Settings without
    validation rows, or with fewer than two single layers, choose nothing.
    """
    candidates = frame[
        (frame["split"] == "validation")
        & (frame["slice_by"] == "all")
        & (frame["combination"] == "single")
        & (frame["layer"] <= frame["n_blocks"]).fillna(False)  # noqa: FBT003
        & frame["accuracy"].notna()
    ].sort_values(["accuracy", "layer"], ascending=[False, True], kind="stable")
    within = [*CHOICE_KEYS, "altered"]
    several = candidates.duplicated(within, keep=False)
    best = candidates[several].drop_duplicates(within)
    keys = [*within, "record_id"]
    chosen = pd.MultiIndex.from_frame(frame[keys]).isin(pd.MultiIndex.from_frame(best[keys]))
    return frame.assign(chosen=chosen)


def _part_path(run: Path, record_id: str) -> Path:
    return run / "parts" / f"{record_id}.parquet"


def _check_rows(rows: pd.DataFrame, where: str) -> None:
    """Refuse rows whose values no honest record can hold."""
    for column, allowed in (
        ("split", SPLITS),
        ("head_kind", ("linear", "mlp", *UNPROBED)),
        ("slice_by", ("all", *SLICES)),
    ):
        if strange := set(rows[column].unique()) - set(allowed):
            bad = sorted(strange)[0]
            msg = f"{where}: column {column} holds {bad!r}; allowed: {', '.join(allowed)}"
            raise ResultsError(msg)
    accuracy = rows["accuracy"].to_numpy(dtype=np.float64)
    if ((accuracy < 0) | (accuracy > 1)).any():
        msg = f"{where}: column accuracy holds {accuracy[(accuracy < 0) | (accuracy > 1)][0]}; allowed: 0 to 1, or NaN"
        raise ResultsError(msg)
    names = ["record_id", "dataset", "split", "slice_by", "source", "protocol"]
    if len(set(zip(*(rows[name].tolist() for name in names), strict=True))) < len(rows):
        row = rows[rows.duplicated(names)].iloc[0]
        msg = (
            f"{where}: two rows for data set {row['dataset']!r}, split {row['split']!r}, {row['slice_by']!r}, source "
            f"{row['source']!r}, protocol {row['protocol']!r}"
        )
        raise ResultsError(msg)


def _write_table(path: Path, frame: pd.DataFrame, columns: Mapping[str, str]) -> None:
    """Write `columns` of `frame` without pandas' own metadata, which would tie the bytes to library versions."""
    if set(frame.columns) != set(columns):
        missing, unknown = sorted(set(columns) - set(frame.columns)), sorted(set(frame.columns) - set(columns))
        msg = f"{path.name}: missing columns {missing}, unknown columns {unknown}"
        raise ResultsError(msg)
    fields = [pa.field(name, _ARROW[dtype], nullable=dtype in ("Int64", "float64")) for name, dtype in columns.items()]
    schema = pa.schema(fields, metadata={"probekit_results": RESULTS_VERSION})
    arrays = []
    for field in schema:
        try:
            arrays.append(pa.array(frame[field.name], field.type, from_pandas=True))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            msg = f"{path.name}: column {field.name} does not have the type of the schema ({error})"
            raise ResultsError(msg) from error
        if not field.nullable and arrays[-1].null_count:
            msg = f"{path.name}: column {field.name} has missing values"
            raise ResultsError(msg)
    table = pa.Table.from_arrays(arrays, schema=schema)
    sink = pa.BufferOutputStream()
    with ParquetWriter(sink, schema, compression="zstd") as writer:
        writer.write_table(table)
    _replace(path, sink.getvalue().to_pybytes())


def _read_table(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    return _to_pandas(_read_arrow(path, columns), columns)


def _read_arrow(path: Path, columns: Mapping[str, str]) -> pa.Table:
    try:
        table = ParquetFile(path).read()
    except FileNotFoundError as error:
        msg = f"{path}: missing; run the same sweep again to compute it"
        raise ResultsError(msg) from error
    except (OSError, pa.ArrowException) as error:
        detail = str(error).splitlines()[0]
        msg = f"{path}: damaged ({detail}); delete it and run the same sweep again to compute it anew"
        raise ResultsError(msg) from error
    version = (table.schema.metadata or {}).get(b"probekit_results", b"none").decode()
    if version.partition(".")[0] != RESULTS_VERSION.partition(".")[0]:
        msg = f"{path}: written in results format {version}; this version reads {RESULTS_VERSION}"
        raise ResultsError(msg)
    if missing := [name for name in columns if name not in table.column_names]:
        old = f" (written in results format {version}, this is {RESULTS_VERSION})" if version != RESULTS_VERSION else ""
        kept = {"parts": "the folder", "margins": "the folder parts beside its own"}
        what = kept.get(path.parent.name, "the file")
        msg = f"{path}: column {missing[0]!r} is missing{old}; delete {what} and run the same sweep again"
        raise ResultsError(msg)
    return table.select(list(columns))


def _to_pandas(table: pa.Table, columns: Mapping[str, str]) -> pd.DataFrame:
    schema = pa.schema([(name, _ARROW[dtype]) for name, dtype in columns.items()])
    table = table.cast(schema)
    frame: pd.DataFrame = table.to_pandas()
    for name, dtype in columns.items():
        if dtype == "Int64":  # a plain conversion turns integers with gaps into floats
            frame[name] = table.column(name).to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    return frame


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or all of the new one, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself lives in the folder
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
