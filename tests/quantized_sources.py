"""Tiny quantized checkpoints, made on the spot with the tensors, names, dtypes and config that released ones have.

Each maker writes config.json and model.safetensors into a folder and returns it. Weights are random.
"""

import json
from pathlib import Path

import torch
from conftest import SHARED, randomize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False,
    "damp_percent": 0.01, "true_sequential": True, "checkpoint_format": "gptq",
}  # fmt: skip
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "backend": "autoawq",
    "modules_to_not_convert": None,
}  # fmt: skip
NF4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
    "_load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_threshold": 6.0,
}  # fmt: skip
INT8 = {**NF4, "load_in_4bit": False, "_load_in_4bit": False, "load_in_8bit": True, "_load_in_8bit": True}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"], "input_activations": None, "output_activations": None,
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
                "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
            },
        }
    },
}  # fmt: skip

# The sizes of MLA make [128, 128] blocks of every weight, as transformers asks of what it dequantizes.
DEEPSEEK_V3 = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 3,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 128, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
GPT_OSS = {
    "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "rope_scaling": None,
}  # fmt: skip
LLAMA = {"hidden_size": 64, "intermediate_size": 128}


def make_fp8_source(folder: Path, **changes) -> Path:
    """DeepSeek-V3's: experts one by one, `weight_scale_inv` [out/128, in/128] beside each float8 weight."""
    tensors, config = start(folder, "deepseek_v3", DEEPSEEK_V3)
    for name in linear_weights(tensors, besides=(".gate.weight",)):
        weight = tensors[name].float()
        blocks = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))  # [out/128, 128, in/128, 128]
        scale = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        tensors[name] = (blocks / scale).reshape(weight.shape).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
    return write(folder, tensors, config, FP8 | changes)


def make_mxfp4_source(folder: Path, **changes) -> Path:
    """GPT-OSS's: of the experts, `_blocks` [E, out, in/32, 16], two values a byte, and `_scales` [E, out, in/32]."""
    tensors, config = start(folder, "gpt_oss", GPT_OSS)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        exponents = torch.randint(122, 126, shape[:-1], dtype=torch.uint8, generator=generator)  # of 2, less 127
        tensors[f"{name}_scales"] = exponents
    return write(folder, tensors, config, MXFP4 | changes)


def make_gptq_source(folder: Path, **changes) -> Path:
    """`qweight` [in/8, out] packed along the inputs, `qzeros` [in/32, out/8], `scales` [in/32, out], `g_idx` [in]."""
    tensors, config = start(folder, "llama", LLAMA)
    for name in linear_weights(tensors):
        values, scales = four_bits(tensors.pop(name))
        module, groups = name.removesuffix(".weight"), torch.arange(len(values)) // 32
        tensors[f"{module}.qweight"] = packed(values.T, range(8)).T.contiguous()
        tensors[f"{module}.qzeros"] = packed(torch.full(scales.shape, 7), range(8))  # zero point 8, stored less 1
        tensors[f"{module}.scales"] = scales.half()
        tensors[f"{module}.g_idx"] = groups.int()
    return write(folder, tensors, config, GPTQ | changes)


def make_awq_source(folder: Path, **changes) -> Path:
    """`qweight` [in, out/8] packed along the outputs in AWQ's order, `qzeros` [in/32, out/8], `scales` [in/32, out]."""
    tensors, config = start(folder, "llama", LLAMA)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    for name in linear_weights(tensors):
        values, scales = four_bits(tensors.pop(name))
        module = name.removesuffix(".weight")
        tensors[f"{module}.qweight"] = packed(values, order)
        tensors[f"{module}.qzeros"] = packed(torch.full(scales.shape, 8), order)
        tensors[f"{module}.scales"] = scales.half()
    return write(folder, tensors, config, AWQ | changes)


def make_nf4_source(folder: Path, **changes) -> Path:
    """bitsandbytes' 4 bits: `weight` [in·out/2, 1], and beside it the scales of 64 values, quantized once more."""
    tensors, config = start(folder, "llama", LLAMA)
    for name in linear_weights(tensors):
        weight = tensors[name].float()
        blocks = weight.reshape(-1, 64)
        scales = blocks.abs().amax(1)  # [in·out/64]
        values = (blocks / scales[:, None]).flatten()[:, None].sub(NF4_VALUES).abs().argmin(1)
        offset, linear = scales.mean(), torch.linspace(-1, 1, 256)
        nested = (scales - offset).abs().amax()
        state = {
            "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape),
            "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item(),
        }  # fmt: skip
        tensors[name] = (values[0::2] * 16 + values[1::2]).to(torch.uint8)[:, None]
        tensors |= {
            f"{name}.absmax": ((scales - offset) / nested)[:, None].sub(linear).abs().argmin(1).to(torch.uint8),
            f"{name}.quant_map": NF4_VALUES.clone(),
            f"{name}.nested_absmax": nested.expand(-(-len(scales) // 256)).contiguous(),
            f"{name}.nested_quant_map": linear,
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }
    return write(folder, tensors, config, NF4 | changes)


def make_int8_source(folder: Path, **changes) -> Path:
    """bitsandbytes' 8 bits: int8 `weight`, `SCB` [out], the largest value of each row, and `weight_format`."""
    tensors, config = start(folder, "llama", LLAMA)
    for name in linear_weights(tensors):
        weight = tensors[name].float()
        largest = weight.abs().amax(1)
        tensors[name] = (weight / largest[:, None] * 127).round().to(torch.int8)
        tensors[name.replace(".weight", ".SCB")] = largest
        tensors[name.replace(".weight", ".weight_format")] = torch.tensor(0, dtype=torch.uint8)
    return write(folder, tensors, config, INT8 | changes)


def make_compressed_source(folder: Path, **changes) -> Path:
    """compressed-tensors, 4 bits: `weight_packed` [out, in/8], `weight_scale` [out, in/32], `weight_shape` [2]."""
    tensors, config = start(folder, "llama", LLAMA)
    for name in linear_weights(tensors):
        shape = tensors[name].shape
        values, scales = four_bits(tensors.pop(name))
        tensors[f"{name}_packed"] = packed(values.T, range(8))
        tensors[f"{name}_scale"] = scales.T.bfloat16().contiguous()
        tensors[f"{name}_shape"] = torch.tensor(shape)
    return write(folder, tensors, config, COMPRESSED | changes)


# bitsandbytes.functional.get_4bit_type("nf4"); source of the values: arXiv:2305.14314, appendix E.
NF4_VALUES = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def start(folder: Path, family: str, fields: dict) -> tuple[dict[str, Tensor], dict]:
    """Tensors, by the names they are released with, and config.json of a random bfloat16 model."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHARED, **fields}))
    randomize(model).bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    return tensors, json.loads((folder / "config.json").read_text())


def linear_weights(tensors: dict[str, Tensor], besides: tuple[str, ...] = ()) -> list[str]:
    """Names of the weights in the layers that are quantized: [out, in], and none of the embedding or the head."""
    names = [name for name, tensor in tensors.items() if name.startswith("model.layers.") and tensor.dim() == 2]
    return [name for name in names if not name.endswith(besides)] if besides else names


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> values 0 to 15 about 8 [in, out], and scales of 32 inputs [in/32, out]."""
    groups = weight.float().T.unflatten(0, (-1, 32))  # [in/32, 32, out]
    scales = groups.abs().amax(1, keepdim=True) / 7
    return ((groups / scales).round() + 8).flatten(0, 1).long(), scales.squeeze(1)


def packed(values: Tensor, order) -> Tensor:
    """[rows, columns] of 4 bits -> int32 [rows, columns/8]; `order`: which of 8 columns comes first, lowest bits."""
    eights = values.long().unflatten(1, (-1, 8))[..., list(order)]
    numbers = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(numbers >= 2**31, numbers - 2**32, numbers).int()


def write(folder: Path, tensors: dict[str, Tensor], config: dict, quantization: dict) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}, indent=2))
    return folder
