"""The table of families: one row for each text-to-image transformer of diffusers, and the way to add one."""

from types import SimpleNamespace
from typing import Any

import torch

from probekit.backbones.families import UNUSED, BlockList, Call, Component, Family, Output, Width
from probekit.errors import BackboneError


def _sd3_widths(pipe: Component) -> list[Width]:
    config = pipe.transformer.config
    encoders = [encoder for encoder in (pipe.text_encoder, pipe.text_encoder_2) if encoder is not None]
    pooled = sum(encoder.config.projection_dim for encoder in encoders)
    clip = sum(encoder.config.hidden_size for encoder in encoders)
    widths = [
        Width("latent channels", config.in_channels, pipe.vae.config.latent_channels),
        Width("pooled text width", config.pooled_projection_dim, pooled),
        Width("text token width", config.joint_attention_dim, clip, at_least=True),
    ]
    if pipe.text_encoder_3 is not None:
        widths.append(Width("T5 token width", config.joint_attention_dim, pipe.text_encoder_3.config.d_model))
    return widths


_SIZE_AS_ASKED = {"guidance_scale": 1.0, "use_resolution_binning": False}

_PIXART = tuple(
    Family(
        transformer=transformer,
        pipeline=pipeline,
        blocks=(BlockList(path="transformer_blocks"),),
        output=Output("proj_out"),
        latents="scale",
        noise="vp",
        # the pipeline's cleaning of prompts is left out in silence where ftfy and beautifulsoup4 are not installed
        call=_SIZE_AS_ASKED | {"clean_caption": False},
        tested=True,
    )
    for pipeline in ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    for transformer in ("PixArtTransformer2DModel", "Transformer2DModel")  # repositories may have the old name
)


def _hidream_sizes(pipe: Component, height: int, width: int) -> None:
    # it rescales any size to the area of default_sample_size^2 latent pixels; a shade more, because it rounds down
    pipe.default_sample_size = (height * width) ** 0.5 / pipe.vae_scale_factor * (1 + 1e-9)


def _ideogram4_sizes(pipe: Component, height: int, width: int) -> None:
    # what its encode_prompt returns holds places for the image tokens, of the size at which it was called
    encode_prompt = pipe.encode_prompt

    def fitted(grid_h: int, grid_w: int, max_sequence_length: int, **others: Any) -> tuple[torch.Tensor, ...]:
        found = encode_prompt(grid_h=grid_h, grid_w=grid_w, max_sequence_length=max_sequence_length, **others)
        text = found[0][:, :max_sequence_length]
        lengths = (found[3][:, :max_sequence_length] != 0).sum(dim=1).tolist()
        ids = pipe._prepare_ids(lengths, grid_h, grid_w, max_sequence_length, text.device)
        return torch.nn.functional.pad(text, (0, 0, 0, grid_h * grid_w)), *ids

    pipe.encode_prompt = fitted
    if pipe.unconditional_transformer is None:  # as it is never loaded; no more than its dtype is asked for
        pipe.unconditional_transformer = SimpleNamespace(dtype=pipe.transformer.dtype)


def _joyimage_sizes(pipe: Component, height: int, width: int) -> None:
    pipe.vae_image_processor.get_default_height_width = lambda *_: (height, width)


def _kandinsky5_sizes(pipe: Component, height: int, width: int) -> None:
    pipe.resolutions = [(width, height)]


def _patches_of_4(pipe: Component, latents: torch.Tensor) -> torch.Tensor:
    """Pack 2 x 2 latent pixels into one token, (k, h/2 w/2, 4 c)."""
    return _tokens(pipe, torch.pixel_unshuffle(latents, 2))


def _tokens(pipe: Component, latents: torch.Tensor) -> torch.Tensor:
    """Make every latent pixel a token, (k, h w, c)."""
    return latents.flatten(2).transpose(1, 2)


def _unpatched(pipe: Component, latents: torch.Tensor) -> torch.Tensor:
    """Undo the 2 x 2 patches in which latents are normalised, (k, c/4, 2 h, 2 w)."""
    return torch.pixel_shuffle(latents, 2)


_FLUX_BLOCKS = (  # the single-stream blocks, too, take and give text and image apart
    BlockList(path="transformer_blocks", returns="last", text="first"),
    BlockList(path="single_transformer_blocks", returns="last", text="first"),
)
_MERGED_BLOCKS = (
    BlockList(path="transformer_blocks", returns="last", text="first"),
    BlockList(path="single_transformer_blocks", tokens="last", text="rest"),
)


def _after_text(call: Call) -> torch.Tensor:
    lengths: torch.Tensor = call["encoder_attention_mask"].sum(dim=1)
    return lengths


def _half_factor(pipe: Component) -> int:
    return int(pipe.vae_scale_factor) // 2


_ROWS = (
    Family(
        transformer="SD3Transformer2DModel",
        pipeline="StableDiffusion3Pipeline",
        blocks=(BlockList(path="transformer_blocks", returns="last", text="first", last_text=False),),
        output=Output("proj_out"),
        text_settings=("joint_attention_dim",),  # to which CLIP's tokens are padded
        text_batch=16,
        optional=frozenset({"text_encoder_3", "tokenizer_3"}),
        widths=_sd3_widths,
        tested=True,
    ),
    # Flux and what grew out of it
    Family(
        transformer="FluxTransformer2DModel",
        pipeline="FluxPipeline",
        blocks=_FLUX_BLOCKS,
        output=Output("proj_out"),
        patch=2,
        pack=_patches_of_4,
        call={},  # its guidance is an input that [dev] embeds, not a second pass: the pipeline's default
        tested=True,
    ),
    *(
        Family(  # the pipeline packs the latents itself
            transformer="Flux2Transformer2DModel",
            pipeline=pipeline,
            blocks=_MERGED_BLOCKS,
            output=Output("proj_out"),
            latents="patchify-bn",
            patch=1,
            call=call,
            tested=True,
        )
        # the guidance of the first is an input that it embeds: the pipeline's default
        for pipeline, call in (("Flux2Pipeline", {}), ("Flux2KleinPipeline", {"guidance_scale": 1.0}))
    ),
    Family(
        transformer="ChromaTransformer2DModel",
        pipeline="ChromaPipeline",
        blocks=_MERGED_BLOCKS,
        output=Output("proj_out"),
        patch=2,
        pack=_patches_of_4,
        tested=True,
    ),
    Family(  # pads its text with zeros; its vae_scale_factor is the side of a token
        transformer="BriaTransformer2DModel",
        pipeline="BriaPipeline",
        blocks=_FLUX_BLOCKS,
        output=Output("proj_out"),
        patch=2,
        pack=_patches_of_4,
        vae_factor=_half_factor,
        tested=True,
    ),
    Family(  # its text stream is half replaced before every block by another layer of the text encoder
        transformer="BriaFiboTransformer2DModel",
        pipeline="BriaFiboPipeline",
        blocks=_MERGED_BLOCKS,
        output=Output("proj_out"),
        latents="mean-std",
        patch=1,
        pack=_tokens,
        tested=True,
    ),
    Family(  # the rest of the tokens are few that summarise the prompt, as many as its length asks for
        transformer="BriaFibo2Transformer2DModel",
        pipeline="BriaFibo2Pipeline",
        blocks=(
            BlockList(path="noise_refiner", argument="x"),
            BlockList(path="layers", tokens="last", argument="x", text="rest"),
        ),
        output=Output("final_layer.linear"),
        latents="patchify-bn",
        patch=1,
        pack=_unpatched,
        tested=True,
    ),
    Family(  # its text processor only rewrites prompts
        transformer="LongCatImageTransformer2DModel",
        pipeline="LongCatImagePipeline",
        blocks=_FLUX_BLOCKS,
        output=Output("proj_out"),
        patch=2,
        pack=_patches_of_4,
        call={"guidance_scale": 1.0, "enable_prompt_rewrite": False},
        unused=UNUSED | {"text_processor"},
        tested=True,
    ),
    Family(
        transformer="OvisImageTransformer2DModel",
        pipeline="OvisImagePipeline",
        blocks=_FLUX_BLOCKS,
        output=Output("proj_out"),
        patch=2,
        pack=_patches_of_4,
        tested=True,
    ),
    # with a language model for a text encoder
    Family(
        transformer="QwenImageTransformer2DModel",
        pipeline="QwenImagePipeline",
        blocks=(BlockList(path="transformer_blocks", returns="last", text="first"),),
        output=Output("proj_out"),
        latents="mean-std",
        pack=_patches_of_4,
        call={"true_cfg_scale": 1.0},
        tested=True,
    ),
    Family(
        transformer="QwenImage21Transformer2DModel",
        pipeline="QwenImage21Pipeline",
        blocks=(BlockList(path="transformer_blocks", tokens="last", text="rest"),),
        output=Output("proj_out", tokens="last"),
        latents="mean-std",
        multiple=2,  # the prompt's template holds one place for 4 image tokens
        pack=_tokens,
        call={"true_cfg_scale": 1.0, "use_kv_cache": False},  # the cache would be an argument without a batch
        tested=True,
    ),
    Family(
        transformer="ZImageTransformer2DModel",
        pipeline="ZImagePipeline",
        blocks=(
            BlockList(path="noise_refiner", tokens="first", argument="x"),  # then padding to a multiple of 32
            BlockList(path="layers", tokens="first", argument="x", text="rest"),  # image, padding, text, padding
        ),
        output=Output("all_final_layer.2-1.linear", tokens="first"),
        patch=2,
        call={"guidance_scale": 0.0},  # it guides at every scale above 0
        tested=True,
    ),
    Family(
        transformer="Lumina2Transformer2DModel",
        pipeline="Lumina2Pipeline",
        blocks=(
            BlockList(path="noise_refiner"),
            BlockList(path="layers", tokens=_after_text, text="rest"),  # text without its padding, image, padding
        ),
        output=Output("norm_out.linear_2", tokens=_after_text),
        tested=True,
    ),
    Family(
        transformer="LuminaNextDiT2DModel",
        pipeline="LuminaPipeline",
        blocks=(BlockList(path="layers"),),
        output=Output("norm_out.linear_2"),
        latents="scale",
        call={"guidance_scale": 1.0, "clean_caption": False},  # cleaning depends on which packages are installed
        tested=True,
    ),
    Family(
        transformer="Krea2Transformer2DModel",
        pipeline="Krea2Pipeline",
        blocks=(BlockList(path="transformer_blocks", tokens="last", text="rest"),),  # text with its padding
        output=Output("final_layer.linear"),
        latents="mean-std",
        patch=2,
        pack=_patches_of_4,
        call={"guidance_scale": 0.0},  # it guides at every scale above 0
        tested=True,
    ),
    Family(
        transformer="NucleusMoEImageTransformer2DModel",
        pipeline="NucleusMoEImagePipeline",
        blocks=(BlockList(path="transformer_blocks"),),
        output=Output("proj_out"),
        latents="mean-std",
        pack=_patches_of_4,
        tested=True,
    ),
    Family(
        transformer="ErnieImageTransformer2DModel",
        pipeline="ErnieImagePipeline",
        blocks=(BlockList(path="layers", tokens="first", argument="x", text="rest", sequence_first=True),),
        output=Output("final_linear", tokens="first"),
        latents="patchify-bn-1e-5",
        vae_factor=_half_factor,
        call={"guidance_scale": 1.0, "use_pe": False},  # PE rewrites the prompt
        unused=UNUSED | {"pe", "pe_tokenizer"},
        tested=True,
    ),
    # PixArt, and others with text beside the image or in cross-attention
    *_PIXART,
    Family(
        transformer="SanaTransformer2DModel",
        pipeline="SanaPipeline",
        blocks=(BlockList(path="transformer_blocks"),),
        output=Output("proj_out"),
        latents="scale",  # of an autoencoder without a posterior
        call=_SIZE_AS_ASKED,
        tested=True,
    ),
    Family(
        transformer="HunyuanDiT2DModel",
        pipeline="HunyuanDiTPipeline",  # for VAEs of 8 pixels a latent pixel only; prompts of 77 and 256 tokens
        blocks=(BlockList(path="blocks"),),  # those of the second half also take what those of the first half returned
        output=Output("proj_out"),
        latents="scale",
        noise="vp",
        call=_SIZE_AS_ASKED,
        tested=True,
    ),
    Family(
        transformer="AuraFlowTransformer2DModel",
        pipeline="AuraFlowPipeline",
        blocks=(  # the text begins with 8 learned register tokens
            BlockList(path="joint_transformer_blocks", returns="last", text="first"),
            BlockList(path="single_transformer_blocks", tokens="last", text="rest"),
        ),
        output=Output("proj_out"),
        latents="scale",
        tested=True,
    ),
    Family(
        transformer="CogView4Transformer2DModel",
        pipeline="CogView4Pipeline",  # pads a prompt on the left to a multiple of 16 tokens, and attends to the padding
        blocks=(BlockList(path="transformer_blocks", returns="first", text="last"),),
        output=Output("proj_out"),
        latents="scale",
        tested=True,
    ),
    Family(
        transformer="CogView3PlusTransformer2DModel",
        pipeline="CogView3PlusPipeline",
        blocks=(BlockList(path="transformer_blocks", returns="first", text="last"),),
        output=Output("proj_out"),
        latents="scale",
        noise="vp",
        tested=True,
    ),
    Family(
        transformer="PRXTransformer2DModel",
        pipeline="PRXPipeline",  # refuses a guidance below 1; gives one timestep for all images; needs ftfy
        blocks=(BlockList(path="blocks"),),
        output=Output("final_layer.linear"),
        call=_SIZE_AS_ASKED,
        tested=True,
    ),
    # pipelines that choose sizes or guidance in ways of their own
    Family(  # asks a guider, not an argument, for guidance; the first call of the transformer is that of the prompt
        transformer="HunyuanImageTransformer2DModel",
        pipeline="HunyuanImagePipeline",
        blocks=(
            BlockList(path="transformer_blocks", returns="first", text="last"),
            BlockList(path="single_transformer_blocks", returns="first", text="last"),
        ),
        output=Output("proj_out"),
        latents="scale",
        patch=1,  # the config's is a pair, (1, 1)
        call={},
        optional=frozenset({"guider", "ocr_guider"}),
        tested=True,
    ),
    Family(  # a picture that is no square is padded behind, so what is beside its tokens is not text alone
        transformer="HiDreamImageTransformer2DModel",
        pipeline="HiDreamImagePipeline",
        blocks=(
            BlockList(path="double_stream_blocks", returns="first", tokens="first", text="last"),
            BlockList(path="single_stream_blocks", tokens="first"),
        ),
        output=Output("final_layer.linear", tokens="first"),
        sizes=_hidream_sizes,
        tested=True,
    ),
    Family(  # [text padded on the left | image]; 2048 places for text of 13 layers' states unless max_tokens is less
        transformer="Ideogram4Transformer2DModel",
        pipeline="Ideogram4Pipeline",
        blocks=(BlockList(path="layers", tokens="last", text="rest"),),
        output=Output("final_layer.linear", tokens="last"),
        latents="patchify-bn-pixels",
        patch=1,
        pack=_tokens,
        sizes=_ideogram4_sizes,
        call={"guidance_schedule": (1.0,)},
        unused=UNUSED | {"unconditional_transformer", "prompt_enhancer_head"},
        tested=True,
    ),
    Family(  # an editing model: without a picture to edit its pipeline makes one from the text alone
        transformer="JoyImageEditTransformer3DModel",
        pipeline="JoyImageEditPipeline",
        blocks=(BlockList(path="double_blocks", returns="first", text="last"),),
        output=Output("proj_out"),
        latents="mean-std",
        patch=2,  # the config's is a triple, (1, 2, 2)
        pack=lambda pipe, latents: latents[:, None, :, None],  # (k, pictures, c, frames, h, w)
        sizes=_joyimage_sizes,
        vae_factor="vae_scale_factor_spatial",
        unused=UNUSED | {"processor"},
        tested=True,
    ),
    Family(
        transformer="Kandinsky5Transformer3DModel",
        pipeline="Kandinsky5T2IPipeline",
        blocks=(BlockList(path="visual_transformer_blocks", argument="visual_embed"),),
        output=Output("out_layer.out_layer"),
        latents="scale",
        patch=2,  # the config's is a triple, (1, 2, 2)
        pack=lambda pipe, latents: latents.permute(0, 2, 3, 1).unsqueeze(1),  # (k, 1, h, w, c)
        sizes=_kandinsky5_sizes,
        vae_factor="vae_scale_factor_spatial",
        tested=True,
    ),
)

FAMILIES = {(row.transformer, row.pipeline): row for row in _ROWS}
"""The table, by (transformer class, pipeline class)."""


def register_family(family: Family) -> None:
    """Add a row to the table, or replace the one of the same transformer and pipeline.

    Parameters
    ----------
    family
        The row. What it says of blocks and tokens is checked on the model when that is loaded.

    Examples
    --------
    >>> import probekit
    >>> probekit.register_family(
    ...     probekit.Family(
    ...         transformer="MyTransformer2DModel",
    ...         pipeline="MyPipeline",
    ...         library="my_package",
    ...         blocks=(probekit.BlockList(path="blocks", returns="last", text="first"),),
    ...         output=probekit.Output("proj_out"),
    ...     )
    ... )
    """
    FAMILIES[family.transformer, family.pipeline] = family


def unused_parts(pipeline: str) -> frozenset[str]:
    """Return the components of a pipeline class that are never loaded; none are known of a class without a row."""
    rows = [row.unused for (_, name), row in FAMILIES.items() if name == pipeline]
    return frozenset.intersection(*rows) if rows else frozenset()


def family_of(transformer: str, pipeline: str) -> Family:
    """Return the row of a transformer class in a pipeline class, or say what is known and how to add a row."""
    if (transformer, pipeline) in FAMILIES:
        return FAMILIES[transformer, pipeline]
    pipelines = sorted(known for name, known in FAMILIES if name == transformer)
    if pipelines:
        msg = (
            f"transformer class {transformer!r} is not known in pipeline {pipeline!r}; known: {', '.join(pipelines)}; "
            f"add a row with probekit.register_family(probekit.Family(transformer={transformer!r}, "
            f"pipeline={pipeline!r}, ...))"
        )
    else:
        msg = (
            f"transformer class {transformer!r} is not known; known: {', '.join(sorted({t for t, _ in FAMILIES}))}; "
            f"add a row with probekit.register_family(probekit.Family(transformer={transformer!r}, "
            f"pipeline={pipeline!r}, blocks=..., output=...))"
        )
    raise BackboneError(msg)
