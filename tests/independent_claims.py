"""Headline, band and claims of a run once more, from its stored margins: numpy and pandas only, nothing of probekit.

Definitions are those of ``probekit/stats`` and ``probekit/report/contrasts.py``, written down a second time. Layers are
chosen anew from the margins of validation pairs; of the results table only names and sizes are read.
"""

from math import exp, lgamma, pi, sqrt
from pathlib import Path
from statistics import NormalDist

import independent_statistics as basic
import numpy as np
import pandas as pd

Z = NormalDist().inv_cdf(0.975)


class Run:
    """Records of trained and random single layers and of all layers, with right or wrong on the pairs of each split."""

    def __init__(self, folder, head="linear"):
        folder = Path(folder)
        rows = pd.read_parquet(folder / "results.parquet")
        rows = rows[rows["head"] == head].drop_duplicates("record_id")
        self.rows = rows[rows["altered"] == ""].set_index("record_id")
        self.halves = rows[rows["altered"] == "half"].sort_values("seed")
        self.right = {}
        for key in [*self.rows.index, *self.halves["record_id"]]:
            margins = pd.read_parquet(folder / "margins" / f"{key}.parquet")
            margins = margins[margins["label"] != 0.5].set_index("pair_id")
            right = basic.strict(margins["margin"].to_numpy(), margins["label"].to_numpy())
            self.right[key] = {
                split: pd.Series(right, index=margins.index)[(margins["split"] == split).to_numpy()]
                for split in ("validation", "test")
            }
            self.groups = margins[margins["split"] == "test"]["group"].to_numpy()

    def test(self, key):
        return self.right[key]["test"].to_numpy()

    def refits(self, key):
        """Right or wrong (R, n) of a record refitted on halves of the training groups."""
        same = ["backbone", "control", "layer_set"]
        mine = self.halves[(self.halves[same] == self.rows.loc[key, same]).all(axis=1)]
        return np.stack([self.test(again) for again in mine["record_id"]])

    def best(self, backbone, control, wanted):
        """Record of the network that is best on validation, the earlier one of equal layers."""
        mine = self.rows[(self.rows["backbone"] == backbone) & (self.rows["control"] == control)]
        mine = mine[[bool(wanted(row)) for row in mine.to_dict("records")]].sort_values("layer")
        values = [self.right[key]["validation"].mean() for key in mine.index]
        return mine.index[int(np.argmax(values))]

    def chosen(self, backbone, control="trained"):
        return self.best(backbone, control, lambda row: row["n_layers"] == 1)

    def layers(self, backbone, control="trained"):
        """Right or wrong (L, n) of all single layers."""
        mine = self.rows[(self.rows["backbone"] == backbone) & (self.rows["control"] == control)]
        return np.stack([self.test(key) for key in mine[mine["n_layers"] == 1].sort_values("layer").index])


def difference(term, groups, n_boot):
    """Interval of a weighted sum of networks, none of them a sample: by group bootstrap on the t of its mean."""
    size = np.array([(groups == name).sum() for name in sorted(set(groups))])
    gain = np.array([term[groups == name].sum() for name in sorted(set(groups))])
    estimate = gain.sum() / size.sum()

    def error(y, n):
        residual = y - y.sum() / n.sum() * n
        return np.sqrt(len(n) / (len(n) - 1) * (residual**2).sum()) / n.sum()

    t = []
    for drawn in basic.resamples(len(size), n_boot):
        y, n = gain[drawn], size[drawn]
        t.append((y.sum() / n.sum() - estimate) / error(y, n))
    low, high = np.quantile(t, [0.025, 0.975])
    return estimate, estimate - high * error(gain, size), estimate - low * error(gain, size)


def of_training(refits, groups):
    """Variance over training samples, and that of the refits (R, n) themselves."""
    right, size = basic.by_group(refits, groups)
    accuracy, n = basic.accuracies(right, size), len(refits)
    scatter = accuracy.var(ddof=1)
    by_pairs = np.trace((np.eye(n) - 1 / n) @ basic.covariance(right, size)) / (n - 1)
    return max(scatter - by_pairs, 0), scatter


def freedom_of(rest, train, scatter, n):
    return (n - 1) * max((rest + train) ** 2 / scatter**2, 1) if train > 0 else float("inf")


def contrast(terms, groups, n_boot=2000, refits=None):
    """Estimate and limits of sum of sign x mean over the networks (S, n) of each side, networks being a sample.

    With refits (R, n) of the whole sum, training pairs are one too.
    """
    train, scatter = (0, 1) if refits is None else of_training(refits, groups)
    if all(len(networks) == 1 for _, networks in terms):
        term = sum(sign * networks[0] for sign, networks in terms)
        estimate, low, high = difference(term, groups, n_boot)
        if refits is None:
            return estimate, low, high
        test = ((high - low) / 2 / Z) ** 2
        t = t_quantile(freedom_of(test, train, scatter, len(refits)))
        grown = t * sqrt(test + train) / (Z * sqrt(test))
        return estimate, estimate - grown * (estimate - low), estimate + grown * (high - estimate)
    right, size = basic.by_group(np.concatenate([networks for _, networks in terms]), groups)
    accuracy, covariance = basic.accuracies(right, size), basic.covariance(right, size)
    weight = np.concatenate([np.full(len(networks), sign / len(networks)) for sign, networks in terms])
    parts, freedoms, seen, start = [], [], 0.0, 0
    for sign, networks in terms:
        s = len(networks)
        own = slice(start, start + s)
        start += s
        if s > 1:
            parts.append(sign**2 * accuracy[own].var(ddof=1) / s)
            freedoms.append(s - 1)
            centre = np.eye(s) - 1 / s
            seen += sign**2 * np.trace(centre @ covariance[own, own]) / ((s - 1) * s)
    rest = max(weight @ covariance @ weight - min(seen, sum(parts)), 0)
    uncertain = sum(part**2 / f for part, f in zip(parts, freedoms, strict=True))
    t = t_quantile(sum(parts) ** 2 / uncertain) if uncertain > 0 else Z
    of_rest = Z if refits is None else t_quantile(freedom_of(rest, train, scatter, len(refits)))
    reach = sqrt(t**2 * sum(parts) + of_rest**2 * (rest + train))
    estimate = weight @ accuracy
    return estimate, estimate - reach, estimate + reach


def t_quantile(freedom, p=0.975):
    """Student's quantile, by the trapezium rule on x = tan(u) and halving."""
    if freedom > 1e6:
        return NormalDist().inv_cdf(p)
    scale = exp(lgamma((freedom + 1) / 2) - lgamma(freedom / 2)) / sqrt(freedom * pi)

    def below(limit):
        u = np.linspace(0, np.arctan(limit), 20_001)
        density = scale * (1 + np.tan(u) ** 2 / freedom) ** (-(freedom + 1) / 2) / np.cos(u) ** 2
        return 0.5 + float(((density[1:] + density[:-1]) / 2 * np.diff(u)).sum())

    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < p else (low, middle)
    return (low + high) / 2


def slope(values, parameters, groups, refits=None):
    """Slope per doubling over backbones, each with one value (n,) for every pair, and its limits.

    With refits (k, R, n) of each backbone, training pairs are a sample too.
    """
    estimate, _ = basic.slope(np.array(values), np.log2(parameters), groups)
    right, size = basic.by_group(np.array(values), groups)
    a, c, k = basic.accuracies(right, size), basic.covariance(right, size), len(values)
    x = np.stack([np.ones(k), np.log2(parameters)], axis=1)
    projection = np.linalg.inv(x.T @ x) @ x.T
    off_line = np.eye(k) - x @ projection
    per_unit = (projection @ projection.T)[1, 1]
    networks = (off_line @ a) @ (off_line @ a) / (k - 2) * per_unit
    seen = np.trace(off_line @ c) / (k - 2) * per_unit
    rest = max((projection @ c @ projection.T)[1, 1] - min(seen, networks), 0)
    train, scatter = 0, 1
    if refits is not None:
        train, scatter = of_training(np.tensordot(projection[1], refits, axes=1), groups)
    of_rest = Z if refits is None else t_quantile(freedom_of(rest, train, scatter, len(refits[0])))
    reach = sqrt(t_quantile(k - 2) ** 2 * networks + of_rest**2 * (rest + train))
    return estimate, estimate - reach, estimate + reach
