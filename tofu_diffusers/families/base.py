"""What a family must say of its denoisers: where tokens can shrink, on what grid, and what follows them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class BlockStack:
    """Blocks that follow each other on one token grid with nothing between them.

    Args:
        name: Dotted name of the module that holds the blocks.
        resolution: Which of the family's grids the tokens lie on (0 = finest).
        blocks: (dotted name, module) in the order of execution.
    """

    name: str
    resolution: int
    blocks: tuple[tuple[str, nn.Module], ...]

    @classmethod
    def of(cls, model: nn.Module, name: str, resolution: int = 0) -> BlockStack:
        """The stack of all blocks in one module list of a model."""
        blocks = model.get_submodule(name).named_children()
        return cls(name, resolution, tuple((f"{name}.{child}", block) for child, block in blocks))


@dataclass(frozen=True)
class MaskedText:
    """A text among the root's arguments, whose masked tokens nothing but themselves sees.

    Args:
        states: Name of the text [B, T, ...].
        mask: Name of its mask [B, T], in which 0 is padding, or [B, T + N] with the image's behind; None: the
            text is all zeros where there is none, and is masked as a whole then.
        ids: Name of its positions [T, ...] or [T + N, ...], maybe with a batch axis in front; None: the
            denoiser makes them itself, or the text has none.
        gaps: Whether padding in front of words, and between them, may go as well: nothing tells a token by
            how many stand before it.
    """

    states: str
    mask: str | None
    ids: str | None = None
    gaps: bool = False


TEXT = MaskedText("encoder_hidden_states", "encoder_attention_mask")
"""How most denoisers call it."""


def depths_of(stacks: Sequence[BlockStack]) -> dict[str, float]:
    """The position of every block in the denoiser, by name: 0 is the first, 1 the last."""
    names = [name for stack in stacks for name, _ in stack.blocks]
    return {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}


class Family(ABC):
    """One kind of denoiser. Subclasses hold no state; what they know of a call is in its arguments.

    Arguments come by name: positional ones are bound to the parameters of the module's forward first. A
    block takes its image tokens [B, N, C] as `hidden_states`.
    """

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """Dotted names of the module lists that hold its runs of blocks, in the order of execution."""
    one_grid: ClassVar[bool] = True
    """Whether all runs lie on one grid; else each has its own, as other tokens stand around the image."""
    attention_names: ClassVar[tuple[str, ...]] = ("attn1",)
    """Names of a block's self-attentions over image tokens, in the order of execution."""
    sample_name: ClassVar[str]
    """Name of the root's noisy latents: [B, C, (F,) H, W], or [B, N, C] where they are packed."""
    latents_are_tokens: ClassVar[bool] = False
    """Whether the latents, and the prediction, come as one row a token."""
    returns_sequence: ClassVar[bool] = False
    """Whether what is returned is of the whole sequence, the image last, of which later calls may leave out
    what stands before it."""
    ids_name: ClassVar[str | None] = None
    """Name of the root's tensor from which `grids` reads numbers; None: shapes are enough. Reading it waits
    for the device and cannot be traced, so it is done once a generation."""
    read_names: ClassVar[tuple[str, ...]] = ()
    """Names of the root's tensors whose numbers it reads itself: shapes do not tell what it computes."""
    cache_names: ClassVar[tuple[str, ...]] = ()
    """Names of the root's arguments that are objects to which it writes."""
    texts: ClassVar[tuple[MaskedText, ...]] = ()
    """Texts that stand in the sequence under a mask, so that their padding can be dropped."""
    output_index: ClassVar[int] = 0
    """Where the image tokens stand in what a block returns, if that is a tuple."""
    guidance_in_batch: ClassVar[bool] = True
    """Whether pipelines put the branches of guidance into one batch; else each has its own call."""
    conditional_first: ClassVar[bool] = False
    """Whether the conditional rows stand before the unconditional ones."""
    timestep_name: ClassVar[str] = "timestep"
    """Name of the root's noise level."""
    timestep_scale: ClassVar[float | None] = 1.0
    """What that is of the scheduler's; None: not known."""
    rotary: ClassVar[bool] = False
    """Whether queries and keys are rotated by position, between projection and product."""
    image_first: ClassVar[bool] = False
    """Whether, in rotary families, the text stands behind the image in the attention product."""
    shared_positions: ClassVar[bool] = False
    """Whether positions have no batch axis, so that all rows of a call must keep the same tokens."""
    args_between_blocks: ClassVar[tuple[str, ...]] = ()
    """Arguments of the root that, when given, act between blocks of a run."""
    keys_values_refused: ClassVar[tuple[str, ...]] = ()
    """Choices of keys_values that its attentions cannot be given ("fresh", "cached")."""
    scopes_refused: ClassVar[tuple[str, ...]] = ()
    """Scopes in which its tokens cannot shrink."""
    refused_because: ClassVar[str] = ""
    """Why neither, in a few words."""
    projections: ClassVar[tuple[str, str, str]] = ("to_q", "to_k", "to_v")
    """Names of an attention's projections to queries, keys and values."""
    gate_names: ClassVar[tuple[str, ...]] = ()
    """Projections of an attention, beside that of the queries, of which its output takes a row a query."""
    blocks_are_attentions: ClassVar[bool] = False
    """Whether a block is nothing but an attention, so that scope "attention" is scope "block"."""

    def block_stacks(self, model: nn.Module) -> list[BlockStack]:
        """The denoiser's runs of blocks, in the order of execution."""
        return [
            BlockStack.of(model, name, 0 if self.one_grid else i)
            for i, name in enumerate(self.stacks)
        ]

    def attentions(self, block: nn.Module) -> dict[str, nn.Module]:
        """A block's self-attention modules over image tokens, by attribute name, in order of execution."""
        return {name: getattr(block, name) for name in self.attention_names}

    def listeners(self, block: nn.Module) -> dict[str, nn.Module]:
        """A block's attentions of other streams that read image tokens as keys, by attribute name."""
        return {}

    def leaves_product_out(self, kwargs: Kwargs) -> bool:
        """Whether an attention called so makes no product (perturbed guidance), and needs no keys."""
        return False

    def norms(self, block: nn.Module) -> list[nn.GroupNorm]:
        """A block's norms whose statistics run over all tokens, and must still when some are not there."""
        return []

    @abstractmethod
    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        """The token grid of every resolution for these arguments of the root.

        With `ids_name` it is read from that argument alone, and the model may be None.
        """

    @abstractmethod
    def attention_inputs(self, block: nn.Module, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        """What each self-attention of the block would read if it were given the tokens x [B, M, C].

        Token-wise, so that it can be asked for any tokens: keys_values "fresh" projects the keys and values
        of removed tokens from it.

        Raises:
            ValueError: if this block's normalisation is not known.
        """

    def around(self, grids: dict[int, TokenGrid], named: Kwargs) -> dict[int, TokenGrid]:
        """Those grids, and others that differ by what stands around the image in this call (text).

        With `ids_name`, `grids` is read once a generation and this at every call, from shapes alone.
        """
        return grids

    def image_starts(self, named: Kwargs) -> dict[int, Tensor]:
        """Where the image's tokens begin in each row of the batch [B], by resolution.

        Left out where that is behind the grid's `text_before` in all rows.
        """
        return {}

    def widths(self, attention: nn.Module) -> tuple[int, int]:
        """Channels of the tokens that a self-attention is given, and of its keys."""
        queries: Any
        keys: Any
        queries, keys = (getattr(attention, name) for name in self.projections[:2])
        return int(queries.in_features), int(keys.out_features)

    def heads(self, attention: Any) -> int:
        """Into how many heads a self-attention's queries and keys are cut."""
        return int(attention.heads)

    def example(self, model: nn.Module) -> Kwargs | None:
        """Arguments of one forward at the model's own sample size, batch 2, on the meta device.

        Only a tensor that `grids` reads (`ids_name`) holds numbers. None: not known before a call.
        """
        return None

    def splits_stacks(self, named: Kwargs) -> str | None:
        """What in this call stands between blocks of a run, so that they must be run one by one."""
        return next(
            (name for name in self.args_between_blocks if named.get(name) is not None), None
        )

    def refusal(self, scope: str, named: Kwargs) -> str | None:
        """Why this call cannot be run with reduced tokens in this scope, and a way out; or None."""
        return None

    def sees_padding(self, model: Any, named: Kwargs) -> str | None:
        """Why in this call the padding of `texts` has influence, and a way out; None: it has none."""
        return None

    def computes_all(self, named: Kwargs) -> bool:
        """Whether this call fills a cache of the denoiser's own, and must compute all tokens."""
        return False

    def slice_per_token(self, kwargs: Kwargs, positions: Tensor) -> Kwargs:
        """A block's arguments for the tokens at these positions [B, M]: per-token modulation, sliced."""
        return kwargs

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        """The arguments of a block (or attention) that must follow the kept tokens, sliced.

        Args:
            removed: [B, N - K], positions of the tokens that the attention will be given after the kept
                ones (rotary families in keys_values "fresh"); None: it is given the kept ones.
        """
        return self.slice_per_token(kwargs, plan.kept)

    def arguments_of_image(self, kwargs: Kwargs, row: int, batch: int) -> Kwargs:
        """A block's arguments for one row of the batch; what has no batch axis stays."""

        def one(leaf: Any) -> Any:
            of_batch = isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[0] == batch
            return leaf[row : row + 1] if of_batch else leaf

        return {
            name: value if name == "image_rotary_emb" else tree_map(one, value)
            for name, value in kwargs.items()
        }

    def sample(self, named: Kwargs) -> Tensor:
        """The latents among the root's arguments."""
        sample: Tensor = named[self.sample_name]
        return sample

    def latents(self, named: Kwargs) -> list[Tensor]:
        """The tensors among the root's arguments whose shapes decide that of the output; one at least."""
        return [self.sample(named)]

    def prediction(self, out: Any, grid: TokenGrid) -> Tensor:
        """What the denoiser returned as a map.  -> [B, C, F, H, W]; packed: [B, C, 1, 1, N].

        A list is of one a row. Packed, it is of all tokens, or of those from the image's first one.
        """
        if isinstance(out, list):
            out = torch.stack(out)
        tokens: Tensor = out
        if self.latents_are_tokens:
            start = grid.text_before if out.shape[1] == grid.total else 0
            tokens = out[:, start : start + grid.tokens]
            return tokens.transpose(1, 2)[:, :, None, None]
        return tokens.unsqueeze(2) if tokens.ndim == 4 else tokens

    def with_prediction(self, out: Any, grid: TokenGrid, maps: Tensor) -> Any:
        """What the denoiser returned with another prediction, as `prediction` gives it."""
        if isinstance(out, list):
            return [row.view(part.shape) for row, part in zip(maps, out, strict=True)]
        if self.latents_are_tokens:
            tokens = maps.flatten(2).transpose(1, 2)
            start = grid.text_before if out.shape[1] == grid.total else 0
            return torch.cat([out[:, :start], tokens, out[:, start + grid.tokens :]], dim=1)
        return maps.view(out.shape)

    def hidden(self, kwargs: Kwargs) -> Tensor:
        """The image tokens among a block's (or attention's) arguments.  -> [B, N, C]."""
        hidden: Tensor = kwargs["hidden_states"]
        return hidden

    def with_hidden(self, kwargs: Kwargs, x: Tensor) -> Kwargs:
        """A block's arguments with other image tokens."""
        return {**kwargs, "hidden_states": x}

    def output(self, out: Any) -> Tensor:
        """The image tokens in what a block returned.  -> [B, N, C]."""
        tokens: Tensor = out[self.output_index] if isinstance(out, tuple) else out
        return tokens

    def with_output(self, out: Any, x: Tensor, kwargs: Kwargs) -> Any:
        """What a block returned, with other image tokens; `kwargs` are the block's arguments."""
        if not isinstance(out, tuple):
            return x
        return tuple(x if i == self.output_index else part for i, part in enumerate(out))


def patch_grid(model: Any, sample: Tensor) -> dict[int, TokenGrid]:
    """The one grid of a denoiser that cuts latents [B, C, H, W] into square patches."""
    height, width = (side // model.config.patch_size for side in sample.shape[-2:])
    return {0: TokenGrid(height, width)}


def seen_by_numbers(mask: Tensor | None, name: str, way_out: str) -> str | None:
    """Why this mask, which attentions are given as it is, hides no padding; None where it does.

    Args:
        way_out: How the pipeline is given one of bool.
    """
    if mask is None or mask.dtype == torch.bool:
        return None
    return (
        f"{name} is {str(mask.dtype).removeprefix('torch.')}, which attentions add to their scores, so that "
        f"padding is seen; {way_out}, or a shorter max_sequence_length="
    )


def padded_by_attention(mask: str) -> ValueError:
    """The refusal of a mask over image tokens that an attention makes as long as what it is given."""
    return ValueError(
        f"keys_values 'cached' cannot be had with {mask}, which the attention would pad; "
        "use keys_values='dropped'"
    )


def positions_given(plan: Plan, removed: Tensor | None) -> Tensor:
    """Positions of what an attention is given: the kept tokens, then those of `removed`.  -> [B, M]."""
    return plan.kept if removed is None else torch.cat([plan.kept, removed], dim=1)


def shared_rows(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of a table of positions without a batch axis, for which all rows of a call keep the same tokens.

    [N, ...], [B, M] -> [M, ...]
    """
    # It may be on the CPU; positions must not go there, which would wait for the device.
    return table.to(positions.device)[positions[0]]


def refusal_of_sizes(sizes: Sequence[Any]) -> str | None:
    """Why pictures of these sizes cannot be one batch, and a way out; None if they are of one."""
    if all(size == sizes[0] for size in sizes):
        return None
    return f"all pictures of a batch must have one size, not {sizes}; run them one after another"


def gather_rows(x: Tensor, positions: Tensor) -> Tensor:
    """Rows along dim 1, also of a tensor that all rows of the batch share.

    [1 or B, N, ...], [B, M] -> [B, M, ...]
    """
    x = x.expand(positions.shape[0], *x.shape[1:])
    index = positions.view(*positions.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return torch.gather(x, 1, index)


def cut_mask(mask: Tensor, tokens: int, positions: Tensor, first: bool = False) -> Tensor:
    """A mask for the tokens at these positions, and for all that stands in front of or behind them.

    Args:
        mask: [B, S] or [B, 1, 1 or S, S], of which the last `tokens` belong to a sequence of tokens.
        tokens: How many there are.
        positions: [B, M] among them.
        first: Whether it is the first `tokens`.

    Returns:
        [B, S - tokens + M] or [B, 1, 1 or the same, the same].
    """
    others = torch.arange(mask.shape[-1] - tokens, device=positions.device)
    others = others.expand(len(positions), -1)
    both = [positions, others + tokens] if first else [others, positions + others.shape[1]]
    index = torch.cat(both, dim=1)
    mask = mask.expand(len(positions), *mask.shape[1:])
    if mask.ndim == 2:
        return mask.gather(1, index)
    if mask.shape[-2] > 1:
        mask = mask.gather(-2, index[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
    return mask.gather(-1, index[:, None, None].expand(-1, 1, mask.shape[-2], -1))


FAMILIES: dict[str, Family] = {}


def register_family(cls: type[Family]) -> type[Family]:
    """Class decorator: make a family known by its name and by the denoiser classes it lists."""
    FAMILIES[cls.name] = cls()
    return cls


def known_family(model: nn.Module) -> Family | None:
    """The family that lists the model's class, or else a parent class; None if none does."""
    known = known_classes()
    names = (parent.__name__ for parent in type(model).__mro__)
    return next((FAMILIES[known[name]] for name in names if name in known), None)


def known_classes() -> Mapping[str, str]:
    """Denoiser class names and the family each belongs to."""
    return {cls: family.name for family in FAMILIES.values() for cls in family.classes}
