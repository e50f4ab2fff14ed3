"""The most that halving the tokens of every transformer block can save, counted in FLOPs."""

from typing import Any

import torch
from diffusers import ModelMixin, SD3Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.emoji.text import LENGTH

BLOCKS = (BasicTransformerBlock, JointTransformerBlock)


def ceiling(denoiser: ModelMixin, size: int) -> dict[str, float]:
    """For latents of that side.

    Each block is counted alone at all image tokens and at half of them (linear layers halve, the
    product of self-attention quarters); everything around the blocks stays whole, and so does the text.
    """
    model = type(denoiser).from_config(denoiser.config).eval()
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda block, args, kwargs: calls.append((block, args, kwargs)), with_kwargs=True
        )
        for block in model.modules()
        if isinstance(block, BLOCKS)
    ]
    total = _count(model, **_example(model, size))
    for hook in hooks:
        hook.remove()
    blocks = reduced = 0
    for block, args, kwargs in calls:
        blocks += _count(block, *args, **kwargs)
        # The image tokens are a block's first argument, or named.
        if args:
            args = (_half(args[0]), *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": _half(kwargs["hidden_states"])}
        reduced += _count(block, *args, **kwargs)
    return {
        "tokens": float(size * size),
        "gflops": total / 1e9,
        "share_in_blocks": blocks / total,
        "ceiling": total / (total - blocks + reduced),
    }


def _example(model: ModelMixin, size: int) -> dict[str, Tensor]:
    """Inputs of one call for one picture."""
    config = model.config
    latents, time = torch.zeros(1, config.in_channels, size, size), torch.zeros(1)
    if isinstance(model, SD3Transformer2DModel):
        return {
            "hidden_states": latents,
            "timestep": time,
            "encoder_hidden_states": torch.zeros(1, LENGTH, config.joint_attention_dim),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
        }
    words = torch.zeros(1, LENGTH, config.cross_attention_dim)
    return {"sample": latents, "timestep": time, "encoder_hidden_states": words}


def _half(tokens: Tensor) -> Tensor:
    """Keep the second half of the tokens.  [B, N, C] -> [B, N - N // 2, C]."""
    return tokens[:, tokens.shape[1] // 2 :]


def _count(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        module(*args, **kwargs)
    return int(counter.get_total_flops())
