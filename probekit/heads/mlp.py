"""MLP Bradley-Terry head: one small network scores every row; a pair's margin is the difference of its two scores."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from probekit._types import FloatArray, IntArray
from probekit.errors import HeadError
from probekit.heads import solvers
from probekit.heads.base import PairHead, checked_groups, checked_pairs, checked_rows, checked_targets, row_groups
from probekit.heads.linear import BradleyTerryClassifierCV, with_floor


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
        Most passes over the training pairs.
    patience
        Passes without a lower validation loss after which training stops.
    validation_fraction
        Share of the pairs, in whole groups, that decides when to stop.
    linear_skip
        Add the exact linear head, fitted on the same training pairs, to the network, whose last layer then starts at
        zero.
    seed
        Of the initial values, the held-out groups, the order of pairs and the dropout. The global generators stay as
        they are.
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

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (1024, 16),
        dropout: float = 0.05,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        max_epochs: int = 50,
        batch_size: int = 128,
        patience: int = 5,
        validation_fraction: float = 0.15,
        linear_skip: bool = False,
        seed: int = 0,
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
        self.linear_skip = linear_skip
        self.seed = seed
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
        X = checked_rows(X)
        pairs = checked_pairs(pairs, len(X))
        used, local = np.unique(pairs, return_inverse=True)
        local = local.reshape(-1, 2)
        rows = X[used].astype(np.float64)
        _, label, weight = checked_targets(rows[local[:, 0]] - rows[local[:, 1]], label, sample_weight)
        groups = row_groups(pairs) if groups is None else checked_groups(groups, len(pairs))
        held_out = self._held_out(groups)
        if not (weight[held_out].any() and weight[~held_out].any()):
            message = "the pairs for training or for early stopping all have weight 0; give both some weight"
            raise HeadError(message)

        fitted = rows[np.unique(local[~held_out])]
        # rounding of the mean gives constant channels a tiny deviation
        spread = np.where((fitted != fitted[0]).any(axis=0), fitted.std(axis=0), 0.0)
        if not spread.any():
            message = f"none of the {X.shape[1]} channels varies over the rows; there is nothing to fit"
            raise HeadError(message)
        scale = with_floor(spread)
        self._mean = fitted.mean(axis=0)
        # A dropped channel is multiplied by zero, so that it reaches the network as a constant.
        self._gain = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
        self._linear = None
        skip = None
        if self.linear_skip:
            train = ~held_out
            linear = BradleyTerryClassifierCV()
            linear.fit(X, pairs[train], label[train], weight[train], groups[train])
            self._linear = linear
            skip = torch.from_numpy(linear.score_items(rows)).float().to(self.device)

        def batch(chosen: NDArray[np.bool_]) -> solvers.PairBatch:
            return solvers.PairBatch(
                torch.from_numpy(local[chosen]).to(self.device),
                torch.from_numpy(label[chosen]).float().to(self.device),
                torch.from_numpy(weight[chosen] / weight[chosen].mean()).float().to(self.device),
            )

        settings = solvers.MLPSettings(
            hidden=self.hidden,
            dropout=self.dropout,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_epochs=self.max_epochs,
            batch_size=self.batch_size,
            patience=self.patience,
            seed=self.seed,
        )
        with solvers.one_thread():
            result = solvers.train_mlp(
                self._standardised(rows).to(self.device), skip, batch(~held_out), batch(held_out), settings
            )
        self._layers = [(weight.cpu(), bias.cpu()) for weight, bias in result.layers]
        self.epochs_ = result.epochs
        self.best_epoch_ = result.best_epoch
        self.best_validation_loss_ = result.best_validation_loss
        self.converged_ = result.stopped
        self.n_dropped_ = int((scale == 0).sum())
        self.n_parameters_ = sum(weight.numel() + bias.numel() for weight, bias in self._layers)
        if self._linear is not None:
            self.n_parameters_ += self._linear.n_parameters_
        self.n_features_in_ = X.shape[1]
        return self

    def _held_out(self, groups: NDArray[Any]) -> NDArray[np.bool_]:
        """Mask (n,) of the pairs for early stopping: whole groups in seeded order until the fraction is reached."""
        names, members = np.unique(groups, return_inverse=True)
        if len(names) < 2:
            message = f"all {len(groups)} pairs are in one group; early stopping needs at least two groups"
            raise HeadError(message)
        order = np.random.default_rng(self.seed).permutation(len(names))
        reached = np.cumsum(np.bincount(members)[order]) >= self.validation_fraction * len(groups)
        chosen = order[: min(int(np.argmax(reached)) + 1, len(names) - 1)]
        return np.isin(members, chosen)

    def _standardised(self, rows: FloatArray) -> torch.Tensor:
        """Rows (m, d) float32; the offsets of massive channels are taken away in float64."""
        return torch.from_numpy((rows - self._mean) * self._gain).float()

    @torch.no_grad()
    def _score(self, X: FloatArray) -> FloatArray:
        with solvers.one_thread():
            # Scores in float64, as margins are small differences of scores; in chunks, as hidden layers are wide.
            layers = [(weight.double(), bias.double()) for weight, bias in self._layers]
            chunks = (X[start : start + 4096].astype(np.float64) for start in range(0, len(X), 4096))
            scores = [solvers.mlp_scores(layers, self._standardised(chunk).double()).numpy() for chunk in chunks]
        total = np.concatenate(scores) if scores else np.zeros(0)
        return total if self._linear is None else total + self._linear.score_items(X)
