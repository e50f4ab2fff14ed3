"""torch.compile of every class that a family lists: fullgraph, equal to eager, no graph a step.

A new family needs nothing here, as in test_classes.py.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_map

from eval.bench import full_size
from tests import tiny
from tests.denoisers import DENOISERS
from tests.families.test_classes import CLASSES, output_of, scope_of
from tofu_diffusers import apply_tofu
from tofu_diffusers.families import known_family

STEPS = 5
LAYERS = {*full_size.LAYERS, "num_text_blocks"}
# Of classes whose layers are told by other arguments, too.
DEPTHS = {
    "BriaFiboTransformer2DModel": {},
    "HiDreamImageTransformer2DModel": {},
    "WanVACETransformer3DModel": {},
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def shallow(name):
    """The tiny denoiser with one layer of each kind, a UNet with one level, which are traced sooner."""
    config = DENOISERS[name].config
    less = {key: 1 for key in LAYERS & {key for key, layers in config.items() if layers}}
    if "block_out_channels" in config:
        for each in ("block_out_channels", "num_attention_heads"):
            if isinstance(config.get(each), tuple):
                less[each] = config[each][:1]
        for side in ("down_block_types", "up_block_types"):
            less[side] = tuple(each for each in config[side] if "Attn" in each)
    return replace(DENOISERS[name], config={**config, **DEPTHS.get(name, less)})


def outputs(handle, model, inputs, first):
    """Of every step, with latents that grow; compiled, if the model is, from the first reduced one on.

    first: The first step, too.
    """
    found, name = [], known_family(model).sample_name
    still = inputs[name]
    for step in range(STEPS):
        handle.step(step, STEPS)
        inputs = {**inputs, name: tree_map(lambda x, step=step: x * (1 + 0.3 * step), still)}
        traced = step > 1 or (first and step == 0)
        with torch.compiler.set_stance("default" if traced else "force_eager"):
            found.append(output_of(model, inputs))
    return found


@pytest.mark.filterwarnings("ignore:5 steps")
@pytest.mark.parametrize("name", CLASSES)
def test_reduced_it_compiles_where_the_unmodified_model_does(name):
    described = shallow(name)
    model, inputs = tiny.randomise(described.build()), described.arguments()
    family = known_family(model)
    options = {"ratio": 0.5, **tiny.SHORT, "scope": scope_of(family)}
    # Positions cannot be read while it is traced, and are behind the first step. If not all are the image's,
    # that one takes too many tokens for it.
    grid = family.grids(model, inputs)[0]
    first = family.ids_name is not None and grid.total > grid.tokens
    with apply_tofu(model, **options) as handle:
        eager, computed = outputs(handle, model, inputs, first), handle.computed()
        assert all(row["tokens_kept"] < row["tokens_in"] for row in handle.stats())
    counter = CompileCounter()
    with apply_tofu(model, **options) as handle:
        model.compile(fullgraph=True, backend=counter)
        try:
            compiled = outputs(handle, model, inputs, first)
        except TorchDynamoException as error:
            handle.remove()
            with pytest.raises(type(error)):
                output_of(model, inputs)
            pytest.xfail(f"the unmodified model does not: {str(error).splitlines()[0]}")
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(handle.computed(), computed)
        # None a step, nor a generation.
        assert counter.frame_count == 1 + first
        outputs(handle, model, inputs, first)
        assert counter.frame_count == 1 + first
