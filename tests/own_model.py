"""A transformer and a pipeline of a user's own, of which diffusers and the table of families know nothing."""

from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from tiny_parts import LATENT_CHANNELS, TEXT_WIDTH, clip_encoder, clip_tokenizer, kl_vae, redrawn

import probekit

WIDTH = 24


class OwnBlock(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.mix = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        query, key, value = self.mix(self.norm(tokens) + time).chunk(3, dim=-1)
        return tokens + self.out(torch.nn.functional.scaled_dot_product_attention(query, key, value))


class OwnTransformer(ModelMixin, ConfigMixin):
    """Tokens are [text | image], one a latent pixel."""

    @register_to_config
    def __init__(self, sample_size: int = 8, channels: int = LATENT_CHANNELS, text_width: int = TEXT_WIDTH) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(channels, WIDTH)
        self.text = torch.nn.Linear(text_width, WIDTH)
        self.time = torch.nn.Linear(1, WIDTH)
        self.layers = torch.nn.ModuleList(OwnBlock(WIDTH) for _ in range(2))
        self.out = torch.nn.Linear(WIDTH, channels)

    def forward(self, latents: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        image = self.embed(latents.flatten(2).transpose(1, 2))
        tokens = torch.cat([self.text(text), image], dim=1)
        time = self.time(timestep.to(latents.dtype).view(-1, 1, 1) / 1000)
        for layer in self.layers:
            tokens = layer(tokens, time=time)
        return self.out(tokens[:, -image.shape[1] :])


class OwnPipeline(DiffusionPipeline):
    def __init__(self, transformer: Any, vae: Any, text_encoder: Any, tokenizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.vae_scale_factor = 2

    def encode_prompt(self, prompt: str, num_images_per_prompt: int = 1) -> torch.Tensor:
        ids = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids).last_hidden_state.repeat(num_images_per_prompt, 1, 1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        num_images_per_prompt: int = 1,
        latents: torch.Tensor | None = None,
        output_type: str = "latent",
    ) -> torch.Tensor:
        text = self.encode_prompt(prompt, num_images_per_prompt=num_images_per_prompt)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.transformer(latents, text, t.expand(len(latents))), t, latents)[0]
        return latents


ROW = probekit.Family(
    transformer="OwnTransformer",
    pipeline="OwnPipeline",
    library="own_model",
    blocks=(probekit.BlockList(path="layers", tokens="last", argument="tokens", text="rest"),),
    output=probekit.Output("out"),
    patch=1,
    call={},
)


def own_pipeline(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = clip_tokenizer(folder / "tokenizer")
        pipe = OwnPipeline(
            redrawn(OwnTransformer()), kl_vae(), clip_encoder(tokenizer), tokenizer, FlowMatchEulerDiscreteScheduler()
        )
    pipe.save_pretrained(folder)
    return folder
