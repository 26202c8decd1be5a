"""A pipeline of Stable Diffusion 3.5 Medium's shape without its weights, to time dumps on an accelerator by hand:

``python tests/campaigns/sd35_medium_shape.py /tmp/sd35-medium-shape``
``probekit bench dump --backbone /tmp/sd35-medium-shape --random-weights init:0 --resolution 512 --batch-size 32``

The transformer is a config alone (2.24 billion parameters), which ``--random-weights`` fills. The VAE has the published
shape and random weights. The text encoders are tiny; 24 + 256 text tokens enter the blocks, 77 + 256 in the real model.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_parts import TEXT_WIDTH, clip_encoder, clip_tokenizer

TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "dual_attention_layers": list(range(13)),
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2 * TEXT_WIDTH,  # of the tiny text encoders; 2048 in the real model
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}


def build(folder: Path, n_blocks: int = 24) -> Path:
    """Save the pipeline; fewer blocks for a trial."""
    config = TRANSFORMER | {"num_layers": n_blocks, "dual_attention_layers": list(range(min(13, n_blocks)))}
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "tokenizer")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5305,
    )
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.register_modules(transformer=None)
    pipe.save_pretrained(folder)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config, indent=2))
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "SD3Transformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=24)
    arguments = parser.parse_args()
    build(arguments.folder, arguments.blocks)
