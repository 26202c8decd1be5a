"""The ordinary pipeline builds the transformer's inputs; this module catches them.

The pipeline is called with near-clean latents of the images of one prompt, guidance off and a one-step copy of its
scheduler, and stopped in a forward pre-hook of its transformer. What it was about to pass is the call. Several prompts
are never given to one pipeline call, because many pipelines then pair masks and embeddings wrongly; `batching` joins
their calls.

What the pipeline's own ``encode_prompt`` returns is recorded once for each distinct prompt (`Conditioner.encode`) and
replayed for every image (`Conditioner.prepare`), so the text encoders need not be in memory any more.
"""

import copy
import hashlib
import inspect
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import torch
from torch.utils import _pytree as pytree

from probekit.backbones.families import Call, Component, Family
from probekit.backbones.hub import in_short
from probekit.backbones.latents import LATENT_RULES
from probekit.backbones.loading import quiet
from probekit.errors import BackboneError, ConfigError

Embeddings = list[Any]
"""What each call of ``encode_prompt`` returned for one image of a prompt, in the order of the calls."""


class _Caught(BaseException):
    """Carries the caught arguments out of the pipeline; no ``except Exception`` in there may stop it."""

    def __init__(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        self.call = call


def _catch(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Caught((args, kwargs))


class Conditioner:
    """Turns (prompt, near-clean latents, sigma) into the arguments of the transformer.

    Parameters
    ----------
    family
        The pipeline's row of the table.
    pipe
        A diffusers pipeline. It is changed in place and belongs to this object afterwards; its models may be exchanged
        at any time, and only those that a method needs must hold weights.
    device
        Where the pipeline computes.
    max_tokens
        Token limit handed to the pipeline as ``max_sequence_length``; None = the pipeline's default.
    """

    def __init__(self, family: Family, pipe: Component, device: torch.device, max_tokens: int | None) -> None:
        self.family = family
        self.pipe = pipe
        limit = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
        if limit is None and max_tokens is not None:
            msg = f"max_tokens is {max_tokens}; {family.pipeline} has a fixed limit: leave it out"
            raise ConfigError(msg)
        self.max_tokens: int | None = max_tokens if max_tokens is not None or limit is None else limit.default
        self._options = {} if limit is None else {"max_sequence_length": self.max_tokens}
        self._encode_prompt = pipe.encode_prompt
        self._encode_arguments = inspect.signature(self._encode_prompt)
        self._forward_arguments = inspect.signature(pipe.transformer.forward)
        if family.noise == "vp" and not hasattr(pipe.scheduler, "alphas_cumprod"):
            msg = f"{type(pipe.scheduler).__name__} has no alphas_cumprod, which a row with noise 'vp' needs"
            raise BackboneError(msg)
        if family.noise == "flow" and not _predicts_flow(pipe.scheduler):
            found = f"{type(pipe.scheduler).__name__} with prediction_type {pipe.scheduler.config.prediction_type!r}"
            msg = f"{family.pipeline}: its scheduler is {found}, but its row says noise 'flow'; allowed for it: 'vp'"
            raise BackboneError(msg)
        self._scheduler = _one_step(pipe.scheduler)
        self.n_train_timesteps = int(pipe.scheduler.config.num_train_timesteps)
        # The property searches all components for offloading hooks at every access, many times a call.
        pinned = {"_execution_device": property(lambda _: device), "device": property(lambda _: device)}
        pipe.__class__ = type(type(pipe).__name__, (type(pipe),), pinned)
        pipe.scheduler = self._scheduler
        pipe.set_progress_bar_config(disable=True)
        self.device = device

    def encode(self, prompts: list[str], latent_shape: tuple[int, ...]) -> list[Embeddings]:
        """Return what the pipeline's ``encode_prompt`` gives for one image of each prompt.

        Parameters
        ----------
        prompts
            At most `Family.text_batch` prompts.
        latent_shape
            (c, h, w) of any latent that the pipeline takes.
        """
        recorded: list[Any] = []

        def record(*args: Any, **kwargs: Any) -> object:
            if self.family.text_batch > 1:
                kwargs = self._encode_arguments.bind(*args, **kwargs).arguments | {"prompt": prompts}
                args = ()
            recorded.append(self._encode_prompt(*args, **kwargs))
            return _entry(recorded[-1], 0) if self.family.text_batch > 1 else recorded[-1]

        latents = torch.zeros(1, *latent_shape)
        self._caught(record, prompts[0], latents, "0")
        if self.family.text_batch == 1:
            return [recorded]
        return [[_entry(result, index) for result in recorded] for index in range(len(prompts))]

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
        dict
            The arguments by name, for k images.
        """
        results = iter(embeddings)

        def replay(*args: Any, **kwargs: Any) -> object:
            asked = self._encode_arguments.bind(*args, **kwargs).arguments
            k = int(asked.get("num_images_per_prompt", 1))
            return _expand(next(results), k)

        return self._caught(replay, prompt, latents, sigma)

    def timestep(self, sigma: str) -> float:
        """Return the timestep of a noise level: sigma * N, or the integer of the nearest noise deviation."""
        if self.family.noise == "flow":
            # in decimal, so that 0.07 gives 70 and not 70.00000000000001
            return float(Decimal(sigma) * self.n_train_timesteps)
        level = float(sigma)
        clean = self._scheduler.alphas_cumprod.double().cpu()  # share of the signal's variance
        wanted = torch.tensor(level / math.hypot(level, 1 - level)).double()
        return float(((1 - clean).sqrt() - wanted).abs().argmin())

    def timestep_rule(self) -> str:
        """Return the rule of `timestep`, with a hash of the noise schedule that it looks into."""
        rule = f"{self.family.noise}, N = {self.n_train_timesteps}"
        if self.family.noise == "flow":
            return rule
        schedule = hashlib.sha256(self._scheduler.alphas_cumprod.double().cpu().numpy().tobytes()).hexdigest()
        return f"{rule}, alphas_cumprod {schedule}"

    def sigma_floor(self) -> float:
        """Return the smallest noise level that the model was trained on: 0 for flows."""
        if self.family.noise == "flow":
            return 0.0
        clean = float(self._scheduler.alphas_cumprod[0])
        ratio = math.sqrt((1 - clean) / clean)
        return ratio / (1 + ratio)

    def n_cut(self, prompts: Sequence[str]) -> int:
        """Count the prompts that are longer than one of the tokenizers takes, and so are cut."""
        cut: set[int] = set()
        for name, part in self.pipe.components.items():
            if name.startswith(("tokenizer", "processor")) and part is not None:
                tokenizer = getattr(part, "tokenizer", part)  # a processor holds its tokenizer
                own = min(int(tokenizer.model_max_length), 10**9)  # "no limit" is 10^30
                asked = self.max_tokens if self.max_tokens is not None else own
                # CLIP's limit is its own; the other tokenizers cut where the pipeline says
                limit = own if type(tokenizer).__name__.startswith("CLIP") else asked
                with quiet():
                    tokens = tokenizer(list(prompts)).input_ids
                cut |= {number for number, ids in enumerate(tokens) if len(ids) > limit}
        return len(cut)

    @torch.inference_mode()
    def _caught(self, encode_prompt: Any, prompt: str, latents: torch.Tensor, sigma: str) -> Call:
        """Run the pipeline with a stand-in for ``encode_prompt`` until it calls its transformer."""
        pipe, family, k = self.pipe, self.family, len(latents)
        factor = pixels_per_latent(pipe, family)
        height, width = (side * factor for side in latents.shape[-2:])
        self._scheduler.only_timestep = self.timestep(sigma)
        pipe.encode_prompt = encode_prompt
        if family.sizes is not None:
            family.sizes(pipe, height, width)
        latents = latents.to(self.device, _dtype(pipe.transformer))
        hook = pipe.transformer.register_forward_pre_hook(_catch, with_kwargs=True)
        try:
            with quiet():  # the pipeline would print every prompt that it cuts; `n_cut` counts them
                pipe(
                    prompt=prompt,
                    height=height,
                    width=width,
                    num_inference_steps=1,
                    num_images_per_prompt=k,
                    latents=latents if family.pack is None else family.pack(pipe, latents),
                    output_type="latent",
                    **self._options,
                    **family.call,
                )
        except _Caught as caught:
            args, kwargs = caught.call
        except (torch.OutOfMemoryError, BackboneError):
            raise
        except Exception as error:  # whatever the pipeline and its libraries choose
            msg = f"{family.pipeline} refuses a prompt with images of {height} x {width} pixels ({in_short(error)})"
            raise BackboneError(msg) from error
        else:
            msg = f"{family.pipeline} finished without calling its transformer"
            raise BackboneError(msg)
        finally:
            hook.remove()
            del pipe.encode_prompt
        return dict(self._forward_arguments.bind(*args, **kwargs).arguments)


def pixels_per_latent(pipe: Component, family: Family) -> int:
    """Return the pixels on a side of one latent pixel."""
    return family.cell(pipe) * LATENT_RULES[family.latents].cells


def _dtype(model: Component) -> torch.dtype:
    """Return what ``model.dtype`` does, without searching all modules for hooks, which takes milliseconds."""
    kept = model._keep_in_fp32_modules or ()
    found: torch.dtype = next(
        parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not any(part in name for part in kept)
    )
    return found


def _entry(result: Any, index: int) -> Any:
    """Cut one prompt out of what ``encode_prompt`` returned for several."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[index : index + 1], result)


def _expand(result: Any, k: int) -> Any:
    """Repeat what ``encode_prompt`` returned for one image: tensors along their first axis of size 1, lists of one."""
    if isinstance(result, torch.Tensor):
        single = [axis for axis, size in enumerate(result.shape) if size == 1]
        return result.repeat_interleave(k, dim=single[0]) if single else result
    if isinstance(result, list) and len(result) == 1:
        return result * k
    if isinstance(result, list | tuple):
        return type(result)(_expand(entry, k) for entry in result)
    if isinstance(result, dict):
        return {name: _expand(entry, k) for name, entry in result.items()}
    return result


def _predicts_flow(scheduler: Component) -> bool:
    """Whether a scheduler is one of a flow model; those of diffusion models have ``alphas_cumprod``, some of both."""
    return not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("prediction_type") == "flow_prediction"


def _one_step(scheduler: Component) -> Component:
    """Copy a scheduler so that its schedule is ``only_timestep``, neither shifted nor rounded."""
    scheduler = copy.copy(scheduler)

    def set_timesteps(
        num_inference_steps: int | None = None,
        device: torch.device | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        **_: object,
    ) -> None:
        scheduler.timesteps = torch.tensor([scheduler.only_timestep], dtype=torch.float32, device=device)
        scheduler.num_inference_steps = 1

    scheduler.set_timesteps = set_timesteps
    return scheduler


def check_max_tokens(max_tokens: int | None) -> None:
    """Refuse token limits that no pipeline takes."""
    if max_tokens is not None and not 0 <= max_tokens <= 2048:
        msg = f"max_tokens is {max_tokens}; allowed: 0 to 2048"
        raise ConfigError(msg)
