"""The named definitions of "preference accuracy": from margins and labels to right and wrong.

n = pairs. A margin is the score of the first picture minus that of the second; a label is the probability that the
first is preferred: above or below 0.5 it names the preferred side, at 0.5 the pair is a true tie. A margin of zero is a
predicted tie. `PROTOCOLS` holds every definition by its name.

=========================  ================  ====================  ===============================
protocol                   mean over         true ties             predicted ties
=========================  ================  ====================  ===============================
``strict``                 pairs             not scored            wrong
``imagereward``            pairs             not scored            wrong
``hpsv2-imagereward``      prompts           not scored            wrong
``hpsv2-inversion``        prompts           right                 first side of the pair wins
``hpsv2-inversion-listed`` prompts           right                 side that the file lists first wins
``mps-inversion``          prompts           right                 right
``pickscore``              pairs             a label of their own  margin within a tuned threshold
=========================  ================  ====================  ===============================

A mean over prompts gives every prompt (ranking) with a scored pair the same weight. The originals divide by the
n(n-1)/2 pairs of a ranking; here it is by those of its pairs that were scored, which is the same where none was left
out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probekit._types import FloatArray

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""PickScore's grid of differences in probability below which a tie is predicted."""


@dataclass(frozen=True)
class Outcome:
    """Which pairs a head got right under a protocol.

    Attributes
    ----------
    correct
        (n,) 1 right, 0 wrong, 0.5 half a point, NaN not scored.
    weight
        (n,) what each pair counts in the accuracy; 0 where it is not scored.
    n_pairs
        Pairs that were scored.
    true_ties
        Pairs whose label prefers neither side.
    predicted_ties
        Scored pairs to which the head gave the same score twice (or nearly so, by the protocol's threshold).
    """

    correct: FloatArray
    weight: FloatArray
    n_pairs: int
    true_ties: int
    predicted_ties: int

    @property
    def accuracy(self) -> float:
        """Mean of what is right as the protocol weighs it; NaN if no pair was scored."""
        return float(np.nansum(self.weight * self.correct) / self.weight.sum()) if self.n_pairs else float("nan")

    @property
    def over_pairs(self) -> float:
        """Mean over scored pairs (micro), whatever the protocol weighs."""
        return float(np.nansum(self.correct)) / self.n_pairs if self.n_pairs else float("nan")

    def over_prompts(self, prompts: NDArray[Any]) -> float:
        """Mean over prompts (macro), whatever the protocol weighs; ``prompts`` (n,) names that of each pair."""
        if not self.n_pairs:
            return float("nan")
        weight = prompt_weights(self.correct, prompts)
        return float(np.nansum(weight * self.correct) / weight.sum())


def prompt_weights(correct: FloatArray, prompts: NDArray[Any]) -> FloatArray:
    """Give each scored pair (n,) one over the scored pairs of its prompt, so that prompts weigh alike; others 0."""
    correct, prompts = np.asarray(correct), np.asarray(prompts)
    if prompts.shape != correct.shape:
        message = f"prompts have shape {prompts.shape} and correct {correct.shape}; both must be (pairs,)"
        raise ValueError(message)
    scored = ~np.isnan(correct)
    weight = np.zeros(len(correct))
    member = np.unique(prompts[scored], return_inverse=True)[1]
    weight[scored] = 1 / np.bincount(member)[member]
    return weight


def strict(margins: FloatArray, labels: FloatArray) -> Outcome:
    """Score a pair as right when its margin has the sign of the preference; a margin of zero is wrong.

    Pairs with label 0.5 are not scored. Always answering "equal" thus scores 0, and a fair coin 50 %.

    Parameters
    ----------
    margins
        (n,) score of the first minus score of the second.
    labels
        (n,) probability that the first is preferred.

    Raises
    ------
    ValueError
        If lengths differ, a margin is not finite, or a label lies outside 0 to 1.

    Notes
    -----
    Pairs of a chosen and a rejected picture, as HPSv3, DRM and DiNa-LRM count them.

    Examples
    --------
    Right, wrong (the votes are 60 to 40 for the first), a predicted tie, and a true tie:

    >>> outcome = strict(np.array([1.0, -1.0, 0.0, 2.0]), np.array([1.0, 0.6, 0.0, 0.5]))
    >>> outcome.correct
    array([ 1.,  0.,  0., nan])
    >>> round(outcome.accuracy, 3), outcome.true_ties, outcome.predicted_ties
    (0.333, 1, 1)
    """
    right, tied = _agreement(margins, labels)
    return _outcome(np.where(tied, np.nan, right), tied, np.asarray(margins) == 0)


def imagereward(margins: FloatArray, labels: FloatArray) -> Outcome:
    """Mean over all pairs of rankings; true ties are not scored, predicted ties are wrong.

    On pairs it is the same as `strict`: what the name adds is that the pairs are all i < j of a ranking.

    Notes
    -----
    ``acc`` in ``test.py`` of THUDM/ImageReward. Parameters and errors as in `strict`.

    Examples
    --------
    Ranks 1, 2, 2 and scores 0.3, 0.3, 0.1 give the pairs (1, 2), (1, 3), (2, 3): a predicted tie, right, a true tie.

    >>> imagereward(np.array([0.0, 0.2, 0.2]), np.array([1.0, 1.0, 0.5])).accuracy
    0.5
    """
    return strict(margins, labels)


def hpsv2_imagereward(margins: FloatArray, labels: FloatArray, *, prompts: NDArray[Any]) -> Outcome:
    """Mean over prompts of the share of pairs that are right; true ties are not scored, predicted ties are wrong.

    A prompt all of whose pairs are true ties is left out (the original divides by zero there).

    Notes
    -----
    ``calc_ImageReward`` in ``training/train.py`` of tgxs002/HPSv2. Parameters and errors as in `strict`, and
    ``prompts`` (n,): the ranking that each pair belongs to.

    Examples
    --------
    Prompt x has one of its three pairs right, prompt y its only decided one: 1/3 and 1, where the mean over the pairs
    would be 1/2.

    >>> prompts = np.array(["x", "x", "x", "y", "y"])
    >>> outcome = hpsv2_imagereward(np.array([1, -1, 0, 1, 1.0]), np.array([1, 1, 1, 1, 0.5]), prompts=prompts)
    >>> round(outcome.accuracy, 3), outcome.over_pairs
    (0.667, 0.5)
    """
    return _by_prompt(strict(margins, labels), prompts)


def hpsv2_inversion(margins: FloatArray, labels: FloatArray, *, prompts: NDArray[Any]) -> Outcome:
    """Mean over prompts of 1 - discordant pairs / all pairs; true ties are right, predicted ties go to the first side.

    The original sorts the pictures by score and compares places, so that equal scores take the order of the sort. Here
    they take the order of the sides, which is that of a hash of prompt and picture (A has the smaller): one order of
    all pictures of a ranking, which says nothing about them, so that nothing can be gained from that of the file.
    `hpsv2_inversion_listed` keeps the original's order of the file.

    Notes
    -----
    ``inversion_score`` on ``argsort`` in ``training/train.py`` and ``evaluation.py`` of tgxs002/HPSv2. Parameters and
    errors as in `strict`, and ``prompts`` (n,): the ranking that each pair belongs to.

    Examples
    --------
    Discordant, a true tie, and a predicted tie whose preferred side stands first:

    >>> outcome = hpsv2_inversion(np.array([-1, 1, 0.0]), np.array([1, 0.5, 1]), prompts=np.array(["x", "x", "x"]))
    >>> outcome.correct
    array([0., 1., 1.])
    >>> round(outcome.accuracy, 3)
    0.667
    """
    return _inversion(margins, labels, prompts, first=np.ones(np.shape(margins), dtype=bool))


def hpsv2_inversion_listed(
    margins: FloatArray, labels: FloatArray, *, prompts: NDArray[Any], listed_first: NDArray[np.bool_]
) -> Outcome:
    """Like `hpsv2_inversion`, but in predicted ties the side that the file lists first wins, as in the original.

    A constant scorer thus gets what the order of the file is worth (63.3 % on ImageReward's test file).

    Notes
    -----
    As `hpsv2_inversion`, and ``listed_first`` (n,): whether the first side stood first in the file.

    Examples
    --------
    >>> where = {"prompts": np.array(["x", "x"]), "listed_first": np.array([True, False])}
    >>> hpsv2_inversion_listed(np.zeros(2), np.ones(2), **where).correct
    array([1., 0.])
    """
    return _inversion(margins, labels, prompts, first=np.asarray(listed_first, dtype=bool))


def mps_inversion(margins: FloatArray, labels: FloatArray, *, prompts: NDArray[Any]) -> Outcome:
    """Mean over prompts of 1 - discordant pairs / all pairs; true ties and predicted ties are right.

    A constant scorer gets 100 %.

    Notes
    -----
    ``inversion_score`` in ``eval_overall_mps_on_hpdv2.py`` of Kwai-Kolors/MPS, which compares the scores themselves.
    Parameters and errors as in `strict`, and ``prompts`` (n,): the ranking that each pair belongs to.

    Examples
    --------
    Discordant, a true tie, and a predicted tie:

    >>> mps_inversion(np.array([-1, 1, 0.0]), np.array([1, 0.5, 0]), prompts=np.array(["x", "x", "x"])).correct
    array([0., 1., 1.])
    """
    right, tied = _agreement(margins, labels)
    equal = np.asarray(margins) == 0
    return _by_prompt(_outcome(np.where(tied | equal, 1.0, right), tied, equal), prompts)


def pickscore(margins: FloatArray, labels: FloatArray, *, threshold: float) -> Outcome:
    """Mean over pairs; "tie" is an answer: one point where pair and head agree, half if only one of them says tie.

    With p the softmax of the two scores, a tie is predicted where abs(p1 - p0) = tanh(abs(margin) / 2) is at most the
    threshold, which is tuned on validation pairs, for each head, by `tune_threshold`. Scores of other scales than a
    head's (a cosine similarity without its logit scale) leave no useful threshold on the grid.

    Notes
    -----
    ``get_pred`` and ``calc_score`` in ``eval_preference_predictor.py`` of yuvalkirstain/PickScore. Parameters and
    errors as in `strict`, and ``threshold``: from 0 (equal scores only) to 1 (every pair).

    Examples
    --------
    A true tie that is told as one, a true tie that is not, a decided pair that is called a tie, right, wrong:

    >>> margins, labels = np.array([0.1, 2.0, 0.1, 2.0, -2.0]), np.array([0.5, 0.5, 1.0, 1.0, 1.0])
    >>> outcome = pickscore(margins, labels, threshold=0.1)
    >>> outcome.correct
    array([1. , 0.5, 0.5, 1. , 0. ])
    >>> outcome.accuracy, outcome.predicted_ties
    (0.6, 2)
    """
    right, tied = _agreement(margins, labels)
    if not 0 <= threshold <= 1:
        message = f"threshold is {threshold}; it must lie in 0 to 1"
        raise ValueError(message)
    said = np.tanh(np.abs(np.asarray(margins, dtype=np.float64)) / 2) <= threshold
    return _outcome(np.where(tied & said, 1.0, np.where(tied | said, 0.5, right)), tied, said)


def tune_threshold(margins: FloatArray, labels: FloatArray) -> float:
    """Choose the threshold of `pickscore` with the best accuracy on these pairs (n,), out of `THRESHOLDS`.

    Of equally good ones the smallest is taken, as in the original. Without true ties among the pairs it is nearly
    always 0.

    Raises
    ------
    ValueError
        As in `strict`, and if there is no pair.

    Examples
    --------
    >>> tune_threshold(np.array([0.1, 2.0]), np.array([0.5, 1.0]))
    0.1
    """
    if not np.size(margins):
        message = "there is no pair to tune the threshold on; it needs validation pairs"
        raise ValueError(message)
    found = [pickscore(margins, labels, threshold=threshold).accuracy for threshold in THRESHOLDS]
    return THRESHOLDS[int(np.argmax(found))]


@dataclass(frozen=True)
class Protocol:
    """A definition by its name, called the same way whatever it needs to know.

    Attributes
    ----------
    name
        As configurations, results and reports have it.
    function
        The definition; its documentation names the source.
    needs
        Which of ``prompts``, ``threshold`` and ``listed_first`` it looks at.
    """

    name: str
    function: Callable[..., Outcome]
    needs: tuple[str, ...] = ()

    @property
    def skips_ties(self) -> bool:
        """Whether true ties are not scored and predicted ones wrong; else the definition says what they count."""
        return self.name in ("strict", "imagereward", "hpsv2-imagereward")

    @property
    def rule(self) -> str:
        """The definition in a sentence."""
        return " ".join((self.function.__doc__ or "").partition("\n\n")[0].split())

    def __call__(
        self,
        margins: FloatArray,
        labels: FloatArray,
        *,
        prompts: NDArray[Any] | None = None,
        threshold: float | None = None,
        listed_first: NDArray[np.bool_] | None = None,
    ) -> Outcome:
        """Score pairs (n,); what the definition does not look at is ignored.

        Parameters
        ----------
        margins, labels
            As in `strict`.
        prompts
            (n,) ranking, or prompt, of each pair.
        threshold
            Of `pickscore`.
        listed_first
            (n,) whether the first side stood first in the preference file.

        Raises
        ------
        ValueError
            As in `strict`, and if something that the definition looks at is not given.
        """
        known = {"prompts": prompts, "threshold": threshold, "listed_first": listed_first}
        for name in self.needs:
            if known[name] is None:
                message = f"protocol {self.name!r} needs {name}"
                raise ValueError(message)
        return self.function(margins, labels, **{name: known[name] for name in self.needs})


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("strict", strict),
        Protocol("imagereward", imagereward),
        Protocol("hpsv2-inversion", hpsv2_inversion, ("prompts",)),
        Protocol("hpsv2-inversion-listed", hpsv2_inversion_listed, ("prompts", "listed_first")),
        Protocol("mps-inversion", mps_inversion, ("prompts",)),
        Protocol("hpsv2-imagereward", hpsv2_imagereward, ("prompts",)),
        Protocol("pickscore", pickscore, ("threshold",)),
    )
}


@dataclass(frozen=True)
class Expectations:
    """What scorers that know nothing get on given pairs under a protocol.

    Attributes
    ----------
    random
        Expected accuracy of independent continuous scores.
    constant
        Accuracy of the same score for every picture.
    first_listed
        Accuracy of preferring what the file lists first; NaN where that is not known.
    """

    random: float
    constant: float
    first_listed: float

    @property
    def floor(self) -> float:
        """The largest of the three: below it a number shows nothing."""
        return float(np.nanmax([self.random, self.constant, self.first_listed]))

    def __str__(self) -> str:
        told = {"random": self.random, "constant": self.constant, "first listed": self.first_listed}
        known = [f"{name} {100 * value:.1f} %" for name, value in told.items() if not np.isnan(value)]
        return f"{', '.join(known)}; the floor is {100 * self.floor:.1f} %"


def expectations(
    protocol: str,
    labels: FloatArray,
    *,
    prompts: NDArray[Any] | None = None,
    listed_first: NDArray[np.bool_] | None = None,
) -> Expectations:
    """Accuracy of a random, a constant and a first-listed scorer on these pairs; exact, nothing is drawn.

    Independent continuous scores put either side first with probability 1/2 and are never equal, and an accuracy is a
    fixed weighted mean over pairs: its expectation is the mean of the accuracies of "first side" and of "second side"
    everywhere. By an inversion protocol this is 1/2 + 1/2 the share of true ties (mean over prompts).

    Under `pickscore` the constant scorer says "tie" everywhere, which gives 1/2 + 1/2 the share of true ties, and the
    other two never do.

    Parameters
    ----------
    protocol
        Name of a protocol.
    labels, prompts, listed_first
        As in `Protocol`; without ``listed_first``, ``first_listed`` is NaN.

    Raises
    ------
    ValueError
        As the protocol's, and if no pair is scored.

    Examples
    --------
    One of ten pairs is a true tie:

    >>> labels, prompts = np.array([1, 0, 1, 0, 1, 0, 1, 0, 1, 0.5]), np.repeat("x", 10)
    >>> found = expectations("hpsv2-inversion", labels, prompts=prompts)
    >>> round(found.random, 3), round(expectations("imagereward", labels).random, 3)
    (0.55, 0.5)
    >>> expectations("mps-inversion", labels, prompts=prompts).floor
    1.0
    """
    labels = np.asarray(labels, dtype=np.float64)
    sides = np.ones(len(labels))
    scorers = [sides, -sides, 0 * sides, *([] if listed_first is None else [np.where(listed_first, 1.0, -1.0)])]
    judged = [
        PROTOCOLS[protocol](margins, labels, prompts=prompts, threshold=0.0, listed_first=listed_first)
        for margins in scorers
    ]
    if not all(outcome.n_pairs for outcome in judged):
        message = f"none of the {len(labels)} pairs is scored; an expectation needs at least one"
        raise ValueError(message)
    first, second, constant, *listed = (outcome.accuracy for outcome in judged)
    return Expectations((first + second) / 2, constant, listed[0] if listed else float("nan"))


def _agreement(margins: FloatArray, labels: FloatArray) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Whether margins have the sign of the preference (n,), and which pairs are true ties (n,)."""
    margins, labels = np.asarray(margins), np.asarray(labels)
    if margins.shape != labels.shape or margins.ndim != 1:
        message = f"margins have shape {margins.shape} and labels {labels.shape}; both must be (pairs,)"
        raise ValueError(message)
    if not np.isfinite(margins).all():
        message = f"margin of pair {int(np.argmin(np.isfinite(margins)))} is not finite; a head must score every pair"
        raise ValueError(message)
    valid = (labels >= 0) & (labels <= 1)
    if not valid.all():
        message = f"label of pair {int(np.argmin(valid))} is {labels[~valid][0]}; it must lie in 0 to 1"
        raise ValueError(message)
    return (np.sign(margins) == np.sign(labels - 0.5)).astype(np.float64), labels == 0.5


def _inversion(margins: FloatArray, labels: FloatArray, prompts: NDArray[Any], *, first: NDArray[np.bool_]) -> Outcome:
    equal = np.asarray(margins) == 0
    if first.shape != equal.shape:
        message = f"listed_first has shape {first.shape} and margins {equal.shape}; both must be (pairs,)"
        raise ValueError(message)
    right, tied = _agreement(np.where(equal, np.where(first, 1.0, -1.0), margins), labels)
    return _by_prompt(_outcome(np.where(tied, 1.0, right), tied, equal), prompts)


def _outcome(correct: FloatArray, tied: NDArray[np.bool_], said: NDArray[np.bool_]) -> Outcome:
    scored = ~np.isnan(correct)
    return Outcome(
        correct=correct,
        weight=scored.astype(np.float64),
        n_pairs=int(scored.sum()),
        true_ties=int(tied.sum()),
        predicted_ties=int((scored & said).sum()),
    )


def _by_prompt(outcome: Outcome, prompts: NDArray[Any]) -> Outcome:
    weight = prompt_weights(outcome.correct, prompts)
    return Outcome(outcome.correct, weight, outcome.n_pairs, outcome.true_ties, outcome.predicted_ties)
