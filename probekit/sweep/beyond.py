"""What a chosen layer adds to what the generators' names say of a pair, from the margins of a run."""

from pathlib import Path

import numpy as np
import pandas as pd

from probekit.heads import BradleyTerryClassifier
from probekit.results import UNPROBED, as_they_are, load_margins, load_results
from probekit.stats import paired_difference, right_with_a_coin
from probekit.sweep.baselines import GENERATOR

_STRENGTH = 100.0  # two coefficients on hundreds of pairs: next to no penalty


def beyond_generator(run: Path, *, resamples: int, level: float) -> pd.DataFrame:
    """Accuracy of head and generator logit together minus that of the generator logit alone, on the same test pairs.

    The two coefficients, without an intercept, are fitted on the validation pairs, which neither the head nor the
    generators' strengths were fitted on. A pair about which a score says nothing counts half: by the strict protocol
    it would be wrong, and the head would gain half of all pairs of one generator by guessing.

    Parameters
    ----------
    run
        A run whose results table is written.
    resamples, level
        Of the paired intervals.

    Returns
    -------
    DataFrame
        ``BEYOND_COLUMNS`` of `probekit.results`: one row for each chosen layer and data set that names generators.
    """
    frame = as_they_are(load_results(run))
    test = frame[(frame["split"] == "test") & (frame["slice_by"] == "all")]
    prior = test[(test["head_kind"] == "metadata") & (test["backbone"] == GENERATOR)]
    chosen = test[test["chosen"] & ~test["head_kind"].isin(UNPROBED)]
    keys = ["trained_on", "dataset", "protocol"]
    both = chosen[[*keys, "record_id"]].merge(prior[[*keys, "record_id"]], on=keys, suffixes=("", "_prior"))
    margins = {key: load_margins(run, [key]) for key in both["record_id_prior"].unique()}
    rows = []
    for found in both.itertuples(index=False):
        ours = load_margins(run, [str(found.record_id)])
        theirs = margins[found.record_id_prior][["split", "dataset", "pair_id", "margin", "label"]]
        pairs = ours.merge(theirs, on=["split", "dataset", "pair_id"], suffixes=("", "_prior"))
        # Of two stores one may be of an earlier version, which chose the sides of pairs otherwise.
        pairs["margin_prior"] *= np.where((pairs["label"] > 0.5) == (pairs["label_prior"] > 0.5), 1, -1)
        decided = pairs[pairs["label"] != 0.5]
        scores = decided[["margin", "margin_prior"]].to_numpy(np.float64)
        fit_on = (decided["split"] == "validation").to_numpy()
        judge = ((decided["split"] == "test") & (decided["dataset"] == found.dataset)).to_numpy()
        if not scores[fit_on].any() or not judge.any():
            continue
        head = BradleyTerryClassifier(C=_STRENGTH).fit_differences(
            scores[fit_on], decided["label"].to_numpy(np.float64)[fit_on]
        )
        label = decided["label"].to_numpy(np.float64)[judge]
        alone = right_with_a_coin(scores[judge, 1], label)
        joint = right_with_a_coin(scores[judge] @ head.coef_, label)
        groups = decided["group"].to_numpy()[judge]
        gain = paired_difference(joint, alone, groups, n_boot=resamples, level=level)
        rows.append(
            {
                "record_id": found.record_id,
                "baseline_id": found.record_id_prior,
                "dataset": found.dataset,
                "head_coefficient": float(head.coef_[0]),
                "generator_coefficient": float(head.coef_[1]),
                "n_pairs": gain.n_pairs,
                "n_same": int((scores[judge, 1] == 0).sum()),
                "accuracy_generator": float(alone.mean()),
                "accuracy_both": float(joint.mean()),
                "difference": gain.estimate,
                "low": gain.low,
                "high": gain.high,
                "se": gain.se,
                "detectable": gain.detectable,
            }
        )
    return pd.DataFrame(rows)
