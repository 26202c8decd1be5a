"""What all linear fits on one layer share: channel scales, precision, and one factorisation.

D (n, d) holds differences of feature vectors, first minus second, and Z = D / scale. Z is never formed: w is divided by
the scale before each product with D, which rounds the same.

With Z'Z / n = V T V', the Hessian of a fit is close to V (c T + lam) V' for a number c of its own, so one
decomposition preconditions every fold and strength. T is tridiagonal on the CPU, which divides by c T + lam in no time:
to diagonalise it as well would double the time of a wide layer. Elsewhere T holds the eigenvalues e. The decomposition
does not enter the objective: its rounding errors slow a fit down but do not change what it converges to.

    n >= d:  Gram matrix Z'Z / n = V T V'         fits on Z                        w
    n <  d:  kernel      Z Z'/ n = U e U'         fits on T = U sqrt(n e) (n, r)   w = Z' U a / sqrt(n e), as long as a
    matrix-free (either is larger than the memory given): e = diagonal of Z'Z / n  w

The second is exact too: a ridge solution lies in the span of the rows it was fitted on. Because a kernel is linear in
products, that of concatenated layers is the sum of theirs.

All three also work on differences that stay in files (`probekit.heads.streaming`), which are then read in blocks: once
for the Gram matrix, twice for the kernel (by rows for the scales, by channels for its sum, which leaves T in memory),
once for the diagonal.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg
from scipy.linalg import lapack
from torch import Tensor

from probekit.errors import HeadError
from probekit.heads.streaming import StreamedDifferences

_BLOCK = 512  # rows that are multiplied, or converted to float64, at a time: they stay in the cache
SLAB = 8192  # rows whose products are summed in one precision before they are added up in float64
_PANEL = 256  # channels whose products are not split further
_COPIES = 4  # matrices of the size of the Gram matrix that an eigendecomposition holds at once


def eigen_bytes(size: int) -> int:
    """Bytes that the eigendecomposition of a (size, size) float64 matrix takes."""
    return _COPIES * 8 * size**2


def fit_bytes(n: int, d: int, columns: int) -> int:
    """Bytes of a fit by factorisation of n pairs on d channels, differences aside: an upper limit of measured peaks."""
    matrix = 36 * d**2 + 12 * SLAB * d if n >= d else 26 * n * d + 40 * n**2
    return matrix + 44 * n * columns


@dataclass(frozen=True)
class Differences:
    """Z = rows * gain.

    Attributes
    ----------
    rows
        (n, d) float32 or float64.
    gain
        (d,) float64: 1 / scale of each channel, 0 where a channel is dropped.
    """

    rows: Tensor | StreamedDifferences
    gain: Tensor

    @property
    def streamed(self) -> bool:
        """Whether rows are read from files in each pass."""
        return isinstance(self.rows, StreamedDifferences)

    def margins(self, w: Tensor) -> Tensor:
        """Z w for each of w (columns, d): (columns, n), computed in the precision of w."""
        w, margins = w * self.gain.to(w.dtype), w.new_empty(len(w), self.rows.shape[0])
        for part, block in _in_precision_of(w, self.rows):
            margins[:, part] = _product(w, block.T)
        return margins

    def gradient(self, residual: Tensor) -> Tensor:
        """Z' residual for each of residual (columns, n): (columns, d), computed in the precision of residual."""
        if isinstance(self.rows, Tensor) and residual.dtype == self.rows.dtype:
            total = _product(residual, self.rows)
        else:
            total = residual.new_zeros(len(residual), self.rows.shape[1])
            for part, block in _in_precision_of(residual, self.rows):
                total += _product(residual[:, part], block)
        return total * self.gain.to(residual.dtype)

    def margins_and_gradient(self, w: Tensor, residual: Callable[[Tensor, slice], Tensor]) -> tuple[Tensor, Tensor]:
        """Z w (columns, n) and Z' r (columns, d), r = residual(margins of a slice of pairs, the slice).

        Rows that are streamed, or of another precision, are read and converted once.
        """
        if isinstance(self.rows, Tensor) and self.rows.dtype == w.dtype:
            margins = self.margins(w)
            return margins, self.gradient(residual(margins, slice(None)))
        gain = self.gain.to(w.dtype)
        scaled, total, margins = w * gain, torch.zeros_like(w), w.new_empty(len(w), self.rows.shape[0])
        for part, block in _in_precision_of(w, self.rows):
            margins[:, part] = _product(scaled, block.T)
            total += _product(residual(margins[:, part], part), block)
        return margins, total * gain


@dataclass(frozen=True)
class Spectrum:
    """Z'Z / n = V T V' with T diagonal or tridiagonal.

    Attributes
    ----------
    diagonal
        Of T (r,): the eigenvalues where it has nothing else.
    vectors
        V (r, r), orthogonal; None where Z'Z is diagonal, or, if ``rough``, is taken for its diagonal.
    beside
        What lies beside the diagonal of T (r - 1,); None where that is nothing.
    rough
        Whether T is the diagonal of Z'Z / n itself.
    """

    diagonal: Tensor
    vectors: Tensor | None
    beside: Tensor | None = None
    rough: bool = False

    def rotate(self, w: Tensor) -> Tensor:
        """Turn w (columns, r) into the basis V."""
        return w if self.vectors is None else _product(w, self.vectors)

    def back(self, a: Tensor) -> Tensor:
        """Turn a (columns, r) from the basis V."""
        return a if self.vectors is None else _product(a, self.vectors.T)

    def times(self, a: Tensor) -> Tensor:
        """T a for each of a (columns, r)."""
        product = a * self.diagonal
        if self.beside is not None:
            product[:, 1:] += a[:, :-1] * self.beside
            product[:, :-1] += a[:, 1:] * self.beside
        return product

    def divide(self, a: Tensor, c: Tensor, lam: Tensor) -> Tensor:
        """(c T + lam)^-1 a for each of a (columns, r) with its c and lam (columns, 1)."""
        if self.beside is None:
            return a / (c * self.diagonal + lam)
        along = (c.double() * self.diagonal + lam).numpy()
        beside = (c.double() * self.beside).numpy()
        found = np.empty(a.shape)
        for column, right in enumerate(a.double().numpy()):
            *_, found[column], failed = lapack.dptsv(along[column], beside[column], right)
            assert not failed, "c T + lam is not positive definite"  # `_spectrum` sees to it
        return torch.from_numpy(found).to(a.dtype)

    def to(self, dtype: torch.dtype) -> "Spectrum":
        """Return the spectrum in another precision."""
        vectors = None if self.vectors is None else self.vectors.to(dtype)
        beside = None if self.beside is None else self.beside.to(dtype)
        return Spectrum(self.diagonal.to(dtype), vectors, beside, self.rough)


@dataclass(frozen=True)
class Problem:
    """What all fits on one layer share.

    Attributes
    ----------
    exact
        Z or T, in the precision of what was given.
    fast
        The same in float32; None where channels are not scaled, as float32 does not resolve the small ones.
    spectrum
        The preconditioner.
    scale
        (d,) float64: of each channel, 0 where a channel is dropped.
    lift
        Z and U / sqrt(n e) (n, r), which take coefficients on T to channels; None where fits run on Z.
    matrix_free
        Whether the preconditioner is diagonal for want of memory.
    memory
        Bytes that the state of fits may take together; it is counted where rows are streamed only.
    """

    exact: Differences
    fast: Differences | None
    spectrum: Spectrum
    scale: Tensor
    lift: tuple[Differences, Tensor] | None = None
    matrix_free: bool = False
    memory: float = float("inf")

    def coefficients(self, w: Tensor) -> Tensor:
        """Coefficients (d,) float64 on unscaled channels for a solution w (r,)."""
        if self.lift is not None:
            data, vectors = self.lift
            w = data.gradient((vectors @ w)[None])[0]
        return w * _gain(self.scale)


def factorise(
    rows: Tensor | StreamedDifferences,
    weight: Tensor,
    *,
    standardize: bool,
    noise: Tensor,
    memory: float,
    smallest_lam: float,
    axes: bool = False,
) -> Problem:
    """Find scales and preconditioner.

    Parameters
    ----------
    rows
        D (n, d) float32 or float64. Streamed ones must be finite, as arrays have been found to be.
    weight
        (n,) float64, not negative, with a positive sum.
    standardize
        Whether to divide channels by their root mean square.
    noise
        (d,) or (1,): see `channel_scale`.
    memory
        Bytes that the factorisation may take, and after it the state of fits on streamed rows.
    smallest_lam
        Weakest ridge penalty of all fits: where rounding errors of a float32 Gram matrix would drown it, float64 is
        used.
    axes
        Whether the spectrum has to be diagonal: fits do as well without, which takes half the time.

    Raises
    ------
    HeadError
        If no channel differs, or streamed rows cannot be read or are not finite.
    """
    n, d = rows.shape
    size = min(n, d)
    matrix_free = eigen_bytes(size) > memory
    weight = weight / weight.sum()
    if n < d or matrix_free:
        moments = _squares(rows, weight)
        scale = channel_scale(moments, noise, standardize=standardize)
        if not matrix_free:
            return _dual(rows, scale, fast=standardize)
        exact, fast = _in_both_precisions(rows, scale, fast=standardize)
        diagonal = Spectrum(moments * exact.gain.square(), None, rough=True)
        return Problem(exact, fast, diagonal, scale, matrix_free=True, memory=memory)
    single = standardize and _is_single(rows)
    matrix = _gram(rows, weight, torch.float32 if single else torch.float64)
    scale = channel_scale(matrix.diagonal(), noise, standardize=standardize)
    exact, fast = _in_both_precisions(rows, scale, fast=standardize)
    scaled = matrix * exact.gain * exact.gain[:, None]
    left = memory - 12 * d**2  # vectors are kept in both precisions
    spectrum = _spectrum(scaled.float() if single else scaled, smallest_lam, axes=axes)
    if spectrum is None:
        scaled = _gram(rows, weight, torch.float64) * exact.gain * exact.gain[:, None]
        spectrum = _spectrum(scaled, smallest_lam, axes=axes)
        assert spectrum is not None  # of float64 there always is one
    return Problem(exact, fast, spectrum, scale, memory=left)


def channel_scale(moments: Tensor, noise: Tensor, *, standardize: bool) -> Tensor:
    """Scale (d,) of channels from their mean squares (d,); 0 for channels that hold nothing but rounding noise.

    A channel is dropped if its root mean square is below 1e-6 of the median varying one, or below three times the root
    mean square ``noise`` (d,) or (1,) of what rounding in the store adds to a difference.

    Raises
    ------
    HeadError
        If no channel is left.
    """
    spread = moments.sqrt()
    varying = spread[spread > 0]
    if not len(varying):
        message = f"none of the {len(spread)} channels differs within any pair; there is nothing to fit"
        raise HeadError(message)
    if not standardize:
        return torch.ones_like(spread)
    kept = (spread > 1e-6 * varying.quantile(0.5)) & (spread >= 3 * noise)
    if not kept.any():
        message = (
            f"none of the {len(spread)} channels differs by three times the quantisation noise of "
            f"{float(noise.max()):g}; there is nothing to fit"
        )
        raise HeadError(message)
    return torch.where(kept, spread, 0.0)


def _dual(rows: Tensor | StreamedDifferences, scale: Tensor, *, fast: bool) -> Problem:
    """Factorise the kernel of n < d pairs, in float64: T is what is fitted, and must be right."""
    n = rows.shape[0]
    eigenvalues, vectors = _eigh(_kernel(rows, _gain(scale)) / n)
    # Directions below the rounding error of the kernel are noise of the factorisation, not of the data.
    kept = eigenvalues > eigenvalues[-1] * n * torch.finfo(eigenvalues.dtype).eps
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    singular = (n * eigenvalues).sqrt()
    exact, single = _in_both_precisions(vectors * singular, torch.ones_like(eigenvalues), fast=fast)
    lift = Differences(rows, _gain(scale)), vectors / singular
    return Problem(exact, single, Spectrum(eigenvalues, None), scale, lift=lift)


def _in_both_precisions(
    rows: Tensor | StreamedDifferences, scale: Tensor, *, fast: bool
) -> tuple[Differences, Differences | None]:
    exact = Differences(rows, _gain(scale))
    if not fast:
        return exact, None
    if not isinstance(rows, Tensor) or rows.dtype == torch.float32:
        return exact, exact
    # scaled first: float32 has a smaller range
    return exact, Differences((rows * exact.gain).float(), torch.ones_like(exact.gain))


def _gain(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0.0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right; on the CPU by numpy's BLAS, which is the faster one at these shapes."""
    if left.device.type == "cpu":
        return torch.from_numpy(left.numpy() @ right.numpy())
    return left @ right


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (r,), ascending, and vectors (r, r); on the CPU by scipy, as `_product` by numpy."""
    if matrix.device.type == "cpu":
        values, vectors = linalg.eigh(matrix.numpy(), driver="evd", check_finite=False)
        return torch.from_numpy(values), torch.from_numpy(vectors)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _spectrum(matrix: Tensor, smallest_lam: float, *, axes: bool) -> Spectrum | None:
    """Factorise a symmetric matrix (r, r); None of a float32 one whose rounding would drown the penalties.

    On the CPU T is tridiagonal where c T + lam stays positive definite in spite of rounding.
    """
    single = matrix.dtype == torch.float32
    if axes or len(matrix) == 1 or matrix.device.type != "cpu":
        eigenvalues, vectors = _eigh(matrix)
        drowned = 4 * torch.finfo(matrix.dtype).eps * float(eigenvalues[-1]) > max(float(eigenvalues[0]), smallest_lam)
        return None if single and drowned else Spectrum(eigenvalues.clamp(min=0), vectors)
    diagonal, beside, vectors = _tridiagonal(matrix)
    smallest, largest = (
        float(linalg.eigvalsh_tridiagonal(diagonal, beside, select="i", select_range=(at, at))[0])
        for at in (0, len(matrix) - 1)
    )
    rounding = max(4 * torch.finfo(matrix.dtype).eps, 64 * torch.finfo(torch.float64).eps) * largest
    if rounding <= max(smallest, smallest_lam):
        return Spectrum(diagonal - min(smallest, 0.0), vectors, beside)
    return None if single else _spectrum(matrix, smallest_lam, axes=True)


def _tridiagonal(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonal (r,) and what lies beside it (r - 1,) of T, and V (r, r), with matrix = V T V'; by LAPACK."""
    kind, size = "s" if matrix.dtype == torch.float32 else "d", len(matrix)
    work = int(getattr(lapack, f"{kind}sytrd_lwork")(size, lower=1)[0])
    # of a symmetric matrix the transpose is the same, and it is in the order that LAPACK works in
    reflected, diagonal, beside, tau, _ = getattr(lapack, f"{kind}sytrd")(matrix.numpy().T, lower=1, lwork=work)
    # its reflections are kept as those of a Hessenberg form are
    work = int(getattr(lapack, f"{kind}orghr_lwork")(size)[0])
    vectors, _ = getattr(lapack, f"{kind}orghr")(reflected, tau, lwork=work, overwrite_a=1)
    return torch.from_numpy(diagonal), torch.from_numpy(beside), torch.from_numpy(vectors)


def _is_single(rows: Tensor | StreamedDifferences) -> bool:
    return not isinstance(rows, Tensor) or rows.dtype == torch.float32


def _blocks(rows: Tensor | StreamedDifferences, size: int, *, check: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Yield at most ``size`` rows at a time, with their place; ``check`` that streamed ones are finite."""
    pieces: Iterable[tuple[slice, Tensor]]
    if isinstance(rows, Tensor):
        pieces = [(slice(0, len(rows)), rows)]
    else:
        pieces = ((part, torch.from_numpy(block)) for part, block in rows.blocks(check=check))
    for part, piece in pieces:
        for start in range(0, len(piece), size):
            block = piece[start : start + size]
            yield slice(part.start + start, part.start + start + len(block)), block


def _in_precision_of(like: Tensor, rows: Tensor | StreamedDifferences) -> Iterator[tuple[slice, Tensor]]:
    """Yield at most `_BLOCK` rows at a time in the precision and on the device of a tensor, with their place.

    Those that are converted are overwritten when the next ones are asked for: new memory would take longer than the
    conversion.
    """
    buffer = None
    for part, block in _blocks(rows, _BLOCK):
        if block.dtype == like.dtype and block.device == like.device:
            yield part, block
            continue
        if buffer is None:
            buffer = like.new_empty(_BLOCK, rows.shape[1])
        yield part, buffer[: len(block)].copy_(block)


def _gram(rows: Tensor | StreamedDifferences, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows' diag(weight) rows (d, d) float64 from products in ``dtype``, half of which symmetry saves."""
    d = rows.shape[1]
    total = torch.zeros(d, d, dtype=torch.float64, device=weight.device)
    even = bool((weight == weight[0]).all())
    for part, piece in _blocks(rows, SLAB, check=True):
        block = piece.to(weight.device, dtype)
        _add_upper(total, block if even else block * weight[part, None].sqrt().to(dtype))
    total = _mirrored(total)
    return total * weight[0] if even else total


def _kernel(rows: Tensor | StreamedDifferences, gain: Tensor) -> Tensor:
    """Return (rows * gain) (rows * gain)' (n, n) float64, added up over parts of the channels."""
    n = rows.shape[0]
    total = torch.zeros(n, n, dtype=torch.float64, device=gain.device)
    parts: Iterable[tuple[slice, Tensor]]
    if isinstance(rows, Tensor):
        parts = ((slice(start, start + SLAB), rows[:, start : start + SLAB]) for start in range(0, rows.shape[1], SLAB))
    else:
        parts = ((columns, torch.from_numpy(block)) for columns, block in rows.column_parts())
    for columns, block in parts:
        _add_upper(total, (block.to(gain) * gain[columns]).T.contiguous())
    return _mirrored(total)


def _mirrored(total: Tensor) -> Tensor:
    """Fill the lower triangle from the upper one, where `_add_upper` left it out."""
    return total if total.device.type == "cpu" else total.triu() + total.triu(1).T


def _add_upper(total: Tensor, rows: Tensor) -> None:
    """Add rows' rows to the upper triangle of total (d, d), on the CPU to all of it, in products as large as can be."""
    d = len(total)
    if rows.device.type == "cpu":
        array = rows.numpy()
        total += torch.from_numpy(array.T @ array)  # numpy sees the symmetry and saves half, in less time than halving
        return
    if d <= _PANEL:
        total += rows.T @ rows
        return
    half = d // 2
    total[:half, half:] += rows[:, :half].T @ rows[:, half:]
    _add_upper(total[:half, :half], rows[:, :half])
    _add_upper(total[half:, half:], rows[:, half:])


def _squares(rows: Tensor | StreamedDifferences, weight: Tensor) -> Tensor:
    """Weighted sum (d,) float64 of the squares of rows (n, d)."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=weight.device)
    for part, block in _blocks(rows, _BLOCK, check=True):
        total += weight[part] @ block.to(weight).square()
    return total
