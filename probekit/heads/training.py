"""Training of MLP heads, several at once on the same rows.

All heads see the same pairs in the same order, so their first layers are one matrix product with the rows, which is
where the time goes: K heads of width h make a (K h, d) matrix. Later layers are small and run head by head; where
every head has one hidden layer, outputs are one product too. AdamW works entry by entry, so heads do not influence each
other. Each keeps the parameters of its best epoch, and leaves the matrix when it stops.

K = heads, H = sum of their first widths, m = rows of a batch, two to a pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]
"""Weight (out, in) and bias (out,) of each layer; the last bias is empty, as it would cancel in every margin."""
_VALIDATED_AT_ONCE = 4096  # pairs


def bradley_terry_loss(margins: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Weighted log-loss (n, ...) of margins (n, ...): -log P of the preferred side, a soft label counting both ways."""
    return weight * (torch.nn.functional.softplus(margins) - label * margins)


@dataclass(frozen=True)
class PairBatch:
    """Pairs to train or validate on.

    Attributes
    ----------
    pairs
        (n, 2) row numbers of the first and the second.
    label
        (n,) P(first preferred).
    weight
        (n,) of mean 1.
    """

    pairs: Tensor
    label: Tensor
    weight: Tensor


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How heads are trained together; the fields are `probekit.heads.BradleyTerryMLP`'s."""

    dropout: float
    learning_rate: float
    weight_decay: float
    max_epochs: int
    batch_size: int
    patience: int
    split_seed: int


@dataclass(frozen=True)
class Shape:
    """Widths of a head's hidden layers, and the seed of its initial values and its dropout."""

    hidden: tuple[int, ...]
    seed: int


@dataclass
class MLPFit:
    """A head in training or trained: the parameters of its best epoch, and how the training went."""

    layers: Layers
    best_validation_loss: float
    best_epoch: int = 0
    epochs: int = 0
    stopped: bool = False


def mlp_scores(layers: Layers, rows: Tensor) -> Tensor:
    """Scores (m,) of rows (m, d): linear layers with ReLU between them."""
    h = rows
    for weight, bias in layers[:-1]:
        h = torch.nn.functional.linear(h, weight, bias).relu()
    return (h @ layers[-1][0].T)[:, 0]


class _AdamW:
    """AdamW with PyTorch's defaults, as one call of its fused kernel: for small heads the calls around it cost more."""

    def __init__(self, parameters: Sequence[Tensor], how: Schedule) -> None:
        self.how = how
        self.state = {x: (torch.zeros_like(x), torch.zeros_like(x), x.new_zeros(())) for x in parameters}

    def step(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Change the parameters in place."""
        means, squares, steps = (list(part) for part in zip(*(self.state[x] for x in parameters), strict=True))
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            [x.detach() for x in parameters],
            list(gradients),
            means,
            squares,
            [],
            steps,
            lr=self.how.learning_rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=self.how.weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


class _Together:
    """Heads whose first layers are one matrix (H, d).

    Attributes
    ----------
    wide
        First weights (H, d), first biases (H,) and, where all heads have one hidden layer, output weights (H,).
    later
        Further layers of each head.
    of_head
        (H, K): 1 where a first unit belongs to a head, else 0.
    """

    def __init__(self, heads: Sequence[Layers], generators: Sequence[torch.Generator], dropout: float) -> None:
        self.widths = [len(layers[0][1]) for layers in heads]
        self.shallow = all(len(layers) == 2 for layers in heads)
        first = list(zip(*(layers[0] for layers in heads), strict=True))
        self.wide = [torch.cat(parts) for parts in first]
        if self.shallow:
            self.wide.append(torch.cat([layers[1][0][0] for layers in heads]))
        self.later = [
            [] if self.shallow else [tuple(x.clone() for x in pair) for pair in layers[1:]] for layers in heads
        ]
        self.generators = list(generators)
        self.dropout = dropout
        self.of_head = self._units()
        for parameter in self.parameters():
            parameter.requires_grad_()

    def _units(self) -> Tensor:
        """Which first units (H, K) belong to which head."""
        owner = torch.arange(len(self.widths)).repeat_interleave(torch.tensor(self.widths))
        return (owner[:, None] == torch.arange(len(self.widths))).to(self.wide[0])

    def parameters(self) -> list[Tensor]:
        return [*self.wide, *(x for layers in self.later for pair in layers for x in pair if x.numel())]

    def scores(self, rows: Tensor, *, training: bool) -> Tensor:
        """Scores (m, K) of rows (m, d)."""
        h = torch.nn.functional.linear(rows, self.wide[0], self.wide[1]).relu()
        if training and self.dropout:
            h = h * self._kept(len(h), self.widths, self.generators)
        if self.shallow:
            return h @ (self.wide[2][:, None] * self.of_head)
        scores = []
        for k, (part, layers) in enumerate(zip(torch.split(h, self.widths, dim=1), self.later, strict=True)):
            for weight, bias in layers[:-1]:
                part = torch.nn.functional.linear(part, weight, bias).relu()
                if training and self.dropout:
                    part = part * self._kept(len(part), [len(bias)], self.generators[k : k + 1])
            scores.append(part @ layers[-1][0].T)
        return torch.cat(scores, dim=1)

    def _kept(self, m: int, widths: list[int], generators: Sequence[torch.Generator]) -> Tensor:
        """Dropout mask (m, sum of widths), each head's part by its own generator, divided by the share kept."""
        mask = torch.empty(sum(widths), m, device=self.wide[0].device)
        for part, generator in zip(torch.split(mask, widths), generators, strict=True):
            part.uniform_(generator=generator)  # quicker than bernoulli_
        return mask.ge_(self.dropout).div_(1 - self.dropout).T

    def layers(self, k: int) -> Layers:
        """Copy of the layers of head k."""
        weight, bias, *out = (torch.split(wide.detach(), self.widths)[k].clone() for wide in self.wide)
        later = [(weight.detach().clone(), bias.detach().clone()) for weight, bias in self.later[k]]
        return [(weight, bias), *([(out[0][None], torch.empty(0))] if self.shallow else later)]

    def keep(self, heads: list[int], optimiser: _AdamW) -> None:
        """Let all but some heads leave, and their moments with them."""
        chosen = self.of_head[:, heads].any(dim=1)
        for place, old in enumerate(self.wide):
            new = old.detach()[chosen].requires_grad_()
            mean, square, step = optimiser.state.pop(old)
            optimiser.state[new] = mean[chosen], square[chosen], step
            self.wide[place] = new
        self.widths = [self.widths[k] for k in heads]
        self.of_head = self._units()
        self.later = [self.later[k] for k in heads]
        self.generators = [self.generators[k] for k in heads]


def train_mlps(
    rows: Tensor, skip: Tensor | None, train: PairBatch, validation: PairBatch, shapes: Sequence[Shape], how: Schedule
) -> list[MLPFit]:
    """Train each head with AdamW until its validation loss has not improved for ``patience`` epochs.

    Parameters
    ----------
    rows
        (m, d) float32, standardised.
    skip
        (m,) scores of a linear head that are added to the MLP's, whose last layer then starts at zero; or None.
    train, validation
        Pairs of the rows; no group lies in both.
    shapes
        The heads.
    how
        Optimiser and order. All randomness comes from generators of the seeds given.
    """
    # Initial values and the order of pairs come from the CPU, so they are the same on every device.
    order = torch.Generator().manual_seed(how.split_seed)
    noise = [torch.Generator(rows.device).manual_seed(shape.seed) for shape in shapes]
    starts = [_initial_layers(rows.shape[1], shape, zero_last=skip is not None) for shape in shapes]
    heads = _Together(
        [[(w.to(rows.device), b.to(rows.device)) for w, b in layers] for layers in starts], noise, how.dropout
    )
    optimiser = _AdamW(heads.parameters(), how)
    fits = [MLPFit(heads.layers(k), loss) for k, loss in enumerate(_mean_losses(heads, rows, skip, validation))]
    running = fits
    for epoch in range(1, how.max_epochs + 1):
        for chosen in torch.split(torch.randperm(len(train.label), generator=order), how.batch_size):
            at = chosen.to(rows.device)
            loss = _losses(heads, rows, skip, train, at, training=True).mean(dim=0).sum()
            parameters = heads.parameters()
            optimiser.step(parameters, torch.autograd.grad([loss], parameters))
        for k, (fit, loss_now) in enumerate(zip(running, _mean_losses(heads, rows, skip, validation), strict=True)):
            fit.epochs = epoch
            if loss_now < fit.best_validation_loss:
                fit.best_validation_loss, fit.best_epoch, fit.layers = loss_now, epoch, heads.layers(k)
            fit.stopped = epoch - fit.best_epoch >= how.patience
        stay = [k for k, fit in enumerate(running) if not fit.stopped]
        if not stay:
            break
        if len(stay) < len(running):
            heads.keep(stay, optimiser)
            running = [running[k] for k in stay]
    return fits


def _initial_layers(d: int, shape: Shape, *, zero_last: bool) -> Layers:
    """PyTorch's default for linear layers, uniform within 1 / sqrt(inputs), drawn from the head's seed."""
    generator = torch.Generator().manual_seed(shape.seed)
    layers = []
    for inputs, outputs in zip([d, *shape.hidden], [*shape.hidden, 1], strict=True):
        bound = inputs**-0.5
        weight = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
        layers.append((weight, torch.empty(outputs).uniform_(-bound, bound, generator=generator)))
    last = layers[-1][0]
    layers[-1] = (torch.zeros_like(last) if zero_last else last, torch.empty(0))
    return layers


def _losses(
    heads: _Together, rows: Tensor, skip: Tensor | None, batch: PairBatch, at: Tensor, *, training: bool
) -> Tensor:
    """Losses (n, K) of the chosen pairs."""
    pairs = batch.pairs[at]
    scores = heads.scores(rows.index_select(0, pairs.reshape(-1)), training=training).reshape(len(at), 2, -1)
    margins = scores[:, 0] - scores[:, 1]
    if skip is not None:
        margins = margins + (skip[pairs[:, 0]] - skip[pairs[:, 1]])[:, None]
    return bradley_terry_loss(margins, batch.label[at][:, None], batch.weight[at][:, None])


@torch.no_grad()
def _mean_losses(heads: _Together, rows: Tensor, skip: Tensor | None, batch: PairBatch) -> list[float]:
    parts = torch.split(torch.arange(len(batch.label), device=rows.device), _VALIDATED_AT_ONCE)
    sums = [_losses(heads, rows, skip, batch, at, training=False).double().sum(dim=0) for at in parts]
    return [float(loss) / len(batch.label) for loss in torch.stack(sums).sum(dim=0)]
