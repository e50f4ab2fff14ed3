"""Image transformers of SD3, Ovis, PRX, OmniGen and Z-Image, each with arguments of its own kind."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Inputs, Noise, add

HEIGHT, WIDTH = 4, 6
TOKENS = HEIGHT * WIDTH


def _sd3(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": torch.tensor(500.0).expand(2),
        "encoder_hidden_states": noise(2, 9, 16),
        "pooled_projections": noise(2, 16),
        "joint_attention_kwargs": None,
    }


# As SD3.5 medium: the first block attends to the image a second time. The last one drops the text.
add(
    "SD3Transformer2DModel",
    {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 16,
        "out_channels": 4,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    _sd3,
)


def _grid_ids() -> Tensor:
    """Rows of 0, the row and the column of each packed token."""
    places = [(0, row, column) for row in range(HEIGHT) for column in range(WIDTH)]
    return torch.tensor(places, dtype=torch.float32)


def _ovis(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, TOKENS, 16),
        "timestep": torch.tensor(0.5).expand(2),
        "encoder_hidden_states": noise(2, 7, 16),
        "txt_ids": torch.tensor([(0, place, place) for place in range(7)], dtype=torch.float32),
        "img_ids": _grid_ids(),
        "joint_attention_kwargs": {},
    }


add(
    "OvisImageTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
    _ovis,
)


def _prx(noise: Noise) -> Inputs:
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 2:] = False
    return {
        "hidden_states": noise(2, 4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": noise(2, 7, 16),
        "attention_mask": mask,
    }


add(
    "PRXTransformer2DModel",
    {
        "in_channels": 4,
        "patch_size": 2,
        "context_in_dim": 16,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [8, 8],
    },
    _prx,
)


def _omnigen_mask(length: int, padding: int) -> Tensor:
    """Causal in the text and the token of time after it, everything from the image; `padding` goes before."""
    known = length + 1
    mask = torch.ones(padding + known + TOKENS, padding + known + TOKENS)
    mask[padding:, :padding] = 0
    mask[padding : padding + known, padding:] = 0
    mask[padding : padding + known, padding : padding + known] = torch.ones(known, known).tril()
    return mask


def _omnigen(noise: Noise) -> Inputs:
    """A prompt of seven tokens and an empty one of four, which is padded to the length of the first."""
    return {
        "hidden_states": noise(2, 4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": torch.tensor(0.5).expand(2),
        "input_ids": torch.tensor([[1, 5, 6, 7, 8, 9, 2], [0, 0, 0, 1, 3, 4, 2]]),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.stack([_omnigen_mask(7, 0), _omnigen_mask(4, 3)]),
        "position_ids": torch.tensor(
            [[*range(8 + TOKENS)], [0, 0, 0, *range(5 + TOKENS)]],
        ),
    }


add(
    "OmniGenTransformer2DModel",
    {
        "in_channels": 4,
        "patch_size": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "num_layers": 2,
        "pad_token_id": 0,
        "vocab_size": 16,
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        "pos_embed_max_size": 16,
        "time_step_dim": 16,
    },
    _omnigen,
)


def _z_image(noise: Noise) -> Inputs:
    """A list of images, one a row: the prompt's and the negative one's, with texts of their own lengths."""
    return {
        "x": [noise(4, 1, 2 * HEIGHT, 2 * WIDTH) for _ in range(2)],
        "t": torch.tensor([0.5, 0.5]),
        "cap_feats": [noise(7, 16), noise(4, 16)],
        "joint_attention_kwargs": None,
    }


add(
    "ZImageTransformer2DModel",
    {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 6, 6],
        "axes_lens": [128, 16, 16],
    },
    _z_image,
)
