"""A checkpoint on disk, seen as tensors with a place in a file: nothing is loaded before it is asked for.

Whatever a file says about itself is checked before it is believed: names that leave the folder, headers whose offsets
lie, shapes that overflow and JSON made to exhaust memory are refused with a `CheckpointError`.
"""

import json
import math
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

MOST_JSON_BYTES = 32 << 20  # of a header, index or config: 300,000 tensors with names of 60 letters take about as much
MOST_JSON_BRACKETS = 2_000_000
MOST_DIMENSIONS = 64
MOST_ELEMENTS = 2**63 - 1

# safetensors' names of dtypes: torch's dtype, and bits of an element (of those that torch cannot hold, only the bits)
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
BITS = {name: dtype.itemsize * 8 for name, dtype in DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, converted or verified. Whatever stood there before stands there still."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `size` bytes from byte `start` of `file`, row by row; `dtype` as safetensors names it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint's folder by name, its weight files in order, and other weight files left alone."""

    folder: Path
    tensors: dict[str, StoredTensor]
    files: list[Path]
    other_files: list[Path]

    @property
    def is_safetensors(self) -> bool:
        return all(file.suffix == ".safetensors" for file in self.files)

    @property
    def size(self) -> int:
        """Bytes of its weight files."""
        return sum(file.stat().st_size for file in self.files)

    def read(self, name: str, first_row: int = 0, last_row: int | None = None) -> Tensor:
        """A tensor, or its rows from `first_row` up to `last_row`, in memory of its own, in the dtype it is stored in.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: the file ends before it does, or torch has no such dtype.
        """
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise CheckpointError(f"{name} in {stored.file} is of dtype {stored.dtype}, which torch cannot hold.")
        shape = list(stored.shape)
        start, size = stored.start, stored.size
        if shape and (first_row, last_row) != (0, None):
            row = size // shape[0] if shape[0] else 0
            last_row = shape[0] if last_row is None else last_row
            shape[0] = last_row - first_row
            start, size = start + first_row * row, shape[0] * row
        buffer = torch.empty(size, dtype=torch.uint8)
        read_into(stored.file, start, memoryview(buffer.numpy()))
        return buffer.view(DTYPES[stored.dtype]).reshape(shape)

    def rows(self, name: str, rows_per_block: int) -> Iterator[Tensor]:
        """The tensor in blocks of rows."""
        count = self.tensors[name].shape[0]
        for first in range(0, count, rows_per_block):
            yield self.read(name, first, min(first + rows_per_block, count))


def read_into(file: Path, start: int, view: memoryview) -> None:
    """Fill `view` with the bytes of a file from `start` on."""
    with open(file, "rb", buffering=0) as stream:
        stream.seek(start)
        while view:
            count = stream.readinto(view)
            if not count:
                raise CheckpointError(f"{file} ends too early; it was cut off or changed while it was read.")
            view = view[count:]


def open_checkpoint(folder: Path, allow_pickle: bool = False) -> Checkpoint:
    """Read where every tensor of a folder lies, from headers and index alone.

    Looks for model.safetensors, its index, and with `allow_pickle` pytorch_model.bin and its index, in that order.
    A .bin file is unpickled by torch's weights-only loader; its tensors are then read like any others.

    Raises:
        CheckpointError: there are no weights of a kind that is read; a file is missing, damaged, or lies about itself;
            an index names files outside of the folder or other tensors than the files hold.
    """
    folder = Path(folder)
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        present = [name for name in (single, index) if (folder / name).is_file()]
        if not present:
            continue
        if single == WEIGHTS_NAME and not allow_pickle:
            raise CheckpointError(
                f"{folder} has only {present[0]}, which is a pickle. allow_pickle=True (--allow-pickle) reads it with "
                "torch's weights-only loader; or load the model with transformers and save it again as safetensors."
            )
        if present[0] == single:
            files = [regular_file(folder, single)]
            tensors = read_headers(files)
        else:
            tensors = read_index(folder, index, Path(single).suffix)
            files = sorted({tensor.file for tensor in tensors.values()})
        others = sorted(path for path in folder.glob(f"*{Path(single).suffix}") if path not in files)
        return Checkpoint(folder, tensors, files, others)
    raise CheckpointError(
        f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. Other formats are not read; "
        "load the model with transformers and save it again to convert it."
    )


def read_index(folder: Path, index: str, suffix: str) -> dict[str, StoredTensor]:
    """The tensors of all files that an index names, which must be just the tensors that it says."""
    weight_map = read_json(regular_file(folder, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / index} has no weight_map of tensors to file names; download it again.")
    listed: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        listed.setdefault(name, set()).add(key)
    for name in sorted(listed):
        if Path(name).name != name or "\\" in name or not name.endswith(suffix):
            raise CheckpointError(f"{index} names {name!r}, which is no {suffix} file in the folder.")
    files = [regular_file(folder, name, f"{index} names it") for name in sorted(listed)]
    tensors = {}
    for file in files:
        held = read_headers([file])
        if held.keys() != listed[file.name]:
            example = sorted(held.keys() ^ listed[file.name])[0]
            raise CheckpointError(
                f"{file.name} holds other tensors than {index} says ({example}, for one); download both again."
            )
        tensors |= held
    return tensors


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    tensors = {}
    for file in files:
        tensors |= read_safetensors_header(file) if file.suffix == ".safetensors" else read_pickle_header(file)
    return tensors


def regular_file(folder: Path, name: str, reason: str = "it is needed") -> Path:
    """A plain file of a folder. A link must stay in the folder, or in the Hub cache's blobs beside its snapshots."""
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{name} is not in {folder}, but {reason}; download it again.")
    real, root = path.resolve(), folder.resolve()
    blobs = folder.parent.parent / "blobs"
    allowed = [root] + ([blobs.resolve()] if folder.parent.name == "snapshots" and blobs.is_dir() else [])
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a link that leads out of its folder, to {real}; give the folder that holds the files."
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise CheckpointError(f"{path} is not a regular file.")
    return path


def read_json(path: Path) -> dict:
    """A JSON file that holds one object. Raises CheckpointError for anything else, and for what would fill memory."""
    if path.stat().st_size > MOST_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; at most {MOST_JSON_BYTES:,} are read.")
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes, name: str) -> dict:
    if content.count(b"{") + content.count(b"[") > MOST_JSON_BRACKETS:
        raise CheckpointError(f"{name} has more than {MOST_JSON_BRACKETS:,} lists and objects and is not read.")
    try:
        parsed = json.loads(content, object_pairs_hook=without_repeats, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{name} is not a JSON object.")
    return parsed


def without_repeats(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key stands there twice")
    return result


def refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, whose bytes must follow one another from the header's end to the file's."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MOST_JSON_BYTES, size - 8):
            raise CheckpointError(
                f"{file} is no safetensors file: its header would have {length:,} bytes (the file has {size:,}, and at "
                f"most {MOST_JSON_BYTES:,} are read). Download it again."
            )
        header = parse_json(stream.read(length), f"The header of {file}")
    start = 8 + length
    header.pop("__metadata__", None)
    tensors = [stored_tensor(file, name, entry, start, size) for name, entry in header.items()]
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != end:
            between = "overlap" if tensor.start < end else "leave a gap"
            raise CheckpointError(f"{file}: tensors {between} at {tensor.name}, byte {tensor.start:,}.")
        end += tensor.size
    if end != size:
        raise CheckpointError(f"{file} has {size:,} bytes, but its tensors end at {end:,}; download it again.")
    return {tensor.name: tensor for tensor in tensors}


def stored_tensor(file: Path, name: str, entry: object, data_start: int, file_size: int) -> StoredTensor:
    """One entry of a header, after checks of every field. Raises CheckpointError that names the tensor."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{file}: tensor {name!r} is of dtype {dtype!r}, which is not known.")
    if not is_whole_numbers(shape) or len(shape) > MOST_DIMENSIONS:
        raise CheckpointError(f"{file}: tensor {name!r} has no valid shape.")
    if not is_whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{file}: tensor {name!r} has no valid data_offsets.")
    if math.prod(max(length, 1) for length in shape) > MOST_ELEMENTS:
        raise CheckpointError(f"{file}: the shape of tensor {name!r} overflows: {shape}.")
    first, last = offsets
    bits = math.prod(shape) * BITS[dtype]
    data_size = file_size - data_start
    if not first <= last <= data_size or (last - first) * 8 != bits:
        raise CheckpointError(
            f"{file}: tensor {name!r}, {dtype} {shape}, cannot lie at bytes {first} to {last} of {data_size}."
        )
    return StoredTensor(name, file, dtype, tuple(shape), data_start + first, last - first)


def is_whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MOST_ELEMENTS for item in value)


def read_pickle_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a PyTorch file, unpickled without their values by torch's weights-only loader.

    Under FakeTensorMode torch.load notes where a storage lies in the file:
    docs.pytorch.org/docs/stable/notes/serialization.html, "torch.load under FakeTensorMode".
    """
    try:
        with zipfile.ZipFile(file) as archive:
            stored = all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
    except zipfile.BadZipFile:
        stored = False
    if not stored:
        raise CheckpointError(
            f"{file} is not in PyTorch's zip format (since 1.6, uncompressed); load it with torch and save it again."
        )
    try:
        with FakeTensorMode():
            content = torch.load(file, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be unpickled safely: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file} holds something else than a mapping of names to tensors.")
    size = file.stat().st_size
    return {str(name): pickled_tensor(file, str(name), tensor, size) for name, tensor in content.items()}


def pickled_tensor(file: Path, name: str, tensor: Tensor, file_size: int) -> StoredTensor:
    if not tensor.is_contiguous() or tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{file}: tensor {name!r} is {tensor.dtype} with strides {tensor.stride()}; save it anew."
        )
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    size = tensor.numel() * tensor.element_size()
    start = (offset or 0) + tensor.storage_offset() * tensor.element_size()
    if offset is None or start + size > file_size:
        raise CheckpointError(f"{file}: tensor {name!r} does not lie in the file; it is damaged.")
    return StoredTensor(name, file, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), start, size)
