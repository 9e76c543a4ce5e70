"""The table of families: how each one's decoder layer is put together. Adding a family is adding a row."""

import importlib
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES


@dataclass(frozen=True)
class Sublayer:
    """One residual branch of a decoder layer: x -> module(norm(x)), by the names the family's layer gives them."""

    norm: str
    module: str


@dataclass(frozen=True)
class Backbone:
    """A family of causal language models in transformers.

    Args:
        model_type: the family's `model_type`, which is also the name of its folder in `transformers.models`.
        moe: whether its feed-forward blocks are mixtures of experts.
        attention, feed_forward: the two sublayers of its decoder layer.
    """

    model_type: str
    moe: bool
    attention: Sublayer = Sublayer("input_layernorm", "self_attn")
    feed_forward: Sublayer = Sublayer("post_attention_layernorm", "mlp")

    @property
    def vwn_model_type(self) -> str:
        return f"vwn_{self.model_type}"

    @property
    def prefix(self) -> str:
        """What the family's class names start with: "Olmoe" for OlmoeConfig, OlmoeModel, …"""
        return CONFIG_MAPPING_NAMES[self.model_type].removesuffix("Config")

    @property
    def config_class(self) -> type:
        module = importlib.import_module(f"transformers.models.{self.model_type}.configuration_{self.model_type}")
        return getattr(module, f"{self.prefix}Config")

    @cached_property
    def modeling(self) -> ModuleType:
        return importlib.import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")

    def modeling_class(self, suffix: str) -> type:
        """The family's class of that role: "Model", "ForCausalLM", "PreTrainedModel", "DecoderLayer", "RMSNorm"."""
        return getattr(self.modeling, f"{self.prefix}{suffix}")


BACKBONES: dict[str, Backbone] = {
    row.model_type: row
    for row in (
        Backbone("deepseek_v3", moe=True),
        Backbone("llama", moe=False),
        Backbone("mixtral", moe=True),
        Backbone("olmoe", moe=True),
        Backbone("qwen3", moe=False),
        Backbone("qwen3_moe", moe=True),
    )
}


def get_backbone(model_type: str) -> Backbone:
    """The row of a family. Raises ValueError, naming the known ones, for a family that has none."""
    if model_type.startswith("vwn_"):
        raise ValueError(f"{model_type!r} is a VWN model already; give the checkpoint of its backbone.")
    if model_type not in BACKBONES:
        raise ValueError(f"model_type {model_type!r} is not supported. Supported families: {', '.join(BACKBONES)}.")
    return BACKBONES[model_type]
