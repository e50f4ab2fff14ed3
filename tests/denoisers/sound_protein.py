"""Denoisers of sound and of proteins."""

from __future__ import annotations

import torch

from .base import Inputs, Noise, add


def _stable_audio(noise: Noise) -> Inputs:
    """The last token of the text is the length of the sound, after those that pad."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 2:6] = 0
    length = noise(2, 16)
    return {
        "hidden_states": noise(2, 8, 24),
        "timestep": torch.tensor(0.5).expand(2),
        "encoder_hidden_states": torch.cat([noise(2, 6, 16), length[:, None]], dim=1),
        "global_hidden_states": length,
        "encoder_attention_mask": mask,
    }


add(
    "StableAudio3DiTModel",
    {
        "io_channels": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "cond_token_dim": 16,
        "global_cond_dim": 16,
        "local_add_cond_dim": 9,
        "timestep_features_dim": 16,
        "ff_mult": 2.0,
        "num_memory_tokens": 4,
    },
    _stable_audio,
)

TOKENS = 6
ATOMS = 37


def _protein(noise: Noise) -> Inputs:
    """A backbone and latents of its tokens, each with a time of its own.

    The first token of both rows is given, and the second row ends one token before the first.
    """
    padding_mask = torch.ones(2, TOKENS, dtype=torch.bool)
    padding_mask[1, -1] = False
    given = torch.zeros(2, TOKENS, dtype=torch.bool)
    given[:, 0] = True
    molecules = torch.tensor([0, 1, 1, 1, 1, 1]).expand(2, TOKENS)
    places = torch.arange(TOKENS)
    atoms = (torch.arange(ATOMS) < 5).expand(2, TOKENS, ATOMS)
    by_atom = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord")
    return {
        "bb_ca": noise(2, TOKENS, 3) * padding_mask[..., None],
        "local_latents": noise(2, TOKENS, 8) * padding_mask[..., None],
        "bb_ca_time": torch.tensor(0.5).expand(2),
        "local_latents_time": torch.tensor(0.3).expand(2),
        "padding_mask": padding_mask,
        "token_type": torch.tensor([3, 0, 0, 0, 0, 0]).expand(2, TOKENS),
        "atom37_mask": atoms,
        "conditioning": {
            "condition_sequence_1_residue": torch.zeros(2, TOKENS, dtype=torch.long),
            **{f"condition_{name}_1_atom": atoms.long() for name in by_atom},
            "condition_index-group_1_token": molecules,
            "molecule_iid": molecules,
            "molecule_entity_id": molecules,
            "token_bond_path_length": (places[:, None] - places).abs().expand(2, -1, -1),
            "is_in_context_conditioning": given,
            "supports_local_latent": ~given,
        },
        "recycle_depth": 2,
        "attention_kwargs": None,
    }


# Pairs are updated after the first and the third layer.
add(
    "RFD4ProteinaTransformer",
    {
        "nlayers": 4,
        "token_dim": 32,
        "nheads": 2,
        "dim_cond": 16,
        "pair_repr_dim": 16,
        "latent_dim": 8,
        "token_type_emb_dim": 8,
        "cath_emb_dim": 8,
        "t_emb_dim": 16,
        "seq_sep_dim": 8,
        "xt_pair_dist_dim": 8,
        "tri_mult_c": 16,
        "num_sequence_classes": 32,
    },
    _protein,
)
