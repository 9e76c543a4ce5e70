"""Upcycle a synthetic OLMoE of real layout beside `cp -r` of the same folder: wall time and peak memory.

    python tests/benchmarks/upcycling_at_size.py FOLDER --gigabytes 3 12

Makes checkpoints of random bytes in shards of 1 GB in FOLDER (which needs three times the size), with OLMoE-1B-7B's
tensors in as many layers as the size asks for, and removes them again. Nothing is asserted; a table is printed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

SHARD_BYTES = 10**9
BLOCK = 64 << 20
HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY = 2048, 1024, 64, 50304


def layer_tensors(layer: int) -> dict[str, list[int]]:
    """Names and shapes of one decoder layer, as OLMoE-1B-7B-0924 stores them."""
    prefix = f"model.layers.{layer}"
    shapes = {f"{prefix}.self_attn.{name}_proj.weight": [HIDDEN, HIDDEN] for name in "qkvo"}
    shapes |= {f"{prefix}.self_attn.{name}_norm.weight": [HIDDEN] for name in "qk"}
    shapes |= {f"{prefix}.{name}_layernorm.weight": [HIDDEN] for name in ("input", "post_attention")}
    shapes[f"{prefix}.mlp.gate.weight"] = [EXPERTS, HIDDEN]
    for expert in range(EXPERTS):
        for name in ("gate", "up", "down"):
            shape = [HIDDEN, INTERMEDIATE] if name == "down" else [INTERMEDIATE, HIDDEN]
            shapes[f"{prefix}.mlp.experts.{expert}.{name}_proj.weight"] = shape
    return shapes


def size_of(shape: list[int]) -> int:
    size = 2
    for length in shape:
        size *= length
    return size


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write it; returns the number of bytes."""
    folder.mkdir(parents=True)
    shapes, layers = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN]}, 0
    while sum(map(size_of, shapes.values())) < gigabytes * 1e9:
        shapes |= layer_tensors(layers)
        layers += 1
    shapes |= {"model.norm.weight": [HIDDEN], "lm_head.weight": [VOCABULARY, HIDDEN]}
    shards: list[dict[str, list[int]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(size_of, shards[-1].values())) + size_of(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "model_type": "olmoe",
        "num_hidden_layers": layers,
        "intermediate_size": INTERMEDIATE,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))  # the rest is transformers' default, this model's
    return sum(map(size_of, shapes.values()))


def write_shard(path: Path, shapes: dict[str, list[int]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size_of(shape)]}
        end += size_of(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, BLOCK):
            stream.write(os.urandom(min(BLOCK, end - start)))


def measured(command: list[str]) -> tuple[float, int]:
    """Wall seconds, and peak resident bytes of the process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[3, 12])
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    upcycle = [sys.executable, "-m", "vwn_hf.cli", "upcycle"]
    source, output = arguments.folder / "source", arguments.folder / "output"
    for gigabytes in arguments.gigabytes:
        size = make_checkpoint(source, gigabytes)
        subprocess.run(["sync"], check=True)
        commands = {
            "cp -r": ["cp", "-r", source, output],
            "cp -r, sync": ["sh", "-c", 'cp -r "$0" "$1" && sync', source, output],
            "--link never --verify header": [*upcycle, source, output, "--link", "never", "--verify", "header"],
            "--link never --verify bytes": [*upcycle, source, output, "--link", "never", "--verify", "bytes"],
            "--link always --verify header": [*upcycle, source, output, "--link", "always", "--verify", "header"],
            "--link always --verify bytes": [*upcycle, source, output, "--link", "always", "--verify", "bytes"],
        }
        for turn in range(arguments.rounds):
            for name, command in commands.items():
                seconds, peak = measured(list(map(str, command)))
                shutil.rmtree(output)
                subprocess.run(["sync"], check=True)
                print(
                    f"{size / 1e9:6.2f} GB  round {turn + 1}  {name:32} {seconds:7.2f} s  {peak / 1e6:7.0f} MB",
                    flush=True,
                )
        shutil.rmtree(source)


if __name__ == "__main__":
    main()
