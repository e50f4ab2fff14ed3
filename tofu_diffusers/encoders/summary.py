"""What tofu did on encoders: tokens at each block, and FLOPs counted on a copy without weights."""

from __future__ import annotations

import torch
from torch import nn

from ..hooks.patch import weightless
from ..report.flops import UncountedError, flops_of
from ..report.numberless import without_numbers
from ..report.summary import Row, Summary
from .hooks import EncoderHook, attach_encoder

Roots = list[tuple[nn.Module, EncoderHook]]


def summarise_encoders(roots: Roots) -> Summary:
    """Sum up all encoders: of the last call, or of a typical one if there was none.

    Raises:
        UncountedError: if an encoder cannot run without numbers.
    """
    nominal = not any(hook.calls for _, hook in roots)
    rows, whole, run = [], 0, 0
    for model, hook in roots:
        if not nominal and not hook.calls:
            continue
        twin = weightless(model).eval()
        inputs = hook.inputs if hook.inputs is not None else hook.family.example(model)
        try:
            with without_numbers(), torch.no_grad():
                whole += flops_of(twin, inputs)
                counted = attach_encoder(twin, hook.family, hook.config)
                run += flops_of(twin, inputs)
        except Exception as error:
            # Whatever a model does with numbers of tensors that have none.
            raise UncountedError(
                f"FLOPs of {type(model).__name__} cannot be counted: {type(error).__name__}: {error}"
            ) from error
        for merge, (name, (tokens, kept)) in zip(
            counted.merges, counted.tokens.items(), strict=True
        ):
            calls = max(1, hook.calls)
            rows.append(
                Row(type(model).__name__, name, "block", merge, "copy", calls, tokens, kept)
            )
    config, family = roots[0][1].config, roots[0][1].family
    settings = (
        f"EncoderReduction: ratio {config.ratio:g}, method {config.method}, schedule {config.schedule}\n"
        f"family {family.name}"
    )
    return Summary(tuple(rows), (), whole, run, "", 0, nominal, settings, encoder=True)
