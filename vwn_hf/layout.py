"""Which tensor of a checkpoint goes into which file, and a safetensors file as the parts it is written from."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .checkpoints import BITS, DTYPE_NAMES, Checkpoint, StoredTensor
from .widening import NewTensor
from .writing import CopiedBytes, FileToWrite, MadeBytes

ALIGNMENT = 64  # bytes: a tensor that is mapped from a file should be aligned as those in memory are


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written, and what it is: bytes that stand in another file, or values to be made."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: StoredTensor | NewTensor

    @classmethod
    def copy(cls, stored: StoredTensor, name: str | None = None) -> "OutputTensor":
        return cls(name or stored.name, stored.dtype, stored.shape, stored)

    @classmethod
    def new(cls, name: str, tensor: NewTensor) -> "OutputTensor":
        return cls(name, DTYPE_NAMES[tensor.dtype], tensor.shape, tensor)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Layout:
    """The weight files of a checkpoint to be written: their tensors, and those that are a file of the source as is."""

    tensors: dict[str, list[OutputTensor]]
    unchanged: dict[str, Path]

    def files(self) -> list[FileToWrite]:
        return [
            FileToWrite(name, same_as=self.unchanged[name])
            if name in self.unchanged
            else FileToWrite(name, safetensors_parts(tensors))
            for name, tensors in self.tensors.items()
        ]

    def by_name(self) -> dict[str, OutputTensor]:
        return {tensor.name: tensor for tensors in self.tensors.values() for tensor in tensors}

    def write_index(self, folder: Path, parameters: int) -> None:
        """The index of all files, as transformers writes it."""
        size = sum(tensor.size for tensor in self.by_name().values())
        weight_map = {tensor.name: name for name, tensors in self.tensors.items() for tensor in tensors}
        index = {
            "metadata": {"total_parameters": parameters, "total_size": size},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def lay_out(source: Checkpoint, added: dict[str, OutputTensor], left_out: Collection[str]) -> Layout:
    """The source's files without what is left out or replaced, then one file with what is added.

    A source file stays as it is if all of its tensors stay and it is safetensors.
    """
    held: dict[Path, list[StoredTensor]] = {file: [] for file in source.files}
    changed = set()
    for stored in source.tensors.values():
        if stored.name in added or stored.name in left_out:
            changed.add(stored.file)
        else:
            held[stored.file].append(stored)
    kept = [file for file, tensors in held.items() if tensors]
    count = len(kept) + 1
    names = {file: f"model-{number:05d}-of-{count:05d}.safetensors" for number, file in enumerate(kept, start=1)}
    last = f"model-{count:05d}-of-{count:05d}.safetensors"
    tensors = {name: [OutputTensor.copy(stored) for stored in held[file]] for file, name in names.items()}
    as_it_is = [file for file in kept if file not in changed and file.suffix == ".safetensors"]
    return Layout(tensors | {last: list(added.values())}, {names[file]: file for file in as_it_is})


def safetensors_parts(tensors: list[OutputTensor]) -> list[CopiedBytes | MadeBytes]:
    """A safetensors file: header and tensors, those of the widest elements first, as safetensors orders them."""
    ordered = sorted(tensors, key=lambda tensor: (-BITS[tensor.dtype], place(tensor.content), tensor.name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.size],
        }
        end += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    content = memoryview(len(text).to_bytes(8, "little") + text)
    parts = [MadeBytes(len(content), len(content), lambda number: content)]
    for tensor in ordered:
        part = part_of(tensor)
        last = parts[-1]
        if (
            isinstance(last, CopiedBytes)
            and isinstance(part, CopiedBytes)
            and (part.file, part.start) == (last.file, last.start + last.size)
        ):
            parts[-1] = CopiedBytes(last.file, last.start, last.size + part.size)
        elif part.size:
            parts.append(part)
    return parts


def place(content: StoredTensor | NewTensor) -> tuple[str, int]:
    return (str(content.file), content.start) if isinstance(content, StoredTensor) else ("", 0)


def part_of(tensor: OutputTensor) -> CopiedBytes | MadeBytes:
    content = tensor.content
    if isinstance(content, StoredTensor):
        return CopiedBytes(content.file, content.start, content.size)
    return MadeBytes(
        tensor.size, content.rows_per_block * content.row_size, lambda number: as_bytes(content.block(number))
    )


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).flatten().numpy())
