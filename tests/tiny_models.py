"""Tiny random Stable Diffusion 3 pipelines, built offline and saved as ordinary diffusers folders.

Their property: every weight is drawn anew after construction, so that no gate is zero and no block an identity, and the
latents have a shift and a scale. They have learned nothing.
"""

import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TEXT_WIDTH = 16
MAX_TOKENS = 24
LATENT_CHANNELS = 4
RESOLUTION = 16
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"


def tiny_pipeline(
    folder: Path, *, seed: int = 0, n_blocks: int = 3, heads: int = 2, shift: float = 3.0, t5: bool = False
) -> Path:
    """Save a pipeline whose resolution is 16 pixels: 8 x 8 latents of 4 channels, 16 image tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer(folder / "tokenizer")
        third = _t5_tokenizer(folder / "tokenizer_3") if t5 else None
        pipe = StableDiffusion3Pipeline(
            transformer=_transformer(n_blocks, heads),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=_text_encoder(tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=_t5_encoder(third) if third else None,
            tokenizer_3=third,
        )
    pipe.save_pretrained(folder)
    return folder


def tiny_transformer(folder: Path, *, seed: int = 1, n_blocks: int = 3, heads: int = 2, **config: Any) -> Path:
    """Save a transformer alone, of the shape that `tiny_pipeline` has unless `config` says otherwise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _transformer(n_blocks, heads, **config).save_pretrained(folder)
    return folder


def _transformer(n_blocks: int, heads: int, **config: Any) -> SD3Transformer2DModel:
    settings: dict[str, Any] = {
        "sample_size": RESOLUTION // 2,
        "patch_size": 2,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_layers": n_blocks,
        "attention_head_dim": 16,
        "num_attention_heads": heads,
        "joint_attention_dim": 2 * TEXT_WIDTH,
        "caption_projection_dim": 16 * heads,
        "pooled_projection_dim": 2 * TEXT_WIDTH,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
    }
    return _redrawn(SD3Transformer2DModel(**(settings | config)))


def _vae() -> AutoencoderKL:
    return _redrawn(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=RESOLUTION,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.06,
            scaling_factor=1.5,
        )
    )


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return _redrawn(
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    )


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a tokenizer of single characters, and read it as any user's would be."""
    symbols = [*_CHARACTERS, *(f"{character}</w>" for character in _CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def _t5_encoder(tokenizer: Any) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return _redrawn(T5EncoderModel(config))


def _t5_tokenizer(folder: Path) -> Any:
    """Train a sentencepiece model on three sentences and leave ``spiece.model`` alone, as some repositories do."""
    folder.mkdir(parents=True)
    sentences = ["a red dog and a blue cat left of 2 birds", "tree, house and the sea", "small green circle above it"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(20 * sentences),
        model_prefix=str(folder / "spiece"),
        vocab_size=48,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    return T5TokenizerFast.from_pretrained(folder)


def _redrawn(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel() if "embedding" not in name else 1
                parameter.normal_(std=fan_in**-0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
