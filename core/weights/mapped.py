"""The tensors of a safetensors file, mapped: each is read from the disk when it is used."""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

METADATA = "__metadata__"
LENGTH_BYTES = 8  # at the start of the file, of the header that follows
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def map_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata; ValueError says what is wrong with it.

    The safetensors library itself refuses whole files for metadata that are not texts: here they become JSON.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = LENGTH_BYTES + int.from_bytes(stream.read(LENGTH_BYTES), "little")
        header = stream.read(min(start - LENGTH_BYTES, MAX_HEADER))
        ends = re.findall(rb'"data_offsets":\s*\[\d+,\s*(\d+)\]', header)
        announced = start + max(map(int, ends), default=0)
        if size < announced:
            raise ValueError(f"is cut short, {size} bytes of the {announced} that its header announces")
        entries = _parse(header)
        metadata = entries.pop(METADATA, None)
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    end = 0
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: _place(*item)):
        tensors[name] = _tensor(memory, name, entry, start, end)
        end = entry["data_offsets"][1]
    if start + end != size:
        raise ValueError(f"is damaged ({size} bytes, but the header describes {start + end})")
    return tensors, _texts(metadata)


def _parse(header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header)
    except ValueError as error:
        raise ValueError(f"is damaged (its header is no JSON: {error})") from None
    if not isinstance(entries, dict):
        raise ValueError("is damaged (its header is no JSON object)")
    return entries


def _place(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end."""
    try:
        begin, end = entry["data_offsets"]
        if all(isinstance(size, int) and size >= 0 for size in (begin, end, *entry["shape"])):
            return begin, end
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"is damaged (its header does not say where {name} is)")


def _tensor(memory: mmap.mmap, name: str, entry: Mapping[str, Any], start: int, begin: int) -> Tensor:
    """A tensor whose bytes begin where those of the one before end."""
    stored, shape = str(entry.get("dtype")), entry["shape"]
    if (dtype := DTYPES.get(stored)) is None:
        raise ValueError(f"holds {name} in the number format {stored}, which is not read")
    count = math.prod(shape)
    if entry["data_offsets"] != [begin, begin + count * dtype.itemsize]:
        raise ValueError(f"is damaged (its header describes {name} in the wrong place)")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start + begin).view(shape)


def _texts(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        return {}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
