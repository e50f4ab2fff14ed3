"""Step skipping on every denoiser class of diffusers."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from diffusers import ModelMixin, StableDiffusionPipeline

from tests import tiny
from tests.denoisers import DENOISERS, NO_DENOISERS
from tofu_diffusers import StepSkipping, apply_tofu
from tofu_diffusers.steps.outputs import tensors_in

STEPS = 6
# Computes the two steps of the warm-up, and the fourth and sixth.
CONFIG = StepSkipping(speedup=1.5, warmup_steps=2, rule="even", corrector=False)
COMPUTED = [0, 1, 3, 5]


NAMES = sorted({*DENOISERS} - {*NO_DENOISERS})


@pytest.fixture(autouse=True)
def eager():
    """Some denoisers compile their own attention, which takes longer than all else here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def walk():
    """The model classes in diffusers' rooms of denoisers."""
    for room in ("transformers", "unets"):
        package = importlib.import_module(f"diffusers.models.{room}")
        for each in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{each.name}")
            for name, cls in vars(module).items():
                of_here = inspect.isclass(cls) and cls.__module__ == module.__name__
                if of_here and issubclass(cls, ModelMixin):
                    yield name


def generate(entry, model, handle=None):
    """A loop of a few steps with two calls each.

    Returns:
        Outputs by step, the calls' one after another; the steps at which any layer ran.
    """
    found, ran = [], []
    leaves = [each for each in model.modules() if not list(each.children())]
    hooks = [each.register_forward_hook(lambda *_: ran.append(step)) for each in leaves]
    with torch.no_grad():
        for step in range(STEPS):
            if handle is not None:
                handle.step(step, STEPS)
            outputs = [model(**entry.arguments(2 * step + call)) for call in range(2)]
            found.append([each.clone() for out in outputs for each in tensors_in(out)])
    for hook in hooks:
        hook.remove()
    return found, sorted({*ran})


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_planned_steps_run(name):
    entry = DENOISERS[name]
    model = entry.build()
    unreduced, ran = generate(entry, model)
    assert ran == [*range(STEPS)]
    with apply_tofu(model, CONFIG) as handle:
        outputs, ran = generate(entry, model, handle)
        assert ran == COMPUTED
        summary = handle.summary()
        assert summary.steps[0].computed == len(COMPUTED)
        assert summary.speedup == pytest.approx(STEPS / len(COMPUTED))
    for step in COMPUTED:
        assert equal(outputs[step], unreduced[step]), step
    for step in {*range(STEPS)} - {*COMPUTED}:
        before, last = (COMPUTED[COMPUTED.index(step - 1) + i] for i in (-1, 0))
        for forecast, older, newer in zip(
            outputs[step], unreduced[before], unreduced[last], strict=True
        ):
            slope = (newer.double() - older.double()) / (last - before)
            wanted = newer + slope * (step - last)
            torch.testing.assert_close(forecast.double(), wanted, atol=1e-4, rtol=1e-4)
    again, _ = generate(entry, model)
    assert all(map(equal, again, unreduced))
    with apply_tofu(model, speedup=1) as handle:
        same, ran = generate(entry, model, handle)
    assert ran == [*range(STEPS)] and all(map(equal, same, unreduced))


@pytest.mark.parametrize("name", NAMES)
def test_the_form_of_an_output_stays(name):
    entry = DENOISERS[name]
    model, arguments = entry.build(), entry.arguments()
    options = [{}]
    if "return_dict" in inspect.signature(type(model).forward).parameters:
        options.append({"return_dict": False})

    def form(out):
        if isinstance(out, torch.Tensor):
            return tuple(out.shape), out.dtype
        if isinstance(out, dict):
            return type(out), {key: form(value) for key, value in out.items()}
        if isinstance(out, (tuple, list)):
            return type(out), [form(each) for each in out]
        return type(out)

    with torch.no_grad(), apply_tofu(model, CONFIG) as handle:
        for option in options:
            forms = []
            for step in range(4):
                handle.step(step, STEPS)
                forms.append(form(model(**arguments, **option)))
            assert handle.inspect()[0].steps[-2].skipped
            assert forms == [forms[0]] * 4


def test_every_class_of_diffusers_is_here_or_no_denoiser():
    missing = {*walk()} - {*DENOISERS} - {*NO_DENOISERS}
    assert not missing, missing
    assert len(NAMES) >= 75


def test_what_knows_no_noise_level_is_refused():
    model = DENOISERS["UVit2DModel"].build()
    with pytest.raises(
        ValueError, match="UVit2DModel is no denoiser: its forward takes no timestep"
    ):
        apply_tofu(model, speedup=2.0)


class CallsBeside(StableDiffusionPipeline):
    """Calls its denoiser before its steps and behind them, as some do to fill a cache."""

    def __call__(self, *args, **kwargs):
        inputs = tiny.model_inputs(self.unet)
        self.beside = [self.unet(**inputs)[0]]
        out = super().__call__(*args, **kwargs)
        self.beside.append(self.unet(**inputs)[0])
        return out


class NeverSteps(StableDiffusionPipeline):
    """Denoises without its scheduler."""

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        for _ in range(12):
            self.unet(**tiny.model_inputs(self.unet))


def test_calls_beside_the_steps_are_run():
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, speedup=2.0):
        expected = tiny.generate(pipe, steps=8)
    pipe = CallsBeside(**pipe.components, requires_safety_checker=False)
    with torch.no_grad():
        plain = pipe.unet(**tiny.model_inputs(pipe.unet))[0]
    with apply_tofu(pipe, speedup=2.0) as handle:
        for _ in range(2):
            assert torch.equal(tiny.generate(pipe, steps=8), expected)
            assert all(torch.equal(each, plain) for each in pipe.beside)
            (count,) = handle.summary().steps
            assert (count.steps, count.computed) == (8, 4)


def test_a_pipeline_that_steps_no_scheduler_is_refused_and_not_just_run():
    pipe = NeverSteps(**tiny.tiny_sd().components, requires_safety_checker=False)
    with (
        apply_tofu(pipe, speedup=2.0),
        pytest.raises(RuntimeError, match="must know the denoising step"),
    ):
        pipe()
