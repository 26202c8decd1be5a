"""MLP Bradley-Terry head: one small network scores every row; a pair's margin is the difference of its two scores."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from probekit._types import FloatArray, IntArray
from probekit.errors import HeadError
from probekit.heads import solvers, training
from probekit.heads.base import (
    PairHead,
    checked_groups,
    checked_noise,
    checked_pairs,
    checked_rows,
    checked_targets,
    differences,
    row_groups,
)
from probekit.heads.factorisation import channel_scale
from probekit.heads.linear import BradleyTerryClassifierCV

_BLOCK = 512  # rows that are standardised at a time, in float64


class BradleyTerryMLP(PairHead):
    """Bradley-Terry head with hidden layers; by default the shape of DiT-Reward's head.

    Rows are standardised by mean and standard deviation of the rows it is trained on. A share of the groups is held out
    for early stopping, and the parameters of the best epoch are kept.

    Parameters
    ----------
    hidden
        Widths of the hidden layers, with ReLU after each.
    dropout
        Probability of dropping a hidden unit in training.
    learning_rate, weight_decay, batch_size
        Of AdamW; ``batch_size`` counts pairs.
    max_epochs
        Most passes over the training pairs: early stopping ends ordinary heads long before (after 15 to 80 of 1,400
        pairs, the smaller the head the later).
    patience
        Passes without a lower validation loss after which training stops.
    validation_fraction
        Share of the pairs, in whole groups, that decides when to stop.
    quantisation
        As in `BradleyTerryClassifier`: channels of rows that vary by less than three times what rounding adds to a row
        are dropped.
    linear_skip
        Add the exact linear head, fitted on the same training pairs, to the network, whose last layer then starts at
        zero.
    seed
        Of the initial values and the dropout. The global generators stay as they are.
    split_seed
        Of the held-out groups and the order of pairs, which are the same for heads of every ``seed``: that lets
        `fit_together` train them at once.
    device
        Where to train, such as ``cpu`` or ``cuda``; the fitted head lives on the CPU.

    Attributes
    ----------
    n_parameters_ : int
        Of the network, and of the linear head where there is one.
    epochs_, best_epoch_ : int
        Passes made, and the one whose parameters were kept (0: the start).
    best_validation_loss_ : float
    converged_ : bool
        Whether training stopped before ``max_epochs``.
    n_dropped_ : int
        Channels without enough variation.
    n_features_in_ : int
    n_less_than_d_ : bool
        Whether there were fewer pairs than channels that vary.
    matrix_free_ : bool
        Of the linear head, where there is one.

    References
    ----------
    I. Loshchilov and F. Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """

    n_parameters_: int
    epochs_: int
    best_epoch_: int
    best_validation_loss_: float
    converged_: bool
    n_dropped_: int
    n_less_than_d_: bool
    matrix_free_: bool

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (1024, 16),
        dropout: float = 0.05,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        max_epochs: int = 200,
        batch_size: int = 128,
        patience: int = 5,
        validation_fraction: float = 0.15,
        quantisation: float | FloatArray = 0.0,
        linear_skip: bool = False,
        seed: int = 0,
        split_seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.hidden = hidden
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.quantisation = quantisation
        self.linear_skip = linear_skip
        self.seed = seed
        self.split_seed = split_seed
        self.device = device

    def fit(
        self,
        X: FloatArray,
        pairs: IntArray,
        label: FloatArray,
        sample_weight: FloatArray | None = None,
        groups: NDArray[Any] | None = None,
    ) -> Self:
        """Fit on pairs of rows.

        Parameters
        ----------
        X
            (m, d) features.
        pairs
            (n, 2) row numbers of the first and the second.
        label
            (n,) probability that the first is preferred: 1, 0, or a vote share; 0.5 is a tie.
        sample_weight
            (n,) weights of pairs.
        groups
            (n,) labels; pairs of one group are never split between training and early stopping. Without them, pairs
            that are linked through shared rows form a group.

        Raises
        ------
        HeadError
            If shapes do not agree, a value is out of range or not finite, no channel varies, all pairs are tied, or
            there is only one group.
        """
        fit_together([self], X, pairs, label, sample_weight, groups)
        return self

    def _held_out(self, groups: NDArray[Any]) -> NDArray[np.bool_]:
        """Mask (n,) of the pairs for early stopping: whole groups in seeded order until the fraction is reached."""
        names, members = np.unique(groups, return_inverse=True)
        if len(names) < 2:
            message = f"all {len(groups)} pairs are in one group; early stopping needs at least two groups"
            raise HeadError(message)
        order = np.random.default_rng(self.split_seed).permutation(len(names))
        reached = np.cumsum(np.bincount(members)[order]) >= self.validation_fraction * len(groups)
        chosen = order[: min(int(np.argmax(reached)) + 1, len(names) - 1)]
        return np.isin(members, chosen)

    def _keep(
        self,
        result: training.MLPFit,
        n: int,
        mean: FloatArray,
        gain: FloatArray,
        linear: BradleyTerryClassifierCV | None,
    ) -> None:
        """Store a network trained on n pairs, how rows are standardised for it, and the linear head beside it."""
        self._mean, self._gain, self._linear = mean, gain, linear
        self._layers = [(weight.cpu(), bias.cpu()) for weight, bias in result.layers]
        self.epochs_ = result.epochs
        self.best_epoch_ = result.best_epoch
        self.best_validation_loss_ = result.best_validation_loss
        self.converged_ = result.stopped
        self.n_dropped_ = int((gain == 0).sum())
        self.n_parameters_ = sum(weight.numel() + bias.numel() for weight, bias in self._layers)
        if linear is not None:
            self.n_parameters_ += linear.n_parameters_
        self.n_features_in_ = len(mean)
        self.n_less_than_d_ = n < self.n_features_in_ - self.n_dropped_
        self.matrix_free_ = linear is not None and linear.matrix_free_

    def _standardised(self, rows: FloatArray) -> torch.Tensor:
        """Rows (m, d) float32; the offsets of massive channels are taken away in float64."""
        return torch.from_numpy((rows - self._mean) * self._gain).float()

    @torch.no_grad()
    def _score(self, X: FloatArray) -> FloatArray:
        with solvers.one_thread():
            # Scores in float64, as margins are small differences of scores; in chunks, as hidden layers are wide.
            layers = [(weight.double(), bias.double()) for weight, bias in self._layers]
            chunks = (X[start : start + 4096].astype(np.float64) for start in range(0, len(X), 4096))
            scores = [training.mlp_scores(layers, self._standardised(chunk).double()).numpy() for chunk in chunks]
        total = np.concatenate(scores) if scores else np.zeros(0)
        return total if self._linear is None else total + self._linear.score_items(X)


def fit_together(
    heads: Sequence[BradleyTerryMLP],
    X: FloatArray,
    pairs: IntArray,
    label: FloatArray,
    sample_weight: FloatArray | None = None,
    groups: NDArray[Any] | None = None,
) -> None:
    """Fit several heads on the same pairs at once, each as `BradleyTerryMLP.fit` would fit it, up to rounding.

    The first layers of all heads run as one matrix product, which takes a fraction of the time of one head after
    another where the heads are small.

    Parameters
    ----------
    heads
        At least one; they may differ in ``hidden`` and ``seed`` only.
    X, pairs, label, sample_weight, groups
        As in `BradleyTerryMLP.fit`.

    Raises
    ------
    HeadError
        As `BradleyTerryMLP.fit`; also if the heads differ in another parameter, or one has no hidden layer.
    """
    first = heads[0]
    for head in heads:
        if not head.hidden:
            message = "hidden is empty; an MLP head needs at least one width"
            raise HeadError(message)
        for name, value in head.get_params().items():
            if name not in ("hidden", "seed") and not np.array_equal(value, getattr(first, name)):
                message = f"{name} is {getattr(first, name)!r} and {value!r}; heads fitted together share it"
                raise HeadError(message)
    X = checked_rows(X)
    pairs = checked_pairs(pairs, len(X))
    D, label, weight = checked_targets(differences(X, pairs), label, sample_weight)
    groups = row_groups(pairs) if groups is None else checked_groups(groups, len(pairs))
    held_out = first._held_out(groups)
    train = ~held_out
    if not (weight[held_out].any() and weight[train].any()):
        message = "the pairs for training or for early stopping all have weight 0; give both some weight"
        raise HeadError(message)

    used, local = np.unique(pairs, return_inverse=True)
    local = local.reshape(-1, 2)
    raw = X[used]
    trained = np.isin(np.arange(len(used)), local[train])
    varies = (raw[trained] != raw[local[train][0, 0]]).any(axis=0)
    if not varies.any():
        message = f"none of the {X.shape[1]} channels varies over the rows; there is nothing to fit"
        raise HeadError(message)
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(raw), _BLOCK)]
    share = trained / trained.sum()
    mean = np.sum([share[block] @ raw[block].astype(np.float64) for block in blocks], axis=0)
    squares = np.sum([share[block] @ np.square(raw[block] - mean) for block in blocks], axis=0)
    variance = np.where(varies, squares, 0.0)  # rounding of the mean gives constant channels a tiny deviation
    noise = checked_noise(first.quantisation, X.shape[1]) / np.sqrt(2)  # a difference has the errors of two rows
    scale = channel_scale(torch.from_numpy(variance), torch.from_numpy(noise), standardize=True).numpy()
    # A dropped channel is multiplied by zero, so that it reaches the network as a constant.
    gain = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    rows = np.empty(raw.shape, dtype=np.float32)
    for block in blocks:
        rows[block] = (raw[block] - mean) * gain
    device = first.device
    linear = skip = None
    if first.linear_skip:
        linear = BradleyTerryClassifierCV(quantisation=first.quantisation, device=device)
        linear.fit_differences(D[train], label[train], weight[train], groups[train])
        skip = torch.from_numpy(linear.score_items(raw)).float().to(device)

    def batch(chosen: NDArray[np.bool_]) -> training.PairBatch:
        return training.PairBatch(
            torch.from_numpy(local[chosen]).to(device),
            torch.from_numpy(label[chosen]).float().to(device),
            torch.from_numpy(weight[chosen] / weight[chosen].mean()).float().to(device),
        )

    how = training.Schedule(**{name: getattr(first, name) for name in training.Schedule.__dataclass_fields__})
    shapes = [training.Shape(tuple(head.hidden), head.seed) for head in heads]
    standardised = torch.from_numpy(rows).to(device)
    with solvers.one_thread():
        results = training.train_mlps(standardised, skip, batch(train), batch(held_out), shapes, how)
    for head, result in zip(heads, results, strict=True):
        head._keep(result, int(train.sum()), mean, gain, linear)
