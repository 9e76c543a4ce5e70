"""The table of families: how each one's decoder layer is put together. Adding a family is adding a row."""

import importlib
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType, ModuleType

from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES, SPECIAL_MODEL_TYPE_TO_MODULE_NAME


@dataclass(frozen=True)
class Sublayer:
    """What runs between one read and one write, by the names that the family's layer gives its parts:

        x = norm(input)          output = multiplier · after(sum of module(x) over the modules)

    Args:
        connection: name of the connection around it. A name with "mlp" or "attn" in it would be rewritten by the key
            renaming rules of some families.
        norm: the norm before it; None: the family has none there.
        modules: those of them that a layer has are run on x, and their outputs are summed. So they are alternatives
            where each layer has one, such as full or linear attention.
        attends: whether the modules mix tokens, as attention does; otherwise they are feed-forward blocks or experts.
        after: modules that its output goes through: a norm, a dropout.
        multiplier: the layer's number that its output is scaled by.
        parallel: modules that run on x beside the others; their outputs are added to the state one after another.
        shortcut: module that runs on x too, and whose output the layer's last sublayer adds to the state.
        normed_residual: the layer's number that scales x where the family adds to the normed input, x, rather than to
            the state: output = normed_residual · x + …, and nothing is carried past it at the start.
    """

    connection: str
    norm: str | None
    modules: tuple[str, ...]
    attends: bool = True
    after: tuple[str, ...] = ()
    multiplier: str | None = None
    parallel: tuple[str, ...] = ()
    shortcut: str | None = None
    normed_residual: str | None = None

    @property
    def calls(self) -> tuple[str, ...]:
        """Names of the modules that run on x."""
        return (*self.modules, *self.parallel, *filter(None, [self.shortcut]))

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what every layer must have; of `modules` it needs one."""
        optional = (self.norm, self.multiplier, self.shortcut, self.normed_residual)
        return (*self.after, *self.parallel, *(name for name in optional if name is not None))

    @property
    def formula(self) -> str:
        """What it makes of the state x, with N for norms, A for attention, F for feed-forward blocks and experts."""
        normed = "x" if self.norm is None else "N x"
        letter, joint = ("A", " or ") if self.attends else ("F", " + ")
        module = joint.join([letter, *self.modules[1:]])
        output = f"({module})({normed})" if joint in module else f"{module}({normed})"
        if any("norm" in name for name in self.after):
            output = f"N {output}"
        if self.multiplier:
            output = f"{self.multiplier}·{output}"
        residual = f"{self.normed_residual}·{normed}" if self.normed_residual else "x"
        parallel = f" + F({normed})" * len(self.parallel)
        later = f" (and F({normed}) at the end)" if self.shortcut else ""
        return f"{residual} + {output}{parallel}{later}"


ATTENTION = Sublayer("attention_connection", "input_layernorm", ("self_attn",))
FEED_FORWARD = Sublayer("feed_forward_connection", "post_attention_layernorm", ("mlp",), attends=False)
PLAIN = (ATTENTION, FEED_FORWARD)
# x + norm(module(x))
POST_NORM = (
    replace(ATTENTION, norm=None, after=("post_attention_layernorm",)),
    replace(FEED_FORWARD, norm=None, after=("post_feedforward_layernorm",)),
)
# x + norm(module(norm(x)))
GEMMA_NORMS = (
    replace(ATTENTION, after=("post_attention_layernorm",)),
    replace(FEED_FORWARD, norm="pre_feedforward_layernorm", after=("post_feedforward_layernorm",)),
)
# x + attention(norm(x)) + mlp(norm(x))
PARALLEL = (replace(ATTENTION, connection="parallel_connection", parallel=("mlp",)),)
LINEAR_OR_FULL = (replace(ATTENTION, modules=("self_attn", "linear_attn")), FEED_FORWARD)


def granite(attention: tuple[str, ...] = ("self_attn",), feed_forward: tuple[str, ...] = ("block_sparse_moe",)):
    """x + residual_multiplier · module(norm(x))"""
    return (
        replace(ATTENTION, modules=attention, multiplier="residual_multiplier"),
        replace(FEED_FORWARD, modules=feed_forward, multiplier="residual_multiplier"),
    )


SHARED_EXPERT = ("block_sparse_moe", "shared_mlp")
AFMOE = (
    replace(ATTENTION, after=("post_attention_layernorm",)),
    replace(FEED_FORWARD, norm="pre_mlp_layernorm", after=("post_mlp_layernorm",)),
)
APERTUS = (replace(ATTENTION, norm="attention_layernorm"), replace(FEED_FORWARD, norm="feedforward_layernorm"))
GLM4 = (
    replace(ATTENTION, after=("post_self_attn_layernorm",)),
    replace(FEED_FORWARD, after=("post_mlp_layernorm",)),
)
JETMOE = (replace(ATTENTION, modules=("self_attention",)), FEED_FORWARD)
LFM2 = (
    replace(ATTENTION, norm="operator_norm", modules=("self_attn", "conv")),
    replace(FEED_FORWARD, norm="ffn_norm", modules=("feed_forward",)),
)
LLAMA4 = (ATTENTION, replace(FEED_FORWARD, modules=("feed_forward",)))
# two pairs of sublayers; the experts run beside the first feed-forward block and are added after the second
LONGCAT = (
    Sublayer("first_attention_connection", "input_layernorm.0", ("self_attn.0",)),
    Sublayer("first_feed_forward_connection", "post_attention_layernorm.0", ("mlps.0",), False, shortcut="mlp"),
    Sublayer("second_attention_connection", "input_layernorm.1", ("self_attn.1",)),
    Sublayer("second_feed_forward_connection", "post_attention_layernorm.1", ("mlps.1",), False),
)
# alpha · norm(x) + beta · module(norm(x))
MINIMAX = (
    replace(ATTENTION, normed_residual="attn_alpha_factor", multiplier="attn_beta_factor"),
    replace(FEED_FORWARD, normed_residual="mlp_alpha_factor", multiplier="mlp_beta_factor"),
)
PHI3 = (replace(ATTENTION, after=("resid_attn_dropout",)), replace(FEED_FORWARD, after=("resid_mlp_dropout",)))
GRANITE_SCALES = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
GEMMA_SCALES = ("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping")
MINIMAX_SCALES = tuple(f"{part}_{f}_factor" for part in ("full_attn", "linear_attn", "mlp") for f in ("alpha", "beta"))
ROUTED = ("routed_scaling_factor",)  # of the experts' outputs


@dataclass(frozen=True)
class Backbone:
    """A family of causal language models in transformers, or of a module of yours.

    Args:
        model_type: the family's `model_type`.
        moe: whether its feed-forward blocks are mixtures of experts.
        sublayers: of its decoder layer, in order.
        scales: fields of its config that scale or cap something on a token's way: embedding, residual, attention,
            experts or logits. The family's own code applies them; the tests set each off its default.
        norms: class names that the last norm may have, with the family's prefix or without, if they are torch's.
        embedding_key: name of the embedding's table in its checkpoints.
        last_norm: name of the base model's last norm.
        depth: field of its config that says how many decoder layers there are.
        router_loss_factor: name that the causal language model gives the factor of the router loss.
        requires: (field, value) of its config that this row holds for; any other value is refused.
        module: dotted name of the module that holds its classes, of config and models; None: transformers' own.
        class_prefix: what its class names start with, in `<prefix>Config`, `<prefix>Model`, `<prefix>ForCausalLM`,
            `<prefix>DecoderLayer`; None: as transformers' tables say.
    """

    model_type: str
    moe: bool
    sublayers: tuple[Sublayer, ...] = PLAIN
    scales: tuple[str, ...] = ()
    norms: tuple[str, ...] = ("RMSNorm",)
    embedding_key: str = "model.embed_tokens.weight"
    last_norm: str = "norm"
    depth: str = "num_hidden_layers"
    router_loss_factor: str = "router_aux_loss_coef"
    requires: tuple[tuple[str, object], ...] = ()
    module: str | None = None
    class_prefix: str | None = None

    @property
    def vwn_model_type(self) -> str:
        return f"vwn_{self.model_type}"

    @property
    def prefix(self) -> str:
        """What the family's class names start with: "Olmoe" for OlmoeConfig, OlmoeModel, …"""
        return self.class_prefix or CONFIG_MAPPING_NAMES[self.model_type].removesuffix("Config")

    @property
    def connections(self) -> tuple[str, ...]:
        """Names of the connections in a decoder layer."""
        return tuple(sublayer.connection for sublayer in self.sublayers)

    @property
    def attention_modules(self) -> frozenset[str]:
        """The decoder layer's attributes that mix tokens."""
        return frozenset(name.split(".")[0] for sub in self.sublayers if sub.attends for name in sub.modules)

    @property
    def feed_forward_modules(self) -> frozenset[str]:
        """The decoder layer's attributes that are feed-forward blocks or experts."""
        names = [name for sub in self.sublayers for name in sub.calls]
        return frozenset(name.split(".")[0] for name in names) - self.attention_modules

    @property
    def config_class(self) -> type:
        return self._class(self._import("configuration"), "Config")

    @cached_property
    def modeling(self) -> ModuleType:
        return self._import("modeling")

    def modeling_class(self, suffix: str, default: type | None = None) -> type:
        """The family's class of that role: "Model", "ForCausalLM", "PreTrainedModel", "DecoderLayer", "RMSNorm"."""
        return self._class(self.modeling, suffix, default)

    def _import(self, kind: str) -> ModuleType:
        folder = SPECIAL_MODEL_TYPE_TO_MODULE_NAME.get(self.model_type, self.model_type)
        return importlib.import_module(self.module or f"transformers.models.{folder}.{kind}_{folder}")

    def _class(self, module: ModuleType, suffix: str, default: type | None = None) -> type:
        # the text model of a multimodal family shares some classes with the rest: Gemma3TextModel, Gemma3DecoderLayer
        for prefix in (self.prefix, self.prefix.removesuffix("Text")):
            if hasattr(module, f"{prefix}{suffix}"):
                return getattr(module, f"{prefix}{suffix}")
        if default is not None:
            return default
        raise ValueError(
            f"{module.__name__} has no class {self.prefix}{suffix}, which the row of {self.model_type!r} needs. "
            "Give the row the module and the class_prefix of the family's classes."
        )


_ROWS = (
    # mixtures of experts
    Backbone("afmoe", moe=True, sublayers=AFMOE, scales=("route_scale",)),
    Backbone("aria_text", moe=True),
    Backbone("axk1", moe=True, scales=ROUTED),
    Backbone("bailing_hybrid", moe=True, embedding_key="model.word_embeddings.weight", scales=ROUTED),
    Backbone("cohere2_moe", moe=True, sublayers=PARALLEL, norms=("RMSNorm", "LayerNorm"), scales=("logit_scale",)),
    Backbone("deepseek_v2", moe=True, scales=ROUTED),
    Backbone("deepseek_v3", moe=True, scales=ROUTED),
    Backbone("dots1", moe=True, scales=ROUTED),
    Backbone("ernie4_5_moe", moe=True),
    Backbone("exaone_moe", moe=True, scales=ROUTED),
    Backbone("flex_olmo", moe=True, sublayers=POST_NORM),
    Backbone("glm4_moe", moe=True, scales=ROUTED),
    Backbone("glm4_moe_lite", moe=True, scales=ROUTED),
    Backbone("gpt_oss", moe=True, scales=("swiglu_alpha", "swiglu_limit")),
    Backbone("granitemoe", moe=True, sublayers=granite(), scales=GRANITE_SCALES),
    Backbone(
        "granitemoehybrid", moe=True, sublayers=granite(("self_attn", "mamba"), SHARED_EXPERT), scales=GRANITE_SCALES
    ),
    Backbone("granitemoeshared", moe=True, sublayers=granite(feed_forward=SHARED_EXPERT), scales=GRANITE_SCALES),
    Backbone("hunyuan_v1_moe", moe=True),
    Backbone("hy_v3", moe=True, scales=("router_scaling_factor",)),
    Backbone("jetmoe", moe=True, sublayers=JETMOE, router_loss_factor="aux_loss_coef"),
    Backbone("laguna", moe=True, scales=("moe_routed_scaling_factor", "moe_router_logit_softcapping")),
    Backbone("lfm2_moe", moe=True, sublayers=LFM2, last_norm="embedding_norm", scales=ROUTED),
    Backbone("llama4_text", moe=True, sublayers=LLAMA4, scales=("floor_scale", "attn_scale")),
    Backbone("longcat_flash", moe=True, sublayers=LONGCAT, depth="num_layers", scales=ROUTED),
    Backbone("mellum", moe=True),
    Backbone("mimo_v2_flash", moe=True, scales=("routed_scaling_factor", "attention_value_scale")),
    Backbone("minimax", moe=True, sublayers=MINIMAX, scales=MINIMAX_SCALES),
    Backbone("minimax_m2", moe=True),
    Backbone("mixtral", moe=True),
    Backbone("olmoe", moe=True, scales=("clip_qkv",)),
    Backbone("phimoe", moe=True, norms=("LayerNorm",)),
    Backbone("qwen2_moe", moe=True),
    Backbone("qwen3_5_moe_text", moe=True, sublayers=LINEAR_OR_FULL),
    Backbone("qwen3_moe", moe=True),
    Backbone("qwen3_next", moe=True, sublayers=LINEAR_OR_FULL),
    Backbone("solar_open", moe=True, scales=ROUTED),
    # dense
    Backbone("apertus", moe=False, sublayers=APERTUS),
    Backbone("arcee", moe=False),
    Backbone("cohere", moe=False, sublayers=PARALLEL, norms=("LayerNorm",), scales=("logit_scale",)),
    Backbone("cohere2", moe=False, sublayers=PARALLEL, norms=("LayerNorm",), scales=("logit_scale",)),
    Backbone("ernie4_5", moe=False),
    Backbone("exaone4", moe=False, sublayers=POST_NORM),
    Backbone("gemma", moe=False),
    Backbone("gemma2", moe=False, sublayers=GEMMA_NORMS, scales=GEMMA_SCALES),
    Backbone("gemma3_text", moe=False, sublayers=GEMMA_NORMS, scales=GEMMA_SCALES),
    Backbone("glm", moe=False),
    Backbone("glm4", moe=False, sublayers=GLM4),
    Backbone("granite", moe=False, sublayers=granite(feed_forward=("mlp",)), scales=GRANITE_SCALES),
    Backbone("helium", moe=False),
    Backbone("hunyuan_v1_dense", moe=False),
    Backbone("llama", moe=False),
    Backbone("ministral3", moe=False),
    Backbone("mistral", moe=False),
    Backbone("nemotron", moe=False, norms=("LayerNorm1P",)),
    Backbone("olmo", moe=False, norms=("LayerNorm",), scales=("clip_qkv",)),
    Backbone("olmo2", moe=False, sublayers=POST_NORM),
    Backbone("olmo3", moe=False, sublayers=POST_NORM),
    Backbone("phi3", moe=False, sublayers=PHI3),
    Backbone("qwen2", moe=False),
    Backbone("qwen3", moe=False),
    Backbone("seed_oss", moe=False),
    Backbone("smollm3", moe=False),
    Backbone(
        "stablelm",
        moe=False,
        sublayers=(ATTENTION, replace(FEED_FORWARD, after=("dropout",))),
        norms=("LayerNorm",),
        requires=(("use_parallel_residual", False),),
    ),
    Backbone("starcoder2", moe=False, norms=("LayerNorm",)),
)
_table: dict[str, Backbone] = {}
BACKBONES = MappingProxyType(_table)  # by model_type

NOT_DONE: dict[str, str] = {}  # families that cannot be done, and why
OWN_HYPER_CONNECTIONS = ("deepseek_v4", "glm5_next", "hy_v4", "qwen4_exp")


class _FamilyModule(ModuleType):
    """What transformers finds where it looks for a family's own module: the classes of `modeling_vwn`, on demand."""

    def __getattr__(self, name: str):
        if not name.startswith("Vwn"):
            raise AttributeError(name)
        return getattr(importlib.import_module("vwn_hf.modeling_vwn"), name)


def register_backbone(backbone: Backbone) -> None:
    """Make a family known, to this package and to the Auto classes of transformers. Its classes are built on demand.

    Args:
        backbone: the row; that of a family outside of transformers names its `module` and `class_prefix`.
    Raises:
        ValueError: another row has that model_type already, or transformers has none and the row names no classes.
    """
    if backbone.module is None and backbone.model_type not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"transformers has no model_type {backbone.model_type!r}; give the row the module and class_prefix of the "
            "family's classes."
        )
    if (backbone.module is None) != (backbone.class_prefix is None):
        raise ValueError(
            f"module={backbone.module!r} and class_prefix={backbone.class_prefix!r} of {backbone.model_type!r} go "
            "together: give both, or neither for a family of transformers."
        )
    if _table.setdefault(backbone.model_type, backbone) != backbone:
        raise ValueError(
            f"model_type {backbone.model_type!r} has another row already; give the new family a model_type of its own."
        )
    # AutoConfig copies transformers' table of config names when it is first imported, and reads its copy from then on.
    auto = sys.modules.get("transformers.models.auto.configuration_auto")
    names = CONFIG_MAPPING_NAMES if auto is None else auto.CONFIG_MAPPING_NAMES
    names[backbone.vwn_model_type] = f"Vwn{backbone.prefix}Config"
    name = f"transformers.models.{backbone.vwn_model_type}"
    sys.modules[name] = _FamilyModule(name)


def get_backbone(model_type: str) -> Backbone:
    """The row of a family. Raises ValueError, naming the known ones, for a family that has none."""
    if model_type.startswith("vwn_"):
        raise ValueError(f"{model_type!r} is a VWN model already; give the checkpoint of its backbone.")
    if model_type in OWN_HYPER_CONNECTIONS:
        raise ValueError(f"model_type {model_type!r} has its own hyper-connections; VWN would widen them once more.")
    if model_type in NOT_DONE:
        raise ValueError(f"model_type {model_type!r} cannot be widened: {NOT_DONE[model_type]}")
    if model_type not in BACKBONES:
        raise ValueError(
            f"model_type {model_type!r} is not supported. Supported families: {', '.join(BACKBONES)}. "
            "Another can be added with vwn_hf.register_backbone."
        )
    return BACKBONES[model_type]


for _row in _ROWS:
    register_backbone(_row)
