"""Quantized checkpoints: stored names are accounted for, and what VWN added is not taken for quantized."""

import json
import sys

import pytest
import torch
from conftest import SHARED
from quantized_sources import (
    AWQ,
    COMPRESSED,
    FP8,
    GPTQ,
    INT8,
    MXFP4,
    NF4,
    make_awq_source,
    make_compressed_source,
    make_fp8_source,
    make_gptq_source,
    make_int8_source,
    make_mxfp4_source,
    make_nf4_source,
)
from safetensors.torch import load_file, save_file
from tiny_families import TINY
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from vwn_hf import upcycle
from vwn_hf.modeling_vwn import last_attention_layer
from vwn_hf.over_width import OverWidthLinear
from vwn_hf.quantization import (
    METHODS,
    added_linear_modules,
    default_skips,
    fold,
    loading_arguments,
    why_it_cannot_run,
    widened_quantization_config,
)
from vwn_hf.widening import Widening, number_of_layers, widen_config

MAKERS = [
    make_fp8_source, make_mxfp4_source, make_gptq_source, make_awq_source, make_nf4_source, make_int8_source,
    make_compressed_source,
]  # fmt: skip


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def read_raw(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def widen(source, output, **options):
    """Upcycle, and give the connections' scales any values, so that names that are taken for others show."""
    upcycle(source, output, group_norm=False, **options)
    for file in output.glob("*.safetensors"):
        tensors, generator = load_file(file), torch.Generator().manual_seed(0)
        for name in (name for name in tensors if name.endswith(".scale")):
            tensors[name] = torch.randn(tensors[name].shape, generator=generator)
        save_file(tensors, file, metadata={"format": "pt"})
    return output


def stored_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def load(folder, **kwargs):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def aligned_logits(model, tokens):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model(tokens).logits


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_stored_names_fold_to_the_models(make, tmp_path):
    stored = load_file(make(tmp_path) / "model.safetensors")
    config = AutoConfig.from_pretrained(tmp_path)
    quant_method = config.quantization_config["quant_method"]
    del config.quantization_config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    plain = set(load_file(tmp_path / "plain" / "model.safetensors"))
    assert {fold(quant_method)(name) for name in stored} == plain and set(stored) != plain
    assert {fold(quant_method)(name) for name in plain} == plain
    assert {fold(None)(name) for name in stored} == set(stored)


@pytest.mark.parametrize(
    ("quant_method", "name", "weight"),
    [
        ("fp8", "model.layers.0.mlp.experts.gate_up_proj_scale_inv", "model.layers.0.mlp.experts.gate_up_proj"),
        ("fp8", "model.layers.0.mlp.up_proj.activation_scale", "model.layers.0.mlp.up_proj.weight"),
        ("fp8", "mtp.0.layer.mlp.up_proj.weight_scale_inv", "mtp.0.layer.mlp.up_proj.weight"),
        ("fp8", "model.layers.0.attention_connection.read.scale", "model.layers.0.attention_connection.read.scale"),
        ("mxfp4", "model.layers.0.mlp.experts.down_proj_bias", "model.layers.0.mlp.experts.down_proj_bias"),
        ("gptq", "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("bitsandbytes", "m.weight.quant_state.bitsandbytes__fp4", "m.weight"),
        ("compressed-tensors", "m.weight_global_scale", "m.weight"),
    ],
)
def test_names_that_the_sources_lack_fold_too(quant_method, name, weight):
    assert fold(quant_method)(name) == weight


MTP = ["model.norm.reduce", "mtp.0.mixing", "mtp.0.norm.reduce"]
ADDED = ["norm.reduce", "mtp.0.mixing", "mtp.0.norm.reduce"]


@pytest.mark.parametrize(
    ("raw", "field", "expected"),
    [
        (FP8, "modules_to_not_convert", ["lm_head", *ADDED]),
        (FP8 | {"modules_to_not_convert": []}, "modules_to_not_convert", ADDED),
        (FP8 | {"ignored_layers": ["gate"]}, "ignored_layers", ["gate", *ADDED]),
        (
            FP8 | {"modules_to_not_convert": ["model.layers.11.mlp.gate", "model.layers.1.mlp.gate", "layers.1"]},
            "modules_to_not_convert",
            [
                "model.layers.11.mlp.gate", "model.layers.1.mlp.gate", "layers.1", "mtp.0.layer.mlp.gate",
                "mtp.0.layer", *ADDED,
            ],
        ),
        (
            MXFP4,
            "modules_to_not_convert",
            [
                *MXFP4["modules_to_not_convert"], "mtp.0.layer.self_attn", "mtp.0.layer.mlp.router", *ADDED,
            ],
        ),
        (AWQ, "modules_to_not_convert", ["lm_head", *ADDED]),
        (AWQ | {"modules_to_not_convert": ["mlp.gate"]}, "modules_to_not_convert", ["mlp.gate", "lm_head", *ADDED]),
        (NF4, "llm_int8_skip_modules", ["lm_head", *ADDED]),
        (INT8 | {"llm_int8_skip_modules": ["o_proj"]}, "llm_int8_skip_modules", ["o_proj", *ADDED]),
        (COMPRESSED, "ignore", ["lm_head", *(f"re:(.*\\.)?{name}$" for name in ADDED)]),
    ],
)  # fmt: skip
def test_added_modules_are_listed_and_the_rest_stays(raw, field, expected):
    before = json.dumps(raw)
    widened = widened_quantization_config(raw, MTP, ["lm_head"], mtp_layer=1)
    assert widened[field] == expected
    assert {k: v for k, v in widened.items() if k != field} == {k: v for k, v in raw.items() if k != field}
    assert json.dumps(raw) == before


def test_gptq_lists_nothing():
    assert widened_quantization_config(GPTQ, ["model.norm.reduce"]) == GPTQ


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"quant_method": "quark"}, "'quark' are not supported. Supported: fp8, mxfp4, .*Give the checkpoint it was"),
        ({}, "None are not supported"),
        (FP8 | {"modules_to_convert": ["embed_tokens"]}, "embeddings are quantized.*Give the checkpoint it was"),
        (GPTQ, "gptq checkpoint is converted in its decoder layers alone.*mtp_layers=0"),
    ],
)
def test_what_cannot_be_said_is_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        widened_quantization_config(raw, MTP)


def converted(model, raw, quantized_as):
    """Names of the linear layers that a quantizer converts which, like AWQ's, takes subclasses of nn.Linear too."""
    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config.from_dict(raw))
    if quantized_as == "fp8":  # names of a released checkpoint become those of the model
        quantizer._normalize_modules_to_not_convert(model)
    skips = quantizer.get_modules_to_not_convert(
        model,
        quantizer.quantization_config.modules_to_not_convert,
        model._keep_in_fp32_modules,
        add_default_skips=METHODS[quantized_as].defaults == "always",
    )
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name for name in linear if should_convert_module(name, skips)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", TINY)
def test_what_the_source_converts_is_converted_and_in_mtp_modules_again(family, tied):
    overrides = {"hidden_size": 32, **TINY[family], "tie_word_embeddings": tied}
    config = AutoConfig.for_model(family, **{**SHARED, **overrides})
    vwn_config = widen_config(config, Widening(embedding="projected", mtp_layers=1))
    source, model, defaults = on_meta(config), on_meta(vwn_config), default_skips(config)
    last, added = last_attention_layer(config, number_of_layers(config)), added_linear_modules(model)
    assert {"mtp.0.mixing", "model.embed_tokens.expansion"} <= set(added) and len(added) == 4
    assert not any(type(model.get_submodule(name)) is nn.Linear for name in added)  # all that GPTQ and others convert
    for raw in (FP8, AWQ, FP8 | {"modules_to_not_convert": ["lm_head", f"model.layers.{last}.self_attn"]}):
        widened = widened_quantization_config(raw, added, defaults, mtp_layer=last)
        expected = converted(source, raw, raw["quant_method"])
        prefix = f"model.layers.{last}."
        copies = {f"mtp.0.layer.{name.removeprefix(prefix)}" for name in expected if name.startswith(prefix)}
        assert converted(model, widened, raw["quant_method"]) == expected | copies
        base = {name.removeprefix("model.") for name in added}
        assert not converted(model.model, widened, raw["quant_method"]) & base


@pytest.mark.parametrize("options", [{}, {"embedding": "projected"}, {"mtp_layers": 1, "slots": 6}], ids=str)
@pytest.mark.parametrize("make", [make_fp8_source, make_mxfp4_source], ids=lambda make: make.__name__)
def test_a_dequantized_checkpoint_has_the_sources_logits(make, options, tmp_path, tokens):
    source = make(tmp_path / "source")
    output = widen(source, tmp_path / "vwn", **options)
    for arguments in ({}, loading_arguments(read_raw(output))):
        model = load(output, **arguments)
        expected = aligned_logits(load(source), tokens)
        assert expected.isfinite().all() and expected.std() > 0
        assert torch.equal(aligned_logits(model, tokens), expected)
    stored = stored_tensors(output)
    for name, parameter in model.named_parameters():
        if "_connection." in name:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, stored[name]), name
    for name in added_linear_modules(model):
        weight = model.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, stored[f"{name}.weight"]), name
    assert type(model.model.norm.reduce) is OverWidthLinear
    for module in getattr(model, "mtp", []):
        copied = model.model.layers[model.mtp_source_layer].state_dict()
        assert all(torch.equal(module.layer.state_dict()[k], v) for k, v in copied.items() if "_connection" not in k)


def test_kept_in_fp8_it_converts_the_layers_alone_and_saves_what_it_loaded(tmp_path, monkeypatch):
    """As on a GPU: modules are replaced by those of transformers' kernels, which the CPU can hold but not run."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, **kwargs: None)
    output = widen(make_fp8_source(tmp_path / "source"), tmp_path / "vwn", mtp_layers=1)
    model = load(output)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["model.layers.1.self_attn.o_proj"] == kinds["mtp.0.layer.self_attn.o_proj"] == "FP8Linear"
    assert kinds["model.layers.1.mlp.experts"] == kinds["mtp.0.layer.mlp.experts"] == "FP8Experts"
    assert kinds["lm_head"] == "Linear" and kinds["mtp.0.mixing"] == "SlotMixing"
    assert kinds["model.norm.reduce"] == kinds["mtp.0.norm.reduce"] == "OverWidthLinear"
    model.save_pretrained(tmp_path / "again")
    stored, again = (stored_tensors(folder) for folder in (output, tmp_path / "again"))
    assert set(again) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(again[name].float(), tensor.float()), name
        assert again[name].dtype == tensor.dtype or tensor.dtype == torch.bfloat16, name
    assert read_raw(tmp_path / "again")["modules_to_not_convert"] == read_raw(output)["modules_to_not_convert"]


@pytest.mark.parametrize("raw", [FP8, MXFP4], ids=lambda raw: raw["quant_method"])
def test_what_is_dequantized_can_run(raw):
    assert why_it_cannot_run(raw) is None
    assert loading_arguments(raw)["quantization_config"].dequantize and loading_arguments(None) == {}
    assert loading_arguments(GPTQ) == {}


@pytest.mark.parametrize(("rows", "runs"), [(512, True), (576, False)])
def test_a_part_of_a_block_cannot_be_dequantized(rows, runs):
    shapes = {"model.norm.weight": [7168], "m.weight": [rows, 7168], "m.weight_scale_inv": [-(-rows // 128), 56]}
    reason = why_it_cannot_run(FP8, shapes)
    assert (reason is None) == runs and (runs or "m.weight [576, 7168] ends in a part" in reason)


@pytest.mark.parametrize(
    ("raw", "file", "check", "package"),
    [
        (GPTQ, "gptq", "is_optimum_available", "optimum"),
        (AWQ, "awq", "is_gptqmodel_available", "gptqmodel"),
        (NF4, "bnb_4bit", "is_bitsandbytes_available", "bitsandbytes"),
        (INT8, "bnb_8bit", "is_bitsandbytes_available", "bitsandbytes"),
    ],
)
def test_a_missing_package_is_named(raw, file, check, package, monkeypatch):
    monkeypatch.setattr(f"transformers.quantizers.quantizer_{file}.{check}", lambda *args, **kwargs: False)
    reason = why_it_cannot_run(raw)
    assert f"cannot run {raw['quant_method']} checkpoints on this machine: " in reason and package in reason


def test_missing_compressed_tensors_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert "compressed" in why_it_cannot_run(COMPRESSED)


def test_a_method_unknown_to_transformers_cannot_run():
    assert "Unknown quantization type" in why_it_cannot_run({"quant_method": "nothing"})
