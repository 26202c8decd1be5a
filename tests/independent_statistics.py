"""The numbers of a report once more, from stored margins by plain loops: numpy only, nothing of probekit.

Which groups a resample draws is part of a number: resample b of B over G groups is row b - start of
``numpy.random.default_rng([seed, G, start]).integers(G, size=(rows, G))``, drawn in portions of 500,000 // G rows that
begin at ``start``; groups count in the sorted order of their names.
"""

import numpy as np


def strict(margins, labels):
    """1 right, 0 wrong; pairs with label 0.5 are left out by the caller."""
    return (np.sign(margins) == np.sign(labels - 0.5)).astype(float)


def resamples(n_groups, n_boot, seed=0):
    portion = max(1, 500_000 // n_groups)
    for start in range(0, n_boot, portion):
        rows = min(portion, n_boot - start)
        yield from np.random.default_rng([seed, n_groups, start]).integers(n_groups, size=(rows, n_groups))


def by_group(correct, groups):
    """Right answers (G, L) and pairs (G,) of each group."""
    names = sorted(set(groups))
    right = [[layer[groups == name].sum() for layer in correct] for name in names]
    return np.array(right), np.array([(groups == name).sum() for name in names])


def accuracies(right, size):
    return right.sum(axis=0) / size.sum()


def covariance(right, size):
    """Of accuracies, by linearisation over groups."""
    n_groups = len(size)
    total = np.zeros((right.shape[1],) * 2)
    for y, n in zip(right, size, strict=True):
        residual = y - accuracies(right, size) * n
        total += np.outer(residual, residual)
    return n_groups / (n_groups - 1) * total / size.sum() ** 2


def sigmoid(theta):
    return 1 / (1 + np.exp(-theta))


def logit(a):
    return np.log(a / (1 - a))


def studentised_logits(right, size, n_boot):
    """T (B, L) of every resample."""
    centre, ts = logit(accuracies(right, size)), []
    for chosen in resamples(len(size), n_boot):
        y, n = right[chosen], size[chosen]
        a = accuracies(y, n)
        ts.append((logit(a) - centre) / (np.sqrt(np.diag(covariance_of(y, n, a))) / (a * (1 - a))))
    return np.array(ts)


def covariance_of(right, size, accuracy):
    residual = right - accuracy * size[:, None]
    return len(size) / (len(size) - 1) * residual.T @ residual / size.sum() ** 2


def interval(correct, groups, n_boot=2000):
    """Estimate and limits."""
    right, size = by_group(correct[None], groups)
    a = accuracies(right, size)[0]
    scale = np.sqrt(covariance(right, size)[0, 0]) / (a * (1 - a))
    t = studentised_logits(right, size, n_boot)[:, 0]
    return a, sigmoid(logit(a) - np.quantile(t, 0.975) * scale), sigmoid(logit(a) - np.quantile(t, 0.025) * scale)


def band(correct, groups, n_boot=2000):
    """Estimates, lower and upper limits of all layers together."""
    right, size = by_group(correct, groups)
    a = accuracies(right, size)
    q = np.quantile(np.abs(studentised_logits(right, size, n_boot)).max(axis=1), 0.95)
    reach = q * np.sqrt(np.diag(covariance(right, size))) / (a * (1 - a))
    return a, sigmoid(logit(a) - reach), sigmoid(logit(a) + reach)


def leads(right, size):
    """Lead of head k over head l, and its standard error; the error of a head over itself counts as infinite."""
    a, c = accuracies(right, size), covariance_of(right, size, accuracies(right, size))
    variance = np.diag(c)[:, None] + np.diag(c)[None] - 2 * c
    np.fill_diagonal(variance, np.inf)
    return a[:, None] - a[None], np.sqrt(variance)


def plateau(correct, groups, n_boot=2000):
    """P of each head being one of the best, and the upper limit of its distance to the best."""
    right, size = by_group(correct, groups)
    lead, se = leads(right, size)
    ts = []
    for chosen in resamples(len(size), n_boot):
        drawn, error = leads(right[chosen], size[chosen])
        ts.append((drawn - lead) / error)
    ts = np.array(ts)
    p, behind = [], []
    for head in range(len(lead)):
        others = [k for k in range(len(lead)) if k != head]
        observed = max(0, (lead / se)[others, head].max())
        p.append((1 + np.sum(ts[:, others, head].max(axis=1) >= observed)) / (n_boot + 1))
        limits = [lead[k, head] - np.quantile(ts[:, k, head], 0.05) * se[k, head] for k in others]
        behind.append(max(0, *limits))
    return np.array(p), np.array(behind)


def difference(correct_a, correct_b, groups, n_boot=2000):
    """Estimate and limits of a paired difference."""
    right, size = by_group(np.stack([correct_a, correct_b]), groups)
    lead, se = leads(right, size)
    t = []
    for chosen in resamples(len(size), n_boot):
        drawn, error = leads(right[chosen], size[chosen])
        t.append((drawn[0, 1] - lead[0, 1]) / error[0, 1])
    low, high = np.quantile(t, [0.025, 0.975])
    return lead[0, 1], lead[0, 1] - high * se[0, 1], lead[0, 1] - low * se[0, 1]


def romano_wolf(correct, reference, groups, n_boot=2000):
    """Adjusted p of each head against one reference."""
    right, size = by_group(np.vstack([correct, reference]), groups)
    lead, se = leads(right, size)
    observed = np.abs(lead / se)[:-1, -1]
    ts = []
    for chosen in resamples(len(size), n_boot):
        drawn, error = leads(right[chosen], size[chosen])
        ts.append(np.abs((drawn - lead) / error)[:-1, -1])
    ts = np.array(ts)
    adjusted, left, last = np.zeros(len(observed)), list(range(len(observed))), 0.0
    while left:
        head = max(left, key=lambda j: observed[j])
        last = max(last, (1 + np.sum(ts[:, left].max(axis=1) >= observed[head])) / (n_boot + 1))
        adjusted[head] = last
        left.remove(head)
    return adjusted


def slope(correct, log_size, groups):
    """Slope over backbones, and its standard error over backbones and pairs."""
    right, size = by_group(correct, groups)
    a, c = accuracies(right, size), covariance(right, size)
    x = np.stack([np.ones(len(log_size)), log_size], axis=1)
    projection = np.linalg.inv(x.T @ x) @ x.T
    off_line = np.eye(len(a)) - x @ projection
    over_backbones = (off_line @ a) @ (off_line @ a) / (len(a) - 2) * (projection @ projection.T)[1, 1]
    over_pairs = (projection @ c @ projection.T)[1, 1]
    counted = np.trace(off_line @ c) / (len(a) - 2) * (projection @ projection.T)[1, 1]
    return (projection @ a)[1], np.sqrt(over_backbones + max(0, over_pairs - min(counted, over_backbones)))
