"""The `vwn_*` fields of a config, every check on them, the widths that follow, and the stub saved beside it."""

import difflib
import math
from dataclasses import dataclass
from pathlib import Path

from .hyper_connections import check_widths

EMBEDDING_FORMS = ("direct", "projected", "scaled_copies")
REMOTE_CODE_STUB = "vwn_remote_code"


@dataclass(kw_only=True, repr=False, eq=False)
class VwnConfigMixin:
    """What a VWN config adds to its backbone's config (arXiv:2511.11238; `r = vwn_slots / vwn_segments`).

    Args:
        vwn_segments: m, number of equal segments the backbone's width `hidden_size` is cut into.
        vwn_slots: n ≥ m, number of slots of the over-width state; each is `hidden_size / vwn_segments` wide.
        vwn_dynamic: whether the connections' matrices depend on the token.
        vwn_embedding: "direct", one table [vocab, D'], or "projected", a table [vocab, D] and a map [D', D], or
            "scaled_copies", a table [vocab, D] copied into the slots, each times one learned factor.
        vwn_group_norm: RMS norm in groups of `hidden_size` values before the reduce. None: wherever it can be,
            that is where vwn_slots is a multiple of vwn_segments.
        vwn_norm_eps: added to the mean square in the connections' norms and the group norm.
        num_mtp_layers: K, modules of multi-token prediction; module k predicts the token k + 1 further on.
        mtp_loss_weight: in training, the loss is the next-token loss + mtp_loss_weight · mean of the K MTP losses.

    Raises:
        ValueError, at construction, for a value that cannot be built.
    """

    vwn_segments: int = 4
    vwn_slots: int = 8
    vwn_dynamic: bool = True
    vwn_embedding: str = "direct"
    vwn_group_norm: bool | None = None
    vwn_norm_eps: float = 1e-6
    num_mtp_layers: int = 0
    mtp_loss_weight: float = 0.3

    def __post_init__(self, **kwargs):
        known = list(VwnConfigMixin.__dataclass_fields__)
        for key in kwargs:
            if key.startswith("vwn_") and key not in known:
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
                raise ValueError(f"Unknown option {key}={kwargs[key]!r}; did you mean {nearest}? Known: {known}.")
        sizes = (self.vwn_slots, self.vwn_segments)
        if self.vwn_group_norm is None and all(isinstance(size, int) and size > 0 for size in sizes):
            self.vwn_group_norm = self.vwn_slots % self.vwn_segments == 0
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, plus a stub with which the checkpoint loads as remote code where vwn_hf is installed.

        The stub is written with the config, so that it is there whenever a model is saved, and pushed with it.
        """
        family = type(self).__name__.removesuffix("Config")
        names = {"AutoConfig": f"{family}Config", "AutoModel": f"{family}Model"}
        names["AutoModelForCausalLM"] = f"{family}ForCausalLM"
        self.auto_map = {auto_class: f"{REMOTE_CODE_STUB}.{name}" for auto_class, name in names.items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        stub = f"from vwn_hf import {', '.join(sorted(names.values()))}  # pip install vwn-hf\n"
        (Path(save_directory) / f"{REMOTE_CODE_STUB}.py").write_text(stub)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing to do: transformers would copy this file into checkpoints, where the stub serves instead."""

    def validate_architecture(self):
        """Raise ValueError for `vwn_*` values that no model can be built from; called at construction."""
        super().validate_architecture()
        check_widths(self.hidden_size, self.vwn_segments, self.vwn_slots)
        if self.vwn_embedding not in EMBEDDING_FORMS:
            raise ValueError(f"vwn_embedding={self.vwn_embedding!r} is not one of {EMBEDDING_FORMS}.")
        if self.vwn_group_norm and self.vwn_slots % self.vwn_segments:
            raise ValueError(
                f"vwn_group_norm=True with vwn_slots={self.vwn_slots} and vwn_segments={self.vwn_segments}: the norm's "
                "groups are hidden_size wide, so the slots must be a multiple of the segments. "
                "Set vwn_group_norm=False or change vwn_slots."
            )
        if self.tie_word_embeddings and self.vwn_embedding == "direct" and self.vwn_slots != self.vwn_segments:
            raise ValueError(
                f"tie_word_embeddings=True with vwn_embedding='direct': lm_head is {self.hidden_size} wide and cannot "
                f"share a table that is {self.virtual_width} wide. Set vwn_embedding='projected' or "
                "'scaled_copies', whose table keeps the backbone's width, or tie_word_embeddings=False."
            )
        if not 0 < self.vwn_norm_eps < math.inf:
            raise ValueError(f"vwn_norm_eps={self.vwn_norm_eps} must be positive and finite, for example 1e-6.")
        if self.num_mtp_layers < 0:
            raise ValueError(f"num_mtp_layers={self.num_mtp_layers} must not be negative; 0 is none.")
        if not 0 <= self.mtp_loss_weight < math.inf:
            raise ValueError(f"mtp_loss_weight={self.mtp_loss_weight} must be 0 or more and finite, for example 0.3.")

    @property
    def slot_width(self) -> int:
        """d = D / m."""
        return self.hidden_size // self.vwn_segments

    @property
    def virtual_width(self) -> int:
        """D' = n·d, the width of the state between layers."""
        return self.vwn_slots * self.slot_width

    @property
    def virtual_width_factor(self) -> float:
        """r = n / m."""
        return self.vwn_slots / self.vwn_segments

    @property
    def embedding_size(self) -> int:
        """Width of what the embedding yields; read by serving engines that size buffers by it."""
        return self.virtual_width
