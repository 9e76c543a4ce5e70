"""VWN models: a family's own classes with three modules replaced.

One token's way (B batch, S sequence, D hidden size, D' = n·d over-width, V vocabulary):

    input_ids [B, S]
       │  model.embed_tokens                      over-width embedding                       [B, S, D']
       │  model.layers[i]                         the family's decoder layer, and around
       │     attention_connection                    its norm + attention at width D          [B, S, D'] -> [B, S, D']
       │     feed_forward_connection                 its norm + MLP or experts at width D     [B, S, D'] -> [B, S, D']
       │  model.norm                              group norm, reduce, the family's norm      [B, S, D]
       │  lm_head                                 the family's                               [B, S, V]
       │  mtp[k]                                  from the state before model.norm: multi_token_prediction.py

Masks, rotary embeddings, cache, attention and expert kernels, router loss and parallel plans are the family's.
The classes of a family, `VwnOlmoeConfig`, `VwnOlmoeModel`, `VwnOlmoeForCausalLM`, …, are made from its row in
`backbones.py` by `build_family` when this module is imported.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
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
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .backbones import BACKBONES, Backbone, Sublayer
from .configuration_vwn import VwnConfigMixin
from .hyper_connections import GeneralizedHyperConnection
from .multi_token_prediction import (
    IGNORED,
    MtpAcceptance,
    MtpCandidateGenerator,
    MultiTokenPredictor,
    StackRecord,
    mtp_targets,
    next_token_labels,
    shift_left,
)
from .over_width import GroupNorm, OverWidthLinear, ProjectedEmbedding, ScaledCopiesEmbedding

CONNECTIONS = ("attention_connection", "feed_forward_connection")
MTP_NOT_TRAINED = (
    "This step does not train the multi-token prediction modules: their loss is computed where the causal language "
    "model is called with `labels`, and it was not. If that is intended, set num_mtp_layers=0. trl's SFTTrainer "
    "computes its loss outside of the model: derive a trainer from vwn_hf.VwnTrainerMixin and SFTTrainer."
)


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

    def __call__(self, hidden_states: Tensor, *args, mtp_record: StackRecord | None = None, **kwargs) -> Tensor:
        # here and not in `forward`, so that it stands outside of activation checkpointing's recomputation
        output = super().__call__(hidden_states, *args, **kwargs)
        if mtp_record is not None:
            mtp_record.add(hidden_states, output, kwargs)
        return output

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
        elif config.vwn_embedding == "scaled_copies":
            self.embed_tokens = ScaledCopiesEmbedding(
                config.vocab_size, config.hidden_size, config.vwn_segments, config.vwn_slots, self.padding_idx
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
        """The family's forward. `inputs_embeds` is D' wide, or as wide as the embedding's table."""
        if self.config.num_mtp_layers and self.training and torch.is_grad_enabled() and "mtp_record" not in kwargs:
            warnings.warn(MTP_NOT_TRAINED, stacklevel=2)
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
        if width == config.table_width:
            return self.embed_tokens.widen(inputs_embeds)
        rule = f"vwn_slots · hidden_size / vwn_segments = {config.virtual_width}"
        if config.vwn_embedding != "direct":
            name = "hidden_size" if config.vwn_embedding_rank is None else "vwn_embedding_rank"
            rule += f", or {name} = {config.table_width}"
        raise ValueError(
            f"inputs_embeds is {width} wide; this model takes {rule}. Make them with model.get_input_embeddings()."
        )


class VwnCausalLMMixin(VwnPreTrainedMixin):
    """A family's causal language model over its VWN base model, and its modules of multi-token prediction.

    Attributes:
        mtp: the modules, if `num_mtp_layers` is not 0.
        mtp_acceptance: how far drafts were accepted in the last `generate(use_mtp=True)`.
    """

    mtp_acceptance: MtpAcceptance | None = None

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
        if config.num_mtp_layers:
            self.mtp = nn.ModuleList(self.new_mtp_module(config) for _ in range(config.num_mtp_layers))
        self.post_init()

    def new_mtp_module(self, config) -> MultiTokenPredictor:
        """A module whose decoder layer is like the stack's last; its attention keeps a cache of its own."""
        layer = type(self.model.layers[-1])(config, config.num_hidden_layers - 1)
        getattr(layer, self.backbone.attention.module).layer_idx = 0
        norm = type(self.model.norm)(config.hidden_size, eps=self.model.norm.variance_epsilon)
        norm.add_reduce(config)
        return MultiTokenPredictor(layer, norm, config.slot_width, config.vwn_slots, config.vwn_norm_eps)

    def mtp_losses(
        self,
        record: StackRecord,
        next_tokens: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Loss of each MTP module, [K]; entry k-1 is of the token k + 1 further on (k = 1: next-2-token loss).

        Args:
            record: of the pass through the decoder layers.
            next_tokens: [B, S], label of the next token at each position, -100 where it is ignored.
            num_items_in_batch: what the sum over targets is divided by in training, as in the next-token loss.
                Without it, and in evaluation, each loss is the mean over its own targets.
        """
        arguments, state, losses = record.arguments_without_cache, record.state, []
        items = num_items_in_batch if self.training else None
        for depth, module in enumerate(self.mtp, start=1):
            targets = mtp_targets(next_tokens, depth, arguments.get("position_ids"), attention_mask)
            state, hidden_states = module(state, shift_left(record.embedding, depth), **arguments)
            loss = self.loss_function(
                logits=self.lm_head(hidden_states),
                labels=None,
                vocab_size=self.config.vocab_size,
                shift_labels=targets,
                num_items_in_batch=(targets != IGNORED).sum().clamp(min=1) if items is None else items,
            )
            losses.append(loss)
        return torch.stack(losses)

    @contextmanager
    def router_logits_of_mtp(self) -> Iterator[list[Tensor]]:
        """Collects what the routers in the MTP modules give, [B·S, experts] each; nothing in a family without."""
        recorder = (type(self)._can_record_outputs or {}).get("router_logits")
        logits, hooks = [], []
        if isinstance(recorder, OutputRecorder):
            routers = [module for module in self.mtp.modules() if isinstance(module, recorder.target_class)]
            hooks = [
                router.register_forward_hook(lambda module, inputs, output: logits.append(output[recorder.index]))
                for router in routers
            ]
        try:
            yield logits
        finally:
            for hook in hooks:
                hook.remove()

    def router_loss(self, router_logits: list[Tensor], attention_mask: Tensor | None) -> Tensor:
        """The family's load balancing loss of these routers."""
        family_loss = self.backbone.modeling.load_balancing_loss_func
        return family_loss(tuple(router_logits), self.num_experts, self.num_experts_per_tok, attention_mask)

    def _get_candidate_generator(self, generation_config, *, logits_processor, model_kwargs, **kwargs):
        # transformers' own MTP generator reads the modules from disk again and knows no over-width state
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(
                generation_config=generation_config,
                logits_processor=logits_processor,
                model_kwargs=model_kwargs,
                **kwargs,
            )
        if not self.config.num_mtp_layers:
            raise ValueError(
                "use_mtp=True, but this model has no MTP modules (num_mtp_layers=0). Train one with num_mtp_layers, or "
                "upcycle with mtp_layers, to draft with them; leave use_mtp out to generate without."
            )
        if model_kwargs["past_key_values"].get_seq_length():
            raise ValueError(
                "use_mtp=True with past_key_values that hold tokens already: transformers' assisted generation reads "
                "the whole prompt again on top of them. Leave past_key_values or use_mtp out."
            )
        generator = MtpCandidateGenerator(self, logits_processor, generation_config.do_sample)
        self.mtp_acceptance = generator.acceptance
        return generator


def forward_with_mtp(family_forward: Callable) -> Callable:
    """A causal language model's forward that also computes the losses of multi-token prediction where it has labels.

    The output gets `mtp_losses` [K]. In training, `loss` is the family's loss + mtp_loss_weight · their mean (+ the
    router loss of the modules' experts, where the family's loss has one); in evaluation it is the family's loss alone,
    so that perplexities are those of the next token.
    """
    names = list(inspect.signature(family_forward).parameters)[1:]

    @can_return_tuple
    @wraps(family_forward)
    def forward(self, *args, **kwargs):
        kwargs.update(zip(names, args, strict=False))
        labels = kwargs.get("labels")
        if labels is None or not self.config.num_mtp_layers or kwargs.get("past_key_values") is not None:
            return family_forward(self, **kwargs)
        record, next_tokens = StackRecord(), kwargs.get("shift_labels")
        outputs = family_forward(self, **{**kwargs, "mtp_record": record, "return_dict": True})
        with self.router_logits_of_mtp() as router_logits:
            losses = self.mtp_losses(
                record,
                next_token_labels(labels) if next_tokens is None else next_tokens,
                kwargs.get("attention_mask"),
                kwargs.get("num_items_in_batch"),
            )
        if self.training:
            outputs["loss"] = outputs["loss"] + self.config.mtp_loss_weight * losses.mean()
            if outputs.get("aux_loss") is not None:
                balance = self.router_loss(router_logits, kwargs.get("attention_mask"))
                outputs["loss"] = outputs["loss"] + self.router_aux_loss_coef * balance
        return OUTPUTS_WITH_MTP[type(outputs)](**outputs, mtp_losses=losses)

    return forward


@dataclass
class VwnCausalLMOutputWithPast(CausalLMOutputWithPast):
    """transformers' output, and the loss of each MTP module, `mtp_losses` [K]."""

    mtp_losses: Tensor | None = None


@dataclass
class VwnMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """transformers' output, and the loss of each MTP module, `mtp_losses` [K]."""

    mtp_losses: Tensor | None = None


OUTPUTS_WITH_MTP = {
    CausalLMOutputWithPast: VwnCausalLMOutputWithPast,
    MoeCausalLMOutputWithPast: VwnMoeCausalLMOutputWithPast,
}


@cache
def build_family(backbone: Backbone) -> SimpleNamespace:
    """The VWN classes of a family: Config, DecoderLayer, Norm, Model, ForCausalLM."""
    family, prefix = backbone.modeling_class, f"Vwn{backbone.prefix}"
    config = strict(
        _subclass(
            f"{prefix}Config",
            VwnConfigMixin,
            backbone.config_class,
            model_type=backbone.vwn_model_type,
            keys_to_ignore_at_inference=[*backbone.config_class.keys_to_ignore_at_inference, "mtp_losses"],
        )
    )
    layer = _subclass(f"{prefix}DecoderLayer", VwnDecoderLayerMixin, family("DecoderLayer"), backbone=backbone)
    norm = _subclass(f"{prefix}RMSNorm", VwnNormMixin, family("RMSNorm"))
    shared = {
        "backbone": backbone,
        "config_class": config,
        "_no_split_modules": [layer.__name__],
        "_keep_in_fp32_modules_strict": {*(family("PreTrainedModel")._keep_in_fp32_modules_strict or ()), *CONNECTIONS},
    }
    model = _subclass(
        f"{prefix}Model", VwnModelMixin, family("Model"), **shared, _keys_to_ignore_on_load_unexpected=[r"^mtp\."]
    )
    causal_lm = _subclass(
        f"{prefix}ForCausalLM",
        VwnCausalLMMixin,
        family("ForCausalLM"),
        **shared,
        forward=forward_with_mtp(family("ForCausalLM").forward),
    )
    return SimpleNamespace(Config=config, DecoderLayer=layer, Norm=norm, Model=model, ForCausalLM=causal_lm)


def _subclass(name: str, mixin: type, family_class: type, **attributes) -> type:
    """A class of this module, so that pickle and multi-process launchers find it by name."""
    made = type(name, (mixin, family_class), {"__module__": __name__, "__doc__": mixin.__doc__, **attributes})
    globals()[name] = made
    return made


def added_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that VWN added to the backbone's: all but the backbone's own modules and the table.

    Connections, reduce, group norm, what widens a D wide table, and prediction modules (`mtp.`), in the model's
    order. The direct table is one tensor, so it counts as the backbone's. Of a plain backbone: none.
    """
    modules = [module for module in model.modules() if hasattr(module, "initial_values")]
    added = {parameter for module in modules for parameter in module.parameters(recurse=False)}
    return [name for name, parameter in model.named_parameters() if parameter in added or "mtp" in name.split(".")]


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
