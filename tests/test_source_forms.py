"""Every form of a source: carried over exactly, each of its tensors once, or refused with a message that says why."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from quantized_sources import (
    make_awq_source,
    make_compressed_source,
    make_fp8_source,
    make_gptq_source,
    make_int8_source,
    make_mxfp4_source,
    make_nf4_source,
)
from safetensors.torch import load_file, save_file

from vwn_hf import CheckpointError, upcycle
from vwn_hf.checkpoints import open_checkpoint


def plain(folder: Path, dtype=torch.float32, family="olmoe", shards=None, **overrides):
    model = tiny_model(family, **overrides).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))


def pickled(folder: Path, shards: int = 1):
    """As transformers before 4.35 saved it."""
    plain(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"pytorch_model-{n:05d}-of-{shards:05d}.bin" for n in range(1, shards + 1)]
    files = files if shards > 1 else ["pytorch_model.bin"]
    weight_map = {name: files[number % shards] for number, name in enumerate(tensors)}
    for file in files:
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def with_tensors(folder: Path, family="olmoe", **extra):
    plain(folder, family=family)
    tensors = load_file(folder / "model.safetensors") | {name.replace("__", "."): t for name, t in extra.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def stored_as(folder: Path, dtype: torch.dtype):
    """Weights in a dtype that the config does not say: they are converted when the model is loaded."""
    plain(folder, torch.bfloat16)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


EXTRA = torch.zeros(3)
EXACT, BYTES = ("logits", True), ("bytes", None)
FORMS = {  # name: how it is made, options of upcycle, level and equality of logits, or the message
    "one file": (plain, {}, EXACT),
    "shards": (lambda f: plain(f, shards="40KB"), {}, EXACT),
    "bfloat16": (lambda f: plain(f, torch.bfloat16), {}, EXACT),
    "float16": (lambda f: plain(f, torch.float16), {}, EXACT),
    "float8": (lambda f: stored_as(f, torch.float8_e4m3fn), {}, EXACT),
    "float8, e5m2": (lambda f: stored_as(f, torch.float8_e5m2), {}, EXACT),
    "float8, copies": (lambda f: stored_as(f, torch.float8_e4m3fn), {"slot_start": "copies"}, EXACT),
    "tied": (lambda f: plain(f, tie_word_embeddings=True), {}, EXACT),
    "tied, direct": (lambda f: plain(f, tie_word_embeddings=True), {"embedding": "direct"}, EXACT),
    "fp8 layout": (make_fp8_source, {}, EXACT),
    "fp8 layout, MTP added": (make_fp8_source, {"mtp_layers": 1}, EXACT),
    "mxfp4 layout": (make_mxfp4_source, {}, EXACT),
    "gptq layout": (make_gptq_source, {}, BYTES),
    "gptq layout, logits": (make_gptq_source, {"verify": "logits"}, "only checkpoints quantized by fp8 and mxfp4"),
    "gptq layout, MTP added": (make_gptq_source, {"mtp_layers": 1}, "Use mtp_layers=0"),
    "awq layout": (make_awq_source, {}, BYTES),
    "bitsandbytes, 4 bits": (make_nf4_source, {}, BYTES),
    "bitsandbytes, 8 bits": (make_int8_source, {}, BYTES),
    "compressed-tensors": (make_compressed_source, {}, BYTES),
    "another quantization": (
        lambda f: make_awq_source(f, quant_method="quark"), {}, "'quark' are not supported. Supported: fp8.*Give the"
    ),
    ".bin": (pickled, {}, r"only pytorch_model.bin, which is a pickle.*--allow-pickle"),
    ".bin, allowed": (pickled, {"allow_pickle": True}, EXACT),
    ".bin shards, allowed": (lambda f: pickled(f, 3), {"allow_pickle": True}, EXACT),
    "MTP of its own": (lambda f: with_tensors(f, mtp__fc__weight=EXTRA), {}, "mtp.fc.weight.*--drop-source-mtp"),
    "MTP of its own, dropped": (
        lambda f: with_tensors(f, "deepseek_v3", model__layers__3__eh_proj__weight=EXTRA),
        {"drop_source_mtp": True},
        EXACT,
    ),
    "unknown tensor": (lambda f: with_tensors(f, vision_tower__patch=EXTRA), {}, r"no place for: vision_tower.*--drop"),
    "unknown tensor, dropped": (
        lambda f: with_tensors(f, vision_tower__patch=EXTRA), {"drop": ["vision_tower.*"]}, EXACT
    ),
    "a pattern for nothing": (plain, {"drop": ["vision_tower.*"]}, "'vision_tower.*' matches no tensor"),
    "a needed tensor dropped": (plain, {"drop": ["*q_proj*"]}, "no tensors for model.layers.0.self_attn.q_proj.weight"),
    "a buffer that is computed": (
        lambda f: with_tensors(f, "mixtral", model__layers__0__self_attn__rotary_emb__inv_freq=EXTRA), {}, EXACT
    ),
    "a buffer that is computed, MTP added": (
        lambda f: with_tensors(f, "mixtral", model__layers__1__self_attn__rotary_emb__inv_freq=EXTRA),
        {"mtp_layers": 1},
        EXACT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_exact_or_refused(form, tmp_path):
    make, options, outcome = FORMS[form]
    source, output = tmp_path / "source", tmp_path / "vwn"
    make(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    if isinstance(outcome, str):
        with pytest.raises((CheckpointError, ValueError), match=outcome):
            upcycle(source, output, group_norm=False, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
    else:
        report = upcycle(source, output, group_norm=False, **options)
        assert (report.verification.level, report.logits_equal) == outcome
        check_every_tensor_once(source, output, report)
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}


def check_every_tensor_once(source: Path, output: Path, report) -> None:
    """Byte for byte in the output under its name, or widened, or named as dropped, with a reason."""
    old, new = open_checkpoint(source, allow_pickle=True), open_checkpoint(output)
    for name in old.tensors:
        if name in report.dropped:
            assert name not in new.tensors and report.dropped[name]
        else:
            expected, found = old.read(name), new.read(name)
            if name == "model.embed_tokens.weight":
                found = found[:, : expected.shape[1]].contiguous()
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (found, expected))), name
