"""A pipeline is loaded in the format of numbers that was asked for, whatever diffusers is installed."""

import pytest
import torch
from diffusers import DiffusionPipeline

from pipelines.loading import in_dtype
from tests import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_asked_for_is_loaded(dtype, tmp_path):
    tiny.small_sd().save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, **in_dtype(dtype))
    assert pipe.unet.dtype == dtype and pipe.vae.dtype == dtype
