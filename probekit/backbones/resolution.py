"""Whether a noise level can be told from rounding."""

from collections.abc import Sequence

import numpy as np
import torch

from probekit._types import FloatArray
from probekit.backbones.backbone import Backbone
from probekit.errors import DeviceMemoryError


def noise_over_rounding(
    backbone: Backbone,
    latents: Sequence[torch.Tensor],
    prompts: Sequence[str],
    *,
    eps: Sequence[torch.Tensor],
    sigmas: Sequence[str],
    batch_size: int,
) -> tuple[dict[str, float], str]:
    """Compare what a noise level changes with what rounding to bfloat16 does.

    The ratio is the median over layers from 1 of |f32(sigma) - f32(0)| / |bf16(sigma) - f32(sigma)|: root mean squares
    over rows and channels of the mean-pooled features, with the transformer in float32 and in bfloat16.

    Parameters
    ----------
    backbone
        The model; its weights are as before afterwards.
    latents, prompts, eps, batch_size
        As in `Backbone.features`.
    sigmas
        Noise levels above 0.

    Returns
    -------
    dict
        Ratio of each noise level; empty where it could not be measured.
    str
        Why it could not be measured; empty where it was.
    """
    if backbone.stages.is_wrapped:
        return {}, "not measured with group offloading or compiled blocks"
    wanted = [("mean", point.index) for point in backbone.layers[1:]]

    def run(sigma: str, dtype: torch.dtype) -> FloatArray:
        with backbone.stages.in_dtype(dtype):
            found = backbone.features(latents, prompts, sigma=sigma, eps=eps, wanted=wanted, batch_size=batch_size)
        return np.stack([found[place] for place in wanted]).astype(np.float64)

    try:
        backbone.prompts.embed(prompts)  # the stage of the text encoders may not come while weights are converted
        backbone.features(latents[:1], prompts[:1], sigma="0", eps=eps[:1], wanted=wanted[:1], batch_size=1)
        clean = run("0", torch.float32)
        ratios = {}
        for sigma in sigmas:
            noisy, rounded = run(sigma, torch.float32), run(sigma, torch.bfloat16)
            if not all(np.isfinite(values).all() for values in (clean, noisy, rounded)):
                return {}, "not measured: features of the first rows are not finite"
            change, rounding = (np.sqrt(((a - noisy) ** 2).mean(axis=(1, 2))) for a in (clean, rounded))
            ratios[sigma] = float(np.median(change / np.maximum(rounding, np.finfo(np.float64).tiny)))
    except (torch.OutOfMemoryError, DeviceMemoryError):
        return {}, "not measured: the transformer does not fit on the device in float32"
    return ratios, ""
