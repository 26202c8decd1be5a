"""Tiny random parts of pipelines: VAEs, text encoders and tokenizers, built offline.

Every weight is drawn anew after construction (`redrawn`), so that no gate is zero and no block an identity.
"""

import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3VLConfig,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaModuleConfig,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

TEXT_WIDTH = 16
MAX_TOKENS = 24
LATENT_CHANNELS = 4
RESOLUTION = 16
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"


def kl_vae(levels: int = 2) -> AutoencoderKL:
    """Make a VAE of 2^(levels - 1) pixels on a side of a latent pixel."""
    return redrawn(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(8, *(16,) * (levels - 1)),
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


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return redrawn(
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    )


def clip_tokenizer(folder: Path, max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """Write a tokenizer of single characters, and read it as any user's would be."""
    symbols = [*_CHARACTERS, *(f"{character}</w>" for character in _CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=max_tokens)


def t5_encoder(tokenizer: Any) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return redrawn(T5EncoderModel(config))


def t5_tokenizer(folder: Path) -> Any:
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


def redrawn(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                table = "embedding" in name and "linear" not in name
                fan_in = 1 if table else parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def dc_vae() -> AutoencoderDC:
    """Make an autoencoder without a posterior: 8 pixels on a side of a latent pixel."""
    channels = (8, 8, 16, 16)
    return redrawn(
        AutoencoderDC(
            latent_channels=LATENT_CHANNELS,
            attention_head_dim=8,
            encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_layers_per_block=(1,) * 4,
            decoder_layers_per_block=(1,) * 4,
            encoder_qkv_multiscales=((), (), (), (5,)),
            decoder_qkv_multiscales=((), (), (), (5,)),
            scaling_factor=0.4,
        )
    )


def bert_tokenizer() -> BertTokenizer:
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_CHARACTERS, *(f"##{letter}" for letter in _CHARACTERS)]
    return BertTokenizer({symbol: index for index, symbol in enumerate(symbols)}, model_max_length=77)


def bert_encoder(tokenizer: BertTokenizer) -> BertModel:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * TEXT_WIDTH,
        max_position_embeddings=77,
    )
    return redrawn(BertModel(config))


def umt5_encoder(tokenizer: Any) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return redrawn(UMT5EncoderModel(config))


def gemma_tokenizer() -> GemmaTokenizer:
    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_CHARACTERS]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return GemmaTokenizer(vocabulary, [], add_bos_token=True, model_max_length=40)


def gemma_encoder(tokenizer: GemmaTokenizer) -> Gemma2Model:
    return redrawn(Gemma2Model(Gemma2Config(**_gemma(tokenizer))))


def t5gemma_encoder(tokenizer: GemmaTokenizer) -> T5GemmaEncoder:
    """Make half of a T5Gemma, whose config is saved as that of both halves, as in the published repositories."""
    module = T5GemmaModuleConfig(**_gemma(tokenizer), dropout_rate=0.0)
    encoder = redrawn(T5GemmaEncoder(module))
    encoder.config = T5GemmaConfig(encoder=module, decoder=module, dropout_rate=0.0)
    return encoder


def _gemma(tokenizer: GemmaTokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def glm_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of single characters that begins every text with two special tokens and pads on the left."""
    symbols = ["<|endoftext|>", "[gMASK]", "<sop>", "<unk>", " ", *_CHARACTERS]
    ids = {symbol: index for index, symbol in enumerate(symbols)}
    letters = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token="<unk>"))
    letters.post_processor = tokenizers.processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[(name, ids[name]) for name in ("[gMASK]", "<sop>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<|endoftext|>", unk_token="<unk>", padding_side="left", model_max_length=64
    )


def glm_encoder(tokenizer: PreTrainedTokenizerFast) -> GlmModel:
    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.pad_token_id,
    )
    return redrawn(GlmModel(config))


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if message.content is string else message.content[0].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer(*texts: str) -> Qwen2Tokenizer:
    """Train byte pairs on `texts` (a pipeline's template, say), each word of which becomes one token, as in Qwen."""
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [["a red dog and a blue cat left of 2 birds", "system user assistant <think>\n\n</think>\n", *texts]],
        vocab_size=1200,
        new_special_tokens=special,
        show_progress=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen3_config(tokenizer: Any, n_layers: int = 2) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=n_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
    )


def qwen25_vl_encoder(tokenizer: Any, n_layers: int = 2) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    image, video, start, end = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names)
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return redrawn(Qwen2_5_VLForConditionalGeneration(config))


def flux2_vae() -> AutoencoderKLFlux2:
    """Latents are 4 pixels on a side, and normalised by running statistics that are neither 0 nor 1."""
    vae = redrawn(
        AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=RESOLUTION,
        )
    )
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def qwen3_vl_config(tokenizer: Any, n_layers: int) -> Qwen3VLConfig:
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    image, video, start, end = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names)
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 2 * TEXT_WIDTH,
            "num_hidden_layers": n_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def qwen_vl_processor(tokenizer: Any) -> LlavaProcessor:
    """Stand for Qwen3VLProcessor, whose part for videos cannot be built without torchvision; texts pass it alike."""
    return LlavaProcessor(
        Qwen2VLImageProcessorPil(), tokenizer, image_token="<|image_pad|>", chat_template=CHAT_TEMPLATE
    )


def qwen_image_vae() -> AutoencoderKLQwenImage:
    """Latents are 2 pixels on a side, of one frame."""
    return redrawn(
        AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.1, -0.2, 0.3, 0.05],
            latents_std=[0.7, 1.5, 0.9, 1.2],
        )
    )


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of single characters with a beginning and without padding, as Llama's is."""
    symbols = ["<|begin_of_text|>", "<|eot_id|>", "<unk>", " ", *_CHARACTERS]
    ids = {symbol: index for index, symbol in enumerate(symbols)}
    letters = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token="<unk>"))
    letters.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        unk_token="<unk>",
        model_max_length=4096,
    )


def llama_encoder(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return redrawn(LlamaForCausalLM(config))
