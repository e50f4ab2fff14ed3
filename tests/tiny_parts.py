"""Tiny autoencoders, tokenizers and encoders, of which tiny pipelines are made: nothing is downloaded."""

from typing import Any

from diffusers import AutoencoderKL
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
"""Sizes of a language model's configuration."""
EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1}
"""Sizes of the part of Qwen's models that sees pictures."""


def vae(latent_channels: int, shift_factor: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        shift_factor=shift_factor,
        use_quant_conv=shift_factor is None,
        use_post_quant_conv=shift_factor is None,
    )


def byte_letters() -> list[str]:
    """The 256 letters of byte-level BPE: printable bytes as themselves, the others moved up."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


def clip_tokenizer() -> CLIPTokenizer:
    letters = byte_letters()
    pieces = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=77
    )


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    return T5Tokenizer(
        vocab=[(piece, -float(index)) for index, piece in enumerate(pieces)],
        extra_ids=0,
        model_max_length=64,
    )


def clip(model: type[nn.Module]) -> nn.Module:
    return model(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=32,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )


def t5(
    width: int, model: type[PreTrainedModel] = T5EncoderModel, vocabulary: int = 98
) -> PreTrainedModel:
    return model(
        model.config_class(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Each word of the pipeline's template is a token, as in the real one; other text goes by letters.

    The pipeline drops the first 34 tokens, which are those before the prompt.
    """
    # In the letters of byte-level BPE, where a space is Ġ.
    words = (
        "system Describe Ġthe Ġimage Ġby Ġdetailing Ġcolor Ġshape Ġsize Ġtexture Ġquantity Ġtext "
        "Ġspatial Ġrelationships Ġof Ġobjects Ġand Ġbackground user assistant"
    )
    merges = list(
        dict.fromkeys(
            (word[:end], word[end]) for word in words.split() for end in range(1, len(word))
        )
    )
    pieces = [*byte_letters(), *(start + letter for start, letter in merges)]
    return Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def chat_tokenizer() -> Qwen2Tokenizer:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{% for each in messages %}{{ each['content'] }}{% endfor %}"
    return tokenizer


class TextProcessor:
    """Takes texts alone where a pipeline has a processor of texts and pictures, which needs torchvision."""

    def __init__(self) -> None:
        self.tokenizer = chat_tokenizer()

    def __call__(self, images: None = None, videos: None = None, **options: Any) -> Any:
        return self.tokenizer(**options)

    def apply_chat_template(self, *args: Any, **options: Any) -> list[Any]:
        return [self.tokenizer.apply_chat_template(*args, **options)]


def language_model(
    model: type[PreTrainedModel], vocabulary: int, layers: int = 2, **more: Any
) -> PreTrainedModel:
    """A decoder of some class of transformers, 16 channels wide.

    more: Arguments of its configuration.
    """
    return model(
        model.config_class(
            **TEXT, vocab_size=vocabulary, num_hidden_layers=layers,
            pad_token_id=None, bos_token_id=None, eos_token_id=None, **more,
        )
    )  # fmt: skip


def qwen_text(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL, 64 channels wide."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    eyes = {**EYES, "out_hidden_size": 64, "fullatt_block_indexes": [0]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=eyes)
    )


def qwen3_vl(model: type[PreTrainedModel], vocabulary: int, layers: int = 2) -> PreTrainedModel:
    """Qwen3-VL, 16 channels wide."""
    text = {
        **TEXT,
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    eyes = {**EYES, "out_hidden_size": 16, "deepstack_visual_indexes": [0]}
    return model(Qwen3VLConfig(text_config=text, vision_config=eyes))


def clip_vision(model: type[PreTrainedModel]) -> PreTrainedModel:
    """An encoder of pictures of the usual 224 x 224 pixels, 32 channels wide."""
    return model(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=224,
            patch_size=112,
        )
    )


def siglip() -> SiglipVisionModel:
    """An encoder of pictures of 32 x 32 pixels, 16 channels wide."""
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    )
