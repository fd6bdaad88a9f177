"""A safetensors file, written by hand so that its checksum is computed on the way.

    name, facts = write_tensors(folder / "weights.safetensors", {"a": tensor})

The format is a length, a JSON header of that length, and the tensors' bytes one after the other
(https://huggingface.co/docs/safetensors).
"""

import collections
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import torch

TYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
CHUNK, WRITERS = 2**24, 3  # bytes written at a time, and threads that write them


def write_tensors(file, tensors):
    """Write a safetensors file to disk. Returns its (name, {"size", "sha256"}).

    Reading the file again for the checksum would take as long as writing it.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": TYPES[tensor.dtype], "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }  # fmt: skip
        offset += tensor.nbytes
    start = json.dumps(header).encode()
    start += b" " * (-len(start) % 8)
    digest, size, writing = hashlib.sha256(), 0, collections.deque()
    with open(file, "wb") as opened, ThreadPoolExecutor(WRITERS) as pool:
        for content in contents(len(start).to_bytes(8, "little") + start, tensors):
            writing.append(pool.submit(write_at, opened.fileno(), content, size))
            if len(writing) > 2 * WRITERS:  # so that few copies of tensors wait in memory
                writing.popleft().result()
            digest.update(content)  # meanwhile
            size += len(content)
        for one in writing:
            one.result()
        os.fsync(opened.fileno())  # here, because several files are written at once
    return file.name, {"size": size, "sha256": digest.hexdigest()}


def contents(start, tensors):
    """A file's bytes, CHUNK at a time, copied from the device one tensor at a time."""
    yield memoryview(start)
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        for first in range(0, len(flat), CHUNK):
            yield memoryview(flat[first : first + CHUNK])


def write_at(handle, content, offset):
    """Write all of the content at an offset of a file."""
    while content:
        written = os.pwrite(handle, content, offset)
        content, offset = content[written:], offset + written
