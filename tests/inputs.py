"""Arguments of one call of a bare denoiser."""

import torch


def unet_inputs(batch=2, height=10, width=14, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=draw),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 7, 32, generator=draw),
    }


def sd3_inputs(batch=2, height=12, width=20, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=draw),
        "encoder_hidden_states": torch.randn(batch, 5, 64, generator=draw),
        "pooled_projections": torch.randn(batch, 64, generator=draw),
        "timestep": torch.full((batch,), 500.0),
    }
