"""Safetensors: files of bare tensors, a JSON header and their bytes, read without trusting either."""

import json
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

MAX_HEADER = 1 << 24  # bytes: a ResNet's takes 0.1 MB
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether the first nine bytes of a file of this size begin with the length of a JSON object, and it."""
    return len(head) == 9 and head[8:] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= size - 8


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises ValueError, KeyError, TypeError or RecursionError where it breaks the format:
    https://github.com/huggingface/safetensors, README, 'Format'.
    """
    content = memoryview(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    if length > min(MAX_HEADER, len(content) - 8):
        raise ValueError("header longer than the file")
    header, tensors, end = json.loads(bytes(content[8 : 8 + length])), {}, 0
    header.pop("__metadata__", None)
    spans = {name: (about["dtype"], about["shape"], *about["data_offsets"]) for name, about in header.items()}
    for name, (dtype, shape, start, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if any(type(number) is not int or number < 0 for number in (*shape, start, stop)) or len(shape) > 8:
            raise ValueError("sizes are whole numbers from 0")
        count = math.prod(shape)
        # Without gaps and overlaps: the format allows neither.
        if start != end or stop - start != count * DTYPES[dtype].itemsize or 8 + length + stop > len(content):
            raise ValueError("tensors that are not where the header says")
        end = stop
        # Copied, since tensors must begin where their type allows.
        raw = bytearray(content[8 + length + start : 8 + length + stop]) or bytearray(8)
        tensors[name] = torch.frombuffer(raw, dtype=DTYPES[dtype])[:count].view(shape)
    if 8 + length + end != len(content):
        raise ValueError("bytes that belong to no tensor")
    return tensors
