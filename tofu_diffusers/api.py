"""apply_tofu and remove_tofu: one call puts tofu on a pipeline or model, one takes it off."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from .config import (
    CONFIGS,
    Config,
    DenoiserConfig,
    EncoderReduction,
    StepSkipping,
    TokenReduction,
    check_whole,
    one_of,
)
from .encoders import ENCODERS, EncoderFamily, encoders_in
from .encoders.hooks import EncoderHook, attach_encoder, detach_encoder, lay_out
from .encoders.summary import summarise_encoders
from .families import (
    ANY,
    FAMILIES,
    Family,
    find_family,
    known_classes,
    known_family,
    takes_timestep,
)
from .hooks.beside import attach_beside
from .hooks.denoiser import DenoiserHook
from .hooks.layout import Layout, attach_root
from .hooks.patch import (
    changed_by_tomesd,
    check_within_reach,
    detach,
    state_of,
)
from .profiles import MEMORYLESS, fastest, resolve
from .report.inspection import Inspection, inspect
from .report.summary import Summary, site_stats, summarise
from .runtime.generation import Generation, Turn
from .runtime.runtime import Runtime
from .runtime.setup import Setup, in_force
from .steps.clock import listeners_of, unwatch, watch
from .steps.pipelines import cached_by_cache_dit, components, schedulers, unwrap
from .steps.reference import Reference
from .tuned import Tuned

DENOISER_NAMES = ("unet", "transformer", "transformer_2")
# How parts of a pipeline are called that take a timestep too, and denoise nothing.
BESIDE = "controlnet"


def apply_tofu(
    target: Any,
    *configs: Config | Tuned | str | os.PathLike[str],
    ratio: float | None = None,
    speedup: float | None = None,
    drop_text_padding: bool = False,
    **options: Any,
) -> Handle:
    """Make a pipeline, denoiser or encoder do less work, until `remove_tofu` or `handle.remove()`.

    Example:
        >>> handle = apply_tofu(pipe, ratio=0.5)          # half of the tokens, by the family's profile
        >>> handle = apply_tofu(pipe, speedup=2.0)        # at least two times fewer FLOPs, the best known way
        >>> handle = apply_tofu(pipe, TokenReduction(ratio=0.25), StepSkipping(speedup=1.5))       # both
        >>> handle = apply_tofu(pipe, drop_text_padding=True)         # the same picture; or with any of these
        >>> image = pipe("a red apple").images[0]
        >>> remove_tofu(pipe)
        >>> handle = apply_tofu(pipe.text_encoder, ratio=0.5)      # or a ViTModel, BertModel ... of its own

    Args:
        target: A pipeline (all its denoisers), a modular pipeline, or a denoiser, compiled or not; or an
            image or text encoder of transformers, or a model that holds one (of CLIPModel the image side).
        configs: On an encoder an EncoderReduction.
            Else a TokenReduction, a StepSkipping, or one of each: then tokens are reduced in the steps that
            are computed. Or what `tune` found for this pipeline, or the folder where it was saved.
        ratio: Fraction of the tokens removed: `TokenReduction(ratio=ratio, **options)`, on an encoder
            `EncoderReduction(ratio=ratio, **options)`. Higher is faster and drifts more.
        speedup: How many times fewer FLOPs of the denoiser, at least: by the type that measured best for the
            family (`StepSkipping` today), with these options. Higher is faster and drifts more.
        drop_text_padding: Whether text tokens that a mask hides leave the denoiser's sequence, which changes
            nothing but rounding. Alone, or with any of the above. Of the prompts of a batch goes what is
            padding in all.
        options: Further options of that type; with configs they replace those of the one that has them.

    Returns:
        A handle: a context manager with `summary()`, `stats()`, `step()` and `remove()`.

    Raises:
        TypeError: if the target is no pipeline or model, a config is none, a number is not a number, or
            drop_text_padding neither True nor False.
        ValueError: if ratio and speedup are given together, padding is to be dropped where no mask hides it,
            an option is of another type than what is asked for, the target has no denoiser of a known family
            or no site, was changed by tomesd or cache-dit, or the configuration does not hold. The target is
            then as it was.
        FileNotFoundError: if there are no probes where `method_options` say, or a folder has nothing tuned.
        RuntimeError: if a forward that must change was replaced by another.
    """
    if not isinstance(drop_text_padding, bool):
        raise TypeError(f"drop_text_padding must be True or False, not {drop_text_padding!r}")
    encoder = _encoder(target, named=options.get("family") in ENCODERS)
    if encoder is not None:
        if drop_text_padding:
            raise ValueError(
                f"drop_text_padding is for denoisers, and {type(encoder).__name__} is an encoder; give the "
                "pipeline"
            )
        config = _asked_of_encoder(encoder, configs, ratio, speedup, options)
        return EncoderHandle(_apply_to_encoders(encoder, config))
    nothing_else = not configs and ratio is None and speedup is None and {*options} <= {"family"}
    alone = drop_text_padding and nothing_else
    asked = () if alone else _asked(*_of_tuned(target, configs, speedup), ratio, options)
    family = options.get("family", next((each.family for each in asked if each.family), None))
    skips = not alone and (not asked or any(isinstance(each, StepSkipping) for each in asked))
    # Where padding alone is to go, a denoiser of an unknown class is refused for its text, not its tokens.
    pipeline, found = _denoisers(target, family, skips or alone)
    if drop_text_padding:
        for model, kind in found:
            _check_masks_text(model, kind)
    plans = []
    for model, kind in found:
        if changed_by_tomesd(model):
            raise ValueError(
                f"{type(model).__name__} was changed by tomesd; call tomesd.remove_patch(pipe) first"
            )
        if cached_by_cache_dit(model):
            raise ValueError(
                f"{type(model).__name__} has cache-dit, which skips what tofu would count on; call "
                "cache_dit.disable_cache(pipe) first, or go on without tofu"
            )
        # What a denoiser of an unknown class cannot do, the pipeline's other ones may.
        wanted = tuple(each for each in asked if kind is not ANY or isinstance(each, StepSkipping))
        if not asked and not alone:
            workflow = fastest(kind.name)
            for name in options:
                if name not in workflow.field_names():
                    raise ValueError(
                        f"option {name!r} is one of TokenReduction, and speedup asks for {workflow.__name__} "
                        f"with family {kind.name!r}; leave it out, or give TokenReduction(...), "
                        f"StepSkipping(speedup={speedup})"
                    )
            wanted = (workflow(speedup=speedup, **options),)  # type: ignore[call-arg]
        layouts = []
        for way in _ways(wanted, kind.name):
            try:
                layouts.append((way, Layout(model, kind, in_force(way)[0])))
            except AttributeError as error:
                raise ValueError(
                    f"{type(model).__name__} is not built like family {kind.name!r}: {error}; name the "
                    "family whose blocks are the same, or skip steps instead (speedup=2.0)"
                ) from error
        plans.append((model, kind, layouts))
    _remove_from_denoisers(target)
    roots: list[tuple[nn.Module, DenoiserHook]] = []
    try:
        for model, kind, layouts in plans:
            turn, pairs = Turn(), []
            for i, (way, layout) in enumerate(layouts):
                setup = Setup(
                    way,
                    kind,
                    tuple(layout.sites),
                    tuple(layout.projections),
                    layout.blocks,
                    model,
                    Reference(pipeline),
                    stands_in=i > 0,
                    has_stand_in=i == 0 and len(layouts) > 1,
                    drop_text_padding=drop_text_padding,
                )
                pairs.append((Generation(Runtime(setup), turn), layout))
            roots.append((model, attach_root(model, pairs)))
            # With several denoisers it is not known which one reads it.
            if pairs[0][0].runtime.setup.skipping is not None and len(plans) == 1:
                for part in _beside(pipeline):
                    attach_beside(part, roots[-1][1])
                    roots[-1][1].beside.append(part)
            for scheduler in schedulers(pipeline):
                for generation, _ in pairs:
                    watch(scheduler, generation)
    except BaseException:
        _remove(roots)
        raise
    return Handle(roots)


def remove_tofu(target: Any) -> None:
    """Give back the exact original. Does nothing to a target without tofu.

    Args:
        target: What `apply_tofu` was given, or a (deep) copy of it. From a pipeline its encoders' goes too.

    Raises:
        RuntimeError: if a forward was replaced since by one that calls tofu's. The target is then as it was.
    """
    _remove_from_denoisers(target)
    for part in [target, *components(target).values()]:
        if isinstance(part, nn.Module):
            for module in unwrap(part).modules():
                if isinstance(state_of(module), EncoderHook):
                    detach_encoder(module)


def _remove_from_denoisers(target: Any) -> None:
    parts = components(target)
    models = [part for part in parts.values() if isinstance(part, nn.Module)]
    if not parts and isinstance(target, nn.Module):
        models = [target]
    # Denoisers that were exchanged since, whose steps the pipeline's scheduler still tells.
    for part in parts.values():
        told = listeners_of(part, target)
        models += [each.runtime.setup.denoiser for each in told if isinstance(each, Generation)]
    found = [(model, state_of(model)) for model in map(unwrap, models)]
    _remove([(model, root) for model, root in found if isinstance(root, DenoiserHook)])


class Handle:
    """What `apply_tofu` returns. As a context manager it removes tofu at the end."""

    def __init__(self, roots: list[tuple[nn.Module, DenoiserHook]]) -> None:
        self._roots = roots

    def __repr__(self) -> str:
        if self.removed:
            return "Handle(removed)"
        asked = " and ".join(type(config).__name__ for config in self.configs)
        asked = asked or "drop_text_padding"
        return f"Handle({asked} on {', '.join(type(model).__name__ for model in self._models)})"

    @property
    def _models(self) -> list[nn.Module]:
        return [model for model, _ in self._roots]

    @property
    def _generations(self) -> list[tuple[nn.Module, Generation]]:
        """Of each denoiser, what is in force in its last call."""
        return [(model, hook.generation) for model, hook in self._roots]

    @property
    def configs(self) -> tuple[Config, ...]:
        """What was asked for, with nothing left open: one of each workflow at most (the first denoiser's).

        Empty if text padding alone is dropped.
        """
        return self._roots[0][1].layouts[0][0].runtime.setup.configs

    @property
    def removed(self) -> bool:
        """Whether tofu was removed, or replaced by another apply_tofu."""
        return all(generation.removed for _, generation in self._generations)

    def summary(self) -> Summary:
        """Sites, tokens in and kept, share of the denoiser's FLOPs saved, bytes of caches.

        Of the last generation, or of a nominal one if there was none. FLOPs are counted by torch's
        FlopCounterMode on a copy of the denoiser without weights; where that cannot run, and only steps are
        skipped, calls are counted instead.

        Raises:
            RuntimeError: if the handle was removed.
        """
        self._check()
        return summarise(self._generations, _attached)

    def stats(self) -> list[dict[str, Any]]:
        """For every site of the last generation: `name, scope, calls, tokens_in, tokens_kept`.

        Tokens are those of one image in one branch of guidance, summed over the calls.

        Raises:
            RuntimeError: if the handle was removed.
        """
        self._check()
        return [row for _, each in self._generations for row in site_stats(each)]

    def inspect(self) -> list[Inspection]:
        """What is known at this moment, one entry a denoiser: step, plans, grids, caches.

        Raises:
            RuntimeError: if the handle was removed.
        """
        self._check()
        return [inspect(model, generation) for model, generation in self._generations]

    def computed(self, denoiser: int = 0) -> dict[int, Tensor]:
        """At which share of the last generation's steps each token was computed, by resolution.

        Where sites do not share plans (`share`), by those of a resolution's first site.

        Args:
            denoiser: Which of the pipeline's denoisers.

        Returns:
            Resolution -> [I, F, H, W] float32 in [0, 1], an image each; empty before the first step, and
            where no tokens are reduced.

        Raises:
            IndexError: if the pipeline has fewer denoisers.
            RuntimeError: if the handle was removed.
        """
        self._check()
        if not 0 <= denoiser < len(self._generations):
            raise IndexError(
                f"denoiser {denoiser} is not one of {len(self._generations)}; count from 0"
            )
        generation = self._generations[denoiser][1]
        steps, grids = max(1, len(generation.history)), generation.runtime.call.grids
        return {
            resolution: (counts / steps).view(-1, *grids[resolution].sides)
            for resolution, counts in generation.compute_counts.items()
        }

    def step(self, index: int, total: int, *, cfg_branches: int = 1) -> None:
        """Tell a bare model its denoising step; call it before the step's forward(s).

        Args:
            index: Of the step, from 0.
            total: Steps in this generation.
            cfg_branches: Into how many equal parts the batch falls by guidance (2: unconditional rows,
                then conditional ones; DiT has them the other way round). Guidance in two calls is
                `cfg_branches=1`, conditional call first.

        Raises:
            RuntimeError: if the handle was removed.
            TypeError: if a number is no whole number.
            ValueError: if the step is not one of the total.
        """
        self._check()
        for name, value in (("index", index), ("total", total), ("cfg_branches", cfg_branches)):
            check_whole(name, value)
        if not 0 <= index < total:
            raise ValueError(f"step {index} is not one of {total} steps; count from 0")
        if cfg_branches < 1:
            raise ValueError(f"cfg_branches {cfg_branches} is below 1")
        for generation in self._all:
            generation.set_step(index, total, cfg_branches)

    def reset(self) -> None:
        """Forget a generation that was broken off: frees its caches, and ends it for the denoiser.

        A pipeline's is forgotten when it comes to its end. A loop of your own (`step`) is forgotten only when
        the next one begins: call this behind it to free its caches, and before calls that are no step.

        Raises:
            RuntimeError: if the handle was removed.
        """
        self._check()
        for generation in self._all:
            generation.end()

    def remove(self) -> None:
        """Give back the exact original.

        Raises:
            RuntimeError: if the handle was already removed, or a forward was replaced since by one that
                calls tofu's. The target is then as it was.
        """
        self._check()
        # Of several denoisers one may have been given another tofu since.
        _remove([(model, root) for model, root in self._roots if not root.generation.removed])

    @property
    def _all(self) -> list[Generation]:
        return [generation for _, hook in self._roots for generation, _ in hook.layouts]

    def _check(self) -> None:
        if self.removed:
            raise RuntimeError(
                "this handle was removed (by remove, remove_tofu or another apply_tofu); "
                "call apply_tofu again"
            )

    def __enter__(self) -> Handle:
        self._check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.removed:
            self.remove()


class EncoderHandle(Handle):
    """What `apply_tofu` returns for encoders; what asks for denoising steps raises TypeError."""

    def __init__(self, roots: list[tuple[nn.Module, EncoderHook]]) -> None:
        self._encoders = roots

    @property
    def _models(self) -> list[nn.Module]:
        return [model for model, _ in self._encoders]

    @property
    def _generations(self) -> list[tuple[nn.Module, Generation]]:
        raise TypeError(
            "an encoder has no denoising steps; its handle has summary, stats and remove"
        )

    @property
    def _all(self) -> list[Generation]:
        return [generation for _, generation in self._generations]

    @property
    def configs(self) -> tuple[Config, ...]:
        """The EncoderReduction in force."""
        return (self._encoders[0][1].config,)

    @property
    def removed(self) -> bool:
        """Whether tofu was removed, or replaced by another apply_tofu."""
        return all(hook.removed for _, hook in self._encoders)

    def summary(self) -> Summary:
        """Tokens at each block, and share of the encoder's FLOPs saved, in the last call or a typical one.

        Calls of a compiled encoder are not seen.

        Raises:
            RuntimeError: if the handle was removed.
        """
        self._check()
        return summarise_encoders(self._encoders)

    def stats(self) -> list[dict[str, Any]]:
        """For every block: `name, scope, calls, tokens_in, tokens_kept` of one row in the last call.

        Raises:
            RuntimeError: if the handle was removed.
        """
        self._check()
        return [
            {
                "name": name,
                "scope": "block",
                "calls": hook.calls,
                "tokens_in": here,
                "tokens_kept": left,
            }
            for _, hook in self._encoders
            for name, (here, left) in hook.tokens.items()
        ]

    def remove(self) -> None:
        """Give back the exact original.

        Raises:
            RuntimeError: if the handle was already removed.
        """
        self._check()
        for model, hook in self._encoders:
            if not hook.removed:
                detach_encoder(model)


def _encoder(target: Any, named: bool = False) -> nn.Module | None:
    """The target, unwrapped, if it is a model that is or holds an encoder and no denoiser; else None.

    named: Whether a family of encoders is named, so that one of any class will do.
    """
    if components(target) or not isinstance(target, nn.Module):
        return None
    model = unwrap(target)
    if known_family(model) is not None or takes_timestep(model):
        return None
    return model if named or encoders_in(model, None) else None


def _asked_of_encoder(
    model: nn.Module,
    configs: tuple[Any, ...],
    ratio: float | None,
    speedup: float | None,
    options: dict[str, Any],
) -> EncoderReduction:
    """The configuration that was asked for.

    Raises:
        TypeError: if what is given is no configuration.
        ValueError: if it is one of denoisers, or there is none.
    """
    what, way = type(model).__name__, "give EncoderReduction(ratio=0.5), or ratio=0.5"
    if speedup is not None:
        raise ValueError(
            f"speedup {speedup} asks for fewer denoising steps, and {what}, an encoder, has none; {way}"
        )
    for each in configs:
        if not isinstance(each, EncoderReduction):
            kind = type(each).__name__
            error = ValueError if isinstance(each, (Config, Tuned)) else TypeError
            raise error(f"{kind} is not for an encoder such as {what}; {way}")
    if len(configs) > 1:
        raise ValueError("two EncoderReduction are given; give one")
    changes = ({} if ratio is None else {"ratio": ratio}) | options
    if configs:
        given: EncoderReduction = configs[0]
        return given.replace(**changes)
    if ratio is None:
        raise ValueError("how much? Say ratio=0.5 (half of the tokens have left at the end)")
    EncoderReduction.check_field_names(changes)
    return EncoderReduction(**changes)


def _apply_to_encoders(
    model: nn.Module, config: EncoderReduction
) -> list[tuple[nn.Module, EncoderHook]]:
    found = encoders_in(model, config.family)
    for each, family in found:
        # Before anything is taken off that could not be put back.
        lay_out(each, family, config)
    remove_tofu(model)
    roots: list[tuple[nn.Module, EncoderHook]] = []
    try:
        for each, family in found:
            roots.append((each, attach_encoder(each, family, config)))
    except BaseException:
        for each, _ in roots:
            detach_encoder(each)
        raise
    return roots


def _of_tuned(
    target: Any, configs: tuple[Any, ...], speedup: float | None
) -> tuple[tuple[Any, ...], float | None]:
    """Configurations and speed-up; in the place of tuned settings, those of the speed-up."""
    tuned = [Tuned.load(each) if isinstance(each, (str, os.PathLike)) else each for each in configs]
    if not any(isinstance(each, Tuned) for each in tuned):
        return configs, speedup
    if len(tuned) > 1:
        raise ValueError(
            f"{len(tuned)} configurations are given, one of them tuned; tuned settings stand alone, change "
            "them by options"
        )
    tuned[0].check_fits(target, [each for each, _ in _denoisers(target, None, True)[1]])
    return tuned[0].configs(speedup), None


def _asked(
    configs: tuple[Any, ...],
    speedup: float | None,
    ratio: float | None,
    options: dict[str, Any],
) -> tuple[DenoiserConfig, ...]:
    """The configurations that were asked for; none where the family's profile says of which type."""
    for each in configs:
        if isinstance(each, EncoderReduction):
            raise ValueError(
                "EncoderReduction is for an encoder of transformers, and the target is a denoiser or a "
                "pipeline; give TokenReduction or StepSkipping, or the encoder: "
                "apply_tofu(pipe.text_encoder, EncoderReduction(...))"
            )
        if not isinstance(each, DenoiserConfig):
            what, way = repr(each), "name a number: ratio=0.5 (tokens) or speedup=2.0"
            if isinstance(each, list | tuple):
                what = f"a {type(each).__name__}"
                way = "give them one after another: apply_tofu(pipe, first, second)"
            raise TypeError(f"apply_tofu takes TokenReduction and StepSkipping, not {what}; {way}")
    kinds = [type(each) for each in configs]
    if len({*kinds}) < len(kinds):
        raise ValueError(f"two {kinds[0].__name__} are given; give one of each type at most")
    amounts = {"ratio": ratio, "speedup": speedup}
    given = {name: value for name, value in amounts.items() if value is not None} | options
    known = {name: [kind for kind in CONFIGS if name in kind.field_names()] for name in given}
    for name in given:
        one_of("option", name, {name for kind in CONFIGS for name in kind.field_names()})
    if configs:
        changes: dict[type[DenoiserConfig], dict[str, Any]] = {kind: {} for kind in kinds}
        for name, value in given.items():
            owners = [kind for kind in known[name] if kind in kinds]
            if len(owners) != 1:
                whose = " and ".join(kind.__name__ for kind in known[name])
                way = "say it inside the one that you mean"
                if not owners:
                    way = f"give {known[name][0].__name__}({name}={value!r}) beside it"
                raise ValueError(
                    f"option {name!r} is one of {whose}, and given are "
                    f"{' and '.join(kind.__name__ for kind in kinds)}; {way}"
                )
            changes[owners[0]][name] = value
        return tuple(each.replace(**changes[type(each)]) for each in configs)
    if ratio is not None and speedup is not None:
        raise ValueError(
            f"ratio {ratio} (tokens) and speedup {speedup} (FLOPs) ask for two things; for both give "
            f"TokenReduction(ratio={ratio}), StepSkipping(speedup={speedup})"
        )
    if speedup is not None:
        return ()
    fitting = [kind for kind in CONFIGS if all(kind in known[name] for name in given)]
    if not given or len(fitting) > 1:
        whose = (
            f"TokenReduction and StepSkipping both have {' and '.join(given)}; " if given else ""
        )
        raise ValueError(
            f"{whose}how much? Say ratio=0.5 (remove half of the image tokens) or speedup=2.0 (half of the "
            "denoiser's FLOPs)"
        )
    if not fitting:
        whose = ", ".join(f"{name} ({known[name][0].__name__})" for name in given)
        raise ValueError(
            f"options of both workflows: {whose}; leave those of one out, or give "
            "TokenReduction(...), StepSkipping(...)"
        )
    return (fitting[0](**given),)


def _denoisers(
    target: Any, family: str | None, skips: bool
) -> tuple[Any, list[tuple[nn.Module, Family]]]:
    """The pipeline (None for a bare model), and its denoisers, unwrapped, with their families.

    Args:
        skips: Whether steps are skipped, which runs on denoisers of any class.
    """
    parts = components(target)
    if not parts:
        if not isinstance(target, nn.Module):
            raise TypeError(
                "apply_tofu takes a diffusers pipeline, a denoiser or an encoder, not "
                f"{type(target).__name__}"
            )
        model = unwrap(target)
        return None, [(model, find_family(model, family, skips))]
    models = {name: unwrap(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    found = []
    for name, model in models.items():
        named = family is not None and name in DENOISER_NAMES
        any_class = skips and takes_timestep(model) and not name.startswith(BESIDE)
        if named or known_family(model) is not None or any_class:
            found.append((model, find_family(model, family if named else None, skips)))
    if found:
        return target, found
    its = ", ".join(f"{name}: {type(each).__name__}" for name, each in models.items())
    if skips:
        wrapped = any(isinstance(each, nn.DataParallel) for each in models.values())
        raise ValueError(
            f"{type(target).__name__} has no denoiser (a model whose forward takes a timestep); it has "
            f"{its or 'no models'}" + ("; give the pipeline its .module" if wrapped else "")
        )
    raise ValueError(
        f"{type(target).__name__} has no denoiser of a known class; it has {its or 'no models'}, and "
        f"known are {', '.join(sorted(known_classes()))}. Skip steps instead (speedup=2.0), which runs on "
        "any denoiser"
    )


def _check_masks_text(model: nn.Module, family: Family) -> None:
    """Raise ValueError where no text of a denoiser has padding that can be dropped."""
    if not family.texts:
        why = (
            "is of no known class, so that it is not known which text nothing sees; name the family whose "
            "blocks are the same (family='hunyuan_image')"
            if family is ANY
            else "sees the padding of its text, cuts it off itself, or has text beside its sequence; a "
            "shorter max_sequence_length=, where the pipeline's call has it, pads less"
        )
        can = sorted(name for each in FAMILIES.values() if each.texts for name in each.classes)
        raise ValueError(
            f"drop_text_padding: {type(model).__name__} {why}. Padding can be dropped of {', '.join(can)}"
        )


def _beside(pipeline: Any) -> list[nn.Module]:
    """The pipeline's networks beside its denoiser that run at every step, and have no tofu yet."""
    parts = {name: part for name, part in components(pipeline).items() if name.startswith(BESIDE)}
    models = [unwrap(part) for part in parts.values() if isinstance(part, nn.Module)]
    return [each for each in models if takes_timestep(each) and state_of(each) is None]


def denoisers_of(pipe: Any) -> list[tuple[nn.Module, Family]]:
    """The denoisers of a pipeline with their families, of any class.

    Raises:
        ValueError: if it has none.
    """
    return _denoisers(pipe, None, skips=True)[1]


def only_denoiser(pipe: Any, family: str | None) -> nn.Module:
    """The denoiser of a pipeline that has one, without tofu: what calibrations measure.

    Raises:
        TypeError: if `pipe` is no pipeline.
        ValueError: if it has several denoisers, none of a known class, or tofu.
    """
    if not components(pipe):
        raise TypeError(f"a calibration takes a diffusers pipeline, not {type(pipe).__name__}")
    _, found = _denoisers(pipe, family, skips=False)
    _check_one(pipe, [model for model, _ in found], "denoisers", "a pipeline")
    model, _ = found[0]
    if state_of(model) is not None:
        raise ValueError("the pipeline has tofu; call remove_tofu(pipe) before calibrating")
    return model


def _check_one(holder: Any, found: list[nn.Module], parts: str, wanted: str) -> None:
    """Refuse to calibrate what does not have exactly one of its parts."""
    if len(found) != 1:
        raise ValueError(
            f"{type(holder).__name__} has {len(found)} {parts}; a calibration is of one: give {wanted} "
            "with one"
        )


def only_encoder(target: Any) -> tuple[nn.Module, nn.Module, EncoderFamily] | None:
    """A model without tofu, unwrapped, its one encoder and its family; None of a pipeline or a denoiser.

    Raises:
        ValueError: if it has several encoders, or tofu.
    """
    model = _encoder(target)
    if model is None:
        return None
    found = encoders_in(model, None)
    _check_one(model, [root for root, _ in found], "encoders", "a model")
    root, family = found[0]
    if state_of(root) is not None:
        raise ValueError("the encoder has tofu; call remove_tofu(model) before calibrating")
    return model, root, family


def _attached(model: nn.Module, like: Setup) -> Generation:
    """Put the same tofu on a bare model; returns its generation."""
    configs = [each.replace(memory_limit=None) for each in like.configs]
    # Steps of its generation do not matter, so none is skipped and none warned of.
    still = [
        each.replace(speedup=1) if isinstance(each, StepSkipping) else each for each in configs
    ]
    # Where text padding alone is dropped there is none, and something must be asked for.
    generation = apply_tofu(model, *(still or [StepSkipping(speedup=1)]))._generations[0][1]
    generation.silent = True
    return generation


def _ways(wanted: tuple[DenoiserConfig, ...], family: str) -> list[tuple[DenoiserConfig, ...]]:
    """What was asked for, and where a family's profile that needs a past was taken, what does without."""
    full = tuple(
        resolve(each, family) for each in sorted(wanted, key=lambda each: CONFIGS.index(type(each)))
    )
    reduction, skipping = in_force(full)
    ways = [full]
    asked = next((each for each in wanted if isinstance(each, TokenReduction)), None)
    if asked is None or asked.is_resolved or not reduction:
        return ways
    try:
        # Some families have one scope alone, and it is not what a method named without it gets.
        scope = reduction.scope if FAMILIES[family].scopes_refused else asked.scope
        memoryless: TokenReduction = asked.replace(**MEMORYLESS, scope=scope)
    except ValueError:  # its options ask for a past themselves, or for more than this method can do
        return ways
    if reduction.needs_steps and not memoryless.needs_steps:
        ways.append((memoryless, *(() if skipping is None else (skipping,))))
    return ways


def _remove(roots: list[tuple[nn.Module, DenoiserHook]]) -> None:
    """Take tofu off these denoisers: off all of them or, where one cannot be reached, off none."""
    # One may be found twice, in the pipeline and by its scheduler.
    modules: dict[nn.Module, None] = {}
    for model, root in roots:
        parts = [*model.modules(), *root.beside]
        modules |= {module: None for module in parts if state_of(module) is not None}
    for module in modules:
        check_within_reach(module)
    for module in modules:
        detach(module)
    for generation in [generation for _, root in roots for generation, _ in root.layouts]:
        unwatch(generation)
        generation.forget()
        generation.removed = True
