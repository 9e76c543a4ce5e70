"""VWN models: a family's own classes with three modules replaced.

One token's way (B batch, S sequence, D hidden size, D' = n·d over-width, V vocabulary):

    input_ids [B, S]
       │  model.embed_tokens                      over-width embedding                       [B, S, D']
       │  model.layers[i]                         the family's decoder layer, and around
       │     attention_connection                    its norm + attention at width D          [B, S, D'] -> [B, S, D']
       │     feed_forward_connection                 its norm + MLP or experts at width D     [B, S, D'] -> [B, S, D']
       │  model.norm                              group norm, reduce, the family's norm      [B, S, D]
       │  lm_head                                 the family's                               [B, S, V]

Masks, rotary embeddings, cache, attention and expert kernels, router loss and parallel plans are the family's.
The classes of a family, `VwnOlmoeConfig`, `VwnOlmoeModel`, `VwnOlmoeForCausalLM`, …, are made from its row in
`backbones.py` by `build_family` when this module is imported.
"""

from functools import cache
from types import SimpleNamespace

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    initialization,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from .backbones import BACKBONES, Backbone, Sublayer
from .configuration_vwn import VwnConfigMixin
from .hyper_connections import GeneralizedHyperConnection
from .over_width import GroupNorm, OverWidthLinear, ProjectedEmbedding

CONNECTIONS = ("attention_connection", "feed_forward_connection")


class VwnDecoderLayerMixin:
    """A family's decoder layer between two generalized hyper-connections: [B, S, D'] -> [B, S, D']."""

    backbone: Backbone

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.add_connections(config)

    def add_connections(self, config) -> None:
        for name in CONNECTIONS:
            connection = GeneralizedHyperConnection(
                config.hidden_size,
                config.vwn_segments,
                config.vwn_slots,
                config.vwn_dynamic,
                config.vwn_norm_eps,
                carry=config.vwn_carry,
            )
            self.add_module(name, connection)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        hidden_states = self.attention_connection(
            hidden_states, lambda x: self.run(self.backbone.attention, x, **kwargs)
        )
        return self.feed_forward_connection(hidden_states, lambda x: self.run(self.backbone.feed_forward, x))

    def run(self, sublayer: Sublayer, hidden_states: Tensor, **kwargs) -> Tensor:
        """One residual branch of the family's layer at width D, without its residual."""
        output = getattr(self, sublayer.module)(getattr(self, sublayer.norm)(hidden_states), **kwargs)
        return output[0] if isinstance(output, tuple) else output


class VwnNormMixin:
    """A family's last norm with the reduce in front: [B, S, D'] -> [B, S, D]."""

    def add_reduce(self, config) -> None:
        self.group_norm = None
        if config.vwn_group_norm:
            self.group_norm = GroupNorm(config.virtual_width, config.hidden_size, config.vwn_norm_eps)
        self.reduce = OverWidthLinear(config.virtual_width, config.hidden_size, std=config.initializer_range)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.group_norm is not None:
            hidden_states = self.group_norm(hidden_states)
        return super().forward(self.reduce(hidden_states))


class VwnPreTrainedMixin:
    """What every VWN model class shares."""

    backbone: Backbone

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing to do: transformers would copy modeling code into checkpoints, where the stub serves instead."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not hasattr(module, "initial_values"):
            return super()._init_weights(module)
        for name, value in module.initial_values().items():
            initialization.copy_(getattr(module, name), value)

    # transformers answers these two by searching the source text of the class's own module: ask it of the family's.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.backbone.modeling_class("PreTrainedModel")._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.backbone.modeling_class("PreTrainedModel")._can_set_experts_implementation()


class VwnModelMixin(VwnPreTrainedMixin):
    """A family's base model over an over-width state; its last hidden state is D wide."""

    def __init__(self, config):
        config.validate_architecture()
        super().__init__(config)
        self.widen_modules(config)
        self.post_init()

    def widen_modules(self, config) -> None:
        """Replace the embedding, and turn the layers and the norm, built by the family, into VWN's in place.

        Their class is changed rather than their content copied, so that the backbone is built only once.
        """
        classes = build_family(self.backbone)
        if config.vwn_embedding == "projected":
            self.embed_tokens = ProjectedEmbedding(
                config.vocab_size, config.table_width, config.virtual_width, self.padding_idx
            )
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.virtual_width, self.padding_idx)
        for layer in self.layers:
            layer.__class__ = classes.DecoderLayer
            layer.add_connections(config)
        self.norm.__class__ = classes.Norm
        self.norm.add_reduce(config)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, **kwargs
    ):
        """The family's forward. `inputs_embeds` is D' wide; with the projected embedding also k wide, as its table."""
        if inputs_embeds is not None:
            inputs_embeds = self.to_virtual_width(inputs_embeds)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def to_virtual_width(self, inputs_embeds: Tensor) -> Tensor:
        width, config = inputs_embeds.shape[-1], self.config
        if width == config.virtual_width:
            return inputs_embeds
        if width == config.table_width and config.vwn_embedding == "projected":
            return self.embed_tokens.expansion(inputs_embeds)
        rule = f"vwn_slots · hidden_size / vwn_segments = {config.virtual_width}"
        if config.vwn_embedding == "projected":
            name = "hidden_size" if config.vwn_embedding_rank is None else "vwn_embedding_rank"
            rule += f", or {name} = {config.table_width}"
        raise ValueError(
            f"inputs_embeds is {width} wide; this model takes {rule}. Make them with model.get_input_embeddings()."
        )


class VwnCausalLMMixin(VwnPreTrainedMixin):
    """A family's causal language model over its VWN base model."""

    def __init__(self, config):
        device = torch.empty(0).device
        checkpointing = getattr(config, "gradient_checkpointing", False)
        with torch.device("meta"):  # what the family builds first costs nothing: its base model is replaced
            super().__init__(config)
        if checkpointing:  # what was built first has used the flag up; it is for the model built next
            config.gradient_checkpointing = True
        self.model = build_family(self.backbone).Model(config)
        for head in self.children():
            if head is not self.model:
                head.to_empty(device=device)  # and `post_init` initializes it
        self.post_init()


@cache
def build_family(backbone: Backbone) -> SimpleNamespace:
    """The VWN classes of a family: Config, DecoderLayer, Norm, Model, ForCausalLM."""
    family, prefix = backbone.modeling_class, f"Vwn{backbone.prefix}"
    config = strict(
        _subclass(f"{prefix}Config", VwnConfigMixin, backbone.config_class, model_type=backbone.vwn_model_type)
    )
    layer = _subclass(f"{prefix}DecoderLayer", VwnDecoderLayerMixin, family("DecoderLayer"), backbone=backbone)
    norm = _subclass(f"{prefix}RMSNorm", VwnNormMixin, family("RMSNorm"))
    shared = {
        "backbone": backbone,
        "config_class": config,
        "_no_split_modules": [layer.__name__],
        "_keep_in_fp32_modules_strict": {*(family("PreTrainedModel")._keep_in_fp32_modules_strict or ()), *CONNECTIONS},
    }
    model = _subclass(f"{prefix}Model", VwnModelMixin, family("Model"), **shared)
    causal_lm = _subclass(f"{prefix}ForCausalLM", VwnCausalLMMixin, family("ForCausalLM"), **shared)
    return SimpleNamespace(Config=config, DecoderLayer=layer, Norm=norm, Model=model, ForCausalLM=causal_lm)


def _subclass(name: str, mixin: type, family_class: type, **attributes) -> type:
    """A class of this module, so that pickle and multi-process launchers find it by name."""
    made = type(name, (mixin, family_class), {"__module__": __name__, "__doc__": mixin.__doc__, **attributes})
    globals()[name] = made
    return made


def register_family(backbone: Backbone) -> None:
    """Make a family known to the Auto classes and to the checkpoint converter."""
    classes = build_family(backbone)
    AutoConfig.register(backbone.vwn_model_type, classes.Config, exist_ok=True)
    AutoModel.register(classes.Config, classes.Model, exist_ok=True)
    AutoModelForCausalLM.register(classes.Config, classes.ForCausalLM, exist_ok=True)
    tokenizer_class = TOKENIZER_MAPPING.get(backbone.config_class, None)
    if tokenizer_class is not None:
        AutoTokenizer.register(classes.Config, tokenizer_class, exist_ok=True)
    conversion = get_checkpoint_conversion_mapping(backbone.model_type)
    if conversion is not None:
        register_checkpoint_conversion_mapping(backbone.vwn_model_type, conversion, overwrite=True)


for _backbone in BACKBONES.values():
    register_family(_backbone)
