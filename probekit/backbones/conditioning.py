"""The ordinary pipeline builds the transformer's inputs; this module catches them and joins them into batches.

1. *prepare*: the pipeline is called with near-clean latents of the images of one prompt, guidance off and a one-step
   copy of its scheduler, and stopped in a forward pre-hook of its transformer. What it was about to pass is the call.
2. *collate*: the calls of several prompts become one. Several prompts are never given to one pipeline call, because
   many pipelines then pair masks and embeddings wrongly.

Prompt embeddings come from the pipeline's own ``encode_prompt``, once for each distinct prompt; `prepare` replays them.
"""

import copy
import inspect
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import torch

from probekit.backbones.families import Component
from probekit.backbones.loading import quiet
from probekit.errors import BackboneError, ConfigError

GUIDANCE_RULE = "off (guidance_scale 1)"

Call = tuple[tuple[Any, ...], dict[str, Any]]
Embeddings = tuple[torch.Tensor | None, ...]


class _Caught(BaseException):
    """Carries the caught arguments out of the pipeline; no ``except Exception`` in there may stop it."""

    def __init__(self, call: Call) -> None:
        self.call = call


def _catch(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Caught((args, kwargs))


class Conditioner:
    """Turns (prompt, near-clean latents, sigma) into the arguments of the transformer.

    Parameters
    ----------
    pipe
        A diffusers pipeline on `device`. It is changed in place and belongs to this object afterwards.
    device
        Where the pipeline computes.
    max_tokens
        Token limit handed to the pipeline as ``max_sequence_length``; None = the pipeline's default.
    """

    def __init__(self, pipe: Component, device: torch.device, max_tokens: int | None) -> None:
        self.pipe = pipe
        default = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
        self.max_tokens: int = default if max_tokens is None else max_tokens
        self._embeddings: Embeddings = ()
        self._encode_prompt = pipe.encode_prompt
        self.n_train_timesteps = int(pipe.scheduler.config.num_train_timesteps)
        self._scheduler = _one_step(pipe.scheduler)
        # The property searches all components for offloading hooks at every access, many times a call.
        pinned = {"_execution_device": property(lambda _: device)}
        pipe.__class__ = type(type(pipe).__name__, (type(pipe),), pinned)
        pipe.encode_prompt = self._replay
        pipe.scheduler = self._scheduler
        pipe.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> list[Embeddings]:
        """Return what the pipeline's ``encode_prompt`` gives for one image of each prompt: tensors (1, ...) or None."""
        with quiet():  # the pipeline would print every prompt that it cuts; `n_cut` counts them
            together: Embeddings = self._encode_prompt(
                prompt=prompts,
                prompt_2=None,
                prompt_3=None,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_tokens,
            )
        return [
            tuple(None if tensor is None else tensor[i : i + 1] for tensor in together) for i in range(len(prompts))
        ]

    def n_cut(self, prompts: Sequence[str]) -> int:
        """Count the prompts that are longer than one of the tokenizers takes, and so are cut."""
        cut: set[int] = set()
        for name, tokenizer in self.pipe.components.items():
            if name.startswith("tokenizer") and tokenizer is not None:
                limit = self.max_tokens if name == "tokenizer_3" else tokenizer.model_max_length  # CLIP's is its own
                with quiet():
                    tokens = tokenizer(list(prompts)).input_ids
                cut |= {number for number, ids in enumerate(tokens) if len(ids) > limit}
        return len(cut)

    @torch.inference_mode()
    def prepare(self, prompt: str, embeddings: Embeddings, latents: torch.Tensor, sigma: str) -> Call:
        """Return the arguments that the pipeline passes to the transformer.

        Parameters
        ----------
        prompt
            The prompt of all k images.
        embeddings
            The prompt's entry of what `encode` returned.
        latents
            Near-clean latents, (k, c, h, w).
        sigma
            Noise level as decimal text.

        Returns
        -------
        tuple
            Positional and keyword arguments, with batch size k.
        """
        pipe, k = self.pipe, len(latents)
        height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
        self._embeddings = embeddings
        self._scheduler.only_timestep = timestep_of(sigma, self.n_train_timesteps)
        hook = pipe.transformer.register_forward_pre_hook(_catch, with_kwargs=True)
        try:
            pipe(
                prompt=prompt,
                height=height,
                width=width,
                num_inference_steps=1,
                guidance_scale=1.0,
                num_images_per_prompt=k,
                latents=latents,
                output_type="latent",
                max_sequence_length=self.max_tokens,
            )
        except _Caught as caught:
            call = caught.call
        else:
            msg = f"{type(pipe).__name__} finished without calling its transformer"
            raise BackboneError(msg)
        finally:
            hook.remove()
        sizes = {len(value) for value in (*call[0], *call[1].values()) if isinstance(value, torch.Tensor)}
        if sizes != {k}:
            msg = f"{type(pipe).__name__} prepared tensors of batch size {sorted(sizes)} for {k} images"
            raise BackboneError(msg)
        return call

    def _replay(self, *, num_images_per_prompt: int, **_: object) -> Embeddings:
        """Stand in for ``encode_prompt``, which repeats the embeddings of a prompt for each of its images."""
        return tuple(
            None if tensor is None else tensor.repeat_interleave(num_images_per_prompt, dim=0)
            for tensor in self._embeddings
        )


def _one_step(scheduler: Component) -> Component:
    """Copy a scheduler so that its schedule is ``only_timestep``, neither shifted nor rounded."""
    scheduler = copy.copy(scheduler)

    def set_timesteps(num_inference_steps: int, device: torch.device | None = None, **_: object) -> None:
        scheduler.timesteps = torch.tensor([scheduler.only_timestep], dtype=torch.float32, device=device)
        scheduler.num_inference_steps = num_inference_steps

    scheduler.set_timesteps = set_timesteps
    return scheduler


def timestep_of(sigma: str, n_train_timesteps: int) -> float:
    """Return sigma * N, multiplied in decimal so that 0.07 gives 70 and not 70.00000000000001."""
    return float(Decimal(sigma) * n_train_timesteps)


def check_max_tokens(max_tokens: int | None) -> None:
    """Refuse token limits that no pipeline takes."""
    if max_tokens is not None and not 0 <= max_tokens <= 512:
        msg = f"max_tokens is {max_tokens}; allowed: 0 to 512"
        raise ConfigError(msg)


def plan_batches(prompts: Sequence[str], batch_size: int) -> list[list[slice]]:
    """Divide rows into forward passes of at most `batch_size` rows: lists of runs of rows that share a prompt.

    A run stays whole unless it alone exceeds `batch_size`.
    """
    if batch_size < 1:
        msg = f"batch size is {batch_size}; allowed: whole numbers from 1"
        raise ConfigError(msg)
    batches: list[list[slice]] = []
    free = 0
    start = 0
    while start < len(prompts):
        stop = start + 1
        while stop < len(prompts) and prompts[stop] == prompts[start] and stop - start < batch_size:
            stop += 1
        if stop - start > free:
            batches.append([])
            free = batch_size
        batches[-1].append(slice(start, stop))
        free -= stop - start
        start = stop
    return batches


def collate(calls: Sequence[Call], sizes: Sequence[int]) -> Call:
    """Join the calls of several prompts into one.

    Parameters
    ----------
    calls
        Arguments caught by `Conditioner.prepare`.
    sizes
        Number of images of each call.

    Returns
    -------
    tuple
        Tensors and lists with one entry an image are joined; everything else must be equal in all calls.
    """
    args = tuple(_join(values, sizes) for values in zip(*(args for args, _ in calls), strict=True))
    names = list(calls[0][1])
    if any(list(kwargs) != names for _, kwargs in calls):
        msg = "the pipeline passes different arguments for different prompts"
        raise BackboneError(msg)
    return args, {name: _join([kwargs[name] for _, kwargs in calls], sizes) for name in names}


def _join(values: Sequence[Any], sizes: Sequence[int]) -> object:
    if all(isinstance(value, torch.Tensor) and len(value) == k for value, k in zip(values, sizes, strict=True)):
        return torch.cat(list(values))
    if all(isinstance(value, list) and len(value) == k for value, k in zip(values, sizes, strict=True)):
        return [entry for value in values for entry in value]
    if any(value != values[0] for value in values[1:]):
        msg = f"the pipeline passes {values[0]!r} for one prompt and another value for the next"
        raise BackboneError(msg)
    return values[0]
