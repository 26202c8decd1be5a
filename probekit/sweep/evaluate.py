"""What is said of a fitted head: the columns of its rows in the results, and its accuracy with intervals."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd

from probekit._types import FloatArray
from probekit.heads import layer_set_name
from probekit.stats import Outcome, accuracy_interval, macro_interval
from probekit.store import FeatureStore, Pairs
from probekit.sweep.judging import asked_of, judge, kept_with_pairs, measures, tuned_threshold
from probekit.sweep.material import Material
from probekit.sweep.plan import Judged, Record
from probekit.sweep.slices import Detail, slices_of

SLICE_RESAMPLES = 4  # slices rest on this fraction of the resamples: all of them together cost no more than the whole


def record_facts(record: Record, store: FeatureStore) -> dict[str, Any]:
    """Give the columns that say what was fitted on what."""
    facts = store.describe
    single = len(record.layers) == 1
    # the output point (layer n_blocks + 1) is no deeper than the last layer; one imported layer alone has no depth
    has_depth = single and facts["n_blocks"] > 0
    depth = min(record.layers[0], facts["n_blocks"]) / facts["n_blocks"] if has_depth else np.nan
    return {
        "record_id": record.record_id,
        "backbone": record.backbone,
        "control": record.control,
        "trained_on": record.trained_on,
        "protocol": record.protocol,
        "sigma": record.sigma,
        "draw": record.draw,
        "pooling": record.pooling,
        "layer_set": layer_set_name(record.layers),
        "layer": record.layers[0] if single else None,
        "n_layers": len(record.layers),
        "combination": record.combination,
        "head": record.head.name,
        "head_kind": record.head.kind,
        "seed": record.seed,
        "altered": record.altered,
        "backbone_parameters": facts["n_parameters"],
        "width": facts["width"],
        "n_blocks": facts["n_blocks"],
        "relative_depth": depth,
        "training_images": record.training_images,
        "store_fingerprint": record.fingerprint,
        "data_digest": record.data_digest,
        "probekit_version": version("dit-probekit"),
    }


def judged_rows(
    record: Judged,
    data: Material,
    margins: Callable[[Pairs], FloatArray],
    facts: dict[str, Any],
    *,
    blind: bool = False,
    detail: Detail = "slices",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and margins of one record on validation and every test set, as `probekit.results.write_part` takes them.

    Parameters
    ----------
    record
        Protocol, resamples and level.
    data
        Pairs of the record.
    margins
        From pairs to the margins (n,) of the head.
    facts
        Columns that all rows share.
    blind
        Whether there is no head.
    detail
        As in `accuracies`.
    """
    chosen_on = margins(data.validation)
    threshold = tuned_threshold(record.protocol, chosen_on, data.validation.label)
    judged = partial(judge, record.protocol, threshold=threshold)
    trained = judged(margins(data.train), data.train.label, asked_of(data.train))
    tests = {dataset: margins(pairs) for dataset, pairs in data.tests.items()}
    facts |= {
        "train_accuracy": np.nan if blind else trained.accuracy,
        "n_train": len(data.train.label),
        "train_left_out": len(data.train.excluded),
        "train_ties": data.train_ties,
        "train_connected": data.train_connected,
    }
    options: dict[str, Any] = {"blind": blind, "threshold": threshold, "detail": detail}
    weight = data.validation_weight
    validation = [*accuracies(record, data.validation, chosen_on, split="validation", weight=weight, **options)]
    rows = []
    for dataset, pairs in data.tests.items():
        tested = accuracies(record, pairs, tests[dataset], split="test", **options)
        rows += [facts | {"dataset": dataset} | row for row in (*validation, *tested)]
    kept = [kept_margins(data.validation, chosen_on, judged, split="validation")]
    kept += [kept_margins(data.tests[dataset], values, judged, split="test") for dataset, values in tests.items()]
    return pd.DataFrame(rows), pd.concat(kept)


def kept_margins(pairs: Pairs, margins: FloatArray, judged: Callable[..., Outcome], *, split: str) -> pd.DataFrame:
    """Margins (n,) of pairs as the run keeps them; `judged` scores (margins, labels, `Asked`) under the protocol."""
    correct = judged(margins, pairs.label, asked_of(pairs)).correct
    return _named(pairs).assign(split=split, margin=margins, correct=correct)


@kept_with_pairs
def _named(pairs: Pairs) -> pd.DataFrame:
    """Columns of kept margins that say which pairs they are of."""
    named = pairs.frame[["pair_id", "dataset", "group", "source", "prompt_id"]]
    return named.assign(row_a=pairs.rows[:, 0], row_b=pairs.rows[:, 1], label=pairs.label)


def accuracies(
    record: Judged,
    pairs: Pairs,
    margins: FloatArray,
    *,
    split: str,
    weight: FloatArray | None = None,
    blind: bool = False,
    threshold: float | None = None,
    detail: Detail = "slices",
) -> Iterator[dict[str, Any]]:
    """Accuracy over all pairs of a split, then per slice; intervals by the group bootstrap; none without a head.

    Parameters
    ----------
    record
        Protocol, resamples and level.
    pairs, margins
        The n pairs and what the head says of them.
    split
        What the rows are called.
    weight
        Of each pair (n,), where data sets of a mixture weigh differently.
    blind
        Whether there is no head, since no training pair differed.
    threshold
        Of a protocol that has one.
    detail
        "slices" for everything; "sources" leaves out slices other than kinds of the file; "whole" kinds and the mean
        over them as well, and a quarter of the resamples is enough.
    """
    whole = detail == "whole"
    if split != "test" and detail == "slices":
        detail = "sources"
    for some in slices_of(pairs, record.protocol, detail=detail):
        inside = some.inside
        outcome = judge(record.protocol, margins[inside], some.labels, some.asked, threshold=threshold)
        decided = ~np.isnan(outcome.correct) & (not blind)
        row: dict[str, Any] = {
            "split": split,
            "slice_by": some.slicing,
            "source": some.source,
            "n_pairs": outcome.n_pairs,
            "true_ties": outcome.true_ties,
            "predicted_ties": outcome.predicted_ties,
            "left_out": some.left_out,
        }
        row |= dict.fromkeys(("accuracy", "low", "high", "se", "effective_groups"), np.nan) | {"n_groups": 0}
        row |= dict.fromkeys(("macro_accuracy", "macro_low", "macro_high"), np.nan)
        row |= measures(outcome, some.asked, some.nothing, threshold=threshold, blind=blind)
        if decided.any():
            full = some.slicing in ("all", "source") and not whole
            n_boot = record.resamples if full else max(100, record.resamples // SLICE_RESAMPLES)
            options: dict[str, Any] = {"n_boot": n_boot, "level": record.level}
            correct, groups = outcome.correct[decided], some.groups[decided]
            options["weights"] = outcome.weight[decided] * (1.0 if weight is None else weight[inside][decided])
            interval = accuracy_interval(correct, groups, **options)
            row |= {
                "accuracy": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "se": interval.se,
                "n_groups": interval.n_groups,
                "effective_groups": interval.effective_groups,
            }
            if some.slicing == "all" and not whole:
                macro = macro_interval(correct, groups, some.sources[decided], **options)
                row |= {"macro_accuracy": macro.estimate, "macro_low": macro.low, "macro_high": macro.high}
        yield row
