"""Columns of the tables of a run, and what their values may be."""

from typing import Any

import numpy as np
import pandas as pd

RESULTS_VERSION = "1.5"
ALL_SOURCES = "all"
UNPROBED = ("metadata", "inputs", "external")
"""Kinds of heads that see no features: of metadata, of what enters a backbone, and scores from elsewhere."""
JOINED = "+"  # between the layers of a set, and between noise levels or poolings that one head reads side by side
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
FILLED_IN = ("family_tested", "sigma_ratio", "pooling_layers", "imported")
PART_COLUMNS = {name: dtype for name, dtype in RESULT_COLUMNS.items() if name not in FILLED_IN}

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


def set_label(layer_set: str, combination: str) -> str:
    """Layers of a set and, where they are not simply side by side, the rule that makes one score of them."""
    return layer_set if combination in ("single", "concat") else f"{layer_set} ({combination})"


def as_they_are(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of fits on training pairs and features as they are: neither refits nor altered features."""
    return frame[frame["altered"] == ""]
