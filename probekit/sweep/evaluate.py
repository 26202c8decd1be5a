"""What is said of a fitted head: the columns of its rows in the results, and its accuracy with intervals."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np

from probekit import results
from probekit._types import FloatArray
from probekit.heads import combination_name, layer_set_name
from probekit.stats import accuracy_interval, macro_interval
from probekit.store import FeatureStore, Pairs
from probekit.sweep.judging import judge, measures
from probekit.sweep.plan import Judged, Record


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
        "dataset": record.dataset,
        "protocol": record.protocol,
        "sigma": record.sigma,
        "draw": record.draw,
        "pooling": record.pooling,
        "layer_set": layer_set_name(record.layers),
        "layer": record.layers[0] if single else None,
        "n_layers": len(record.layers),
        "combination": combination_name(record.layers),
        "head": record.head.name,
        "head_kind": record.head.kind,
        "seed": record.seed,
        "backbone_parameters": facts["n_parameters"],
        "width": facts["width"],
        "n_blocks": facts["n_blocks"],
        "relative_depth": depth,
        "training_images": record.training_images,
        "store_fingerprint": record.fingerprint,
        "data_digest": record.data_digest,
        "probekit_version": version("dit-probekit"),
    }


def accuracies(
    record: Judged, pairs: Pairs, margins: FloatArray, *, split: str, blind: bool, threshold: float | None
) -> Iterator[dict[str, Any]]:
    """Accuracy over all pairs of a split, then per source; intervals by the group bootstrap; none without a head."""
    sources = pairs.frame["source"].to_numpy()
    groups = pairs.frame["group"].to_numpy()
    excluded = pairs.excluded
    kinds = sorted({*sources, *excluded["source"]})
    for source in [results.ALL_SOURCES, *(kinds if len(kinds) > 1 else [])]:
        inside = np.ones(len(sources), dtype=bool) if source == results.ALL_SOURCES else sources == source
        here, labels = pairs.frame[inside], pairs.label[inside]
        outcome = judge(record.protocol, margins[inside], labels, here, threshold=threshold)
        decided = ~np.isnan(outcome.correct) & (not blind)
        row: dict[str, Any] = {
            "split": split,
            "source": source,
            "n_pairs": outcome.n_pairs,
            "true_ties": outcome.true_ties,
            "predicted_ties": outcome.predicted_ties,
            "left_out": len(excluded) if source == results.ALL_SOURCES else int((excluded["source"] == source).sum()),
        }
        row |= dict.fromkeys(("accuracy", "low", "high", "se", "effective_groups"), np.nan) | {"n_groups": 0}
        row |= dict.fromkeys(("macro_accuracy", "macro_low", "macro_high"), np.nan)
        row |= measures(record.protocol, outcome, labels, here, threshold=threshold, blind=blind)
        if decided.any():
            options: dict[str, Any] = {"n_boot": record.resamples, "level": record.level}
            options["weights"] = outcome.weight[decided]
            correct, clusters = outcome.correct[decided], groups[inside][decided]
            interval = accuracy_interval(correct, clusters, **options)
            row |= {
                "accuracy": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "se": interval.se,
                "n_groups": interval.n_groups,
                "effective_groups": interval.effective_groups,
            }
            if source == results.ALL_SOURCES:
                macro = macro_interval(correct, clusters, sources[decided], **options)
                row |= {"macro_accuracy": macro.estimate, "macro_low": macro.low, "macro_high": macro.high}
        yield row
