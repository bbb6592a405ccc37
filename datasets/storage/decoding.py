"""How chunks are unpacked: never to much more than their array's description says, whatever they claim.

Some kilobytes can unpack to gigabytes. What a packed chunk holds is therefore asked before it is unpacked: Zstandard,
Blosc and LZ4 say it in their first bytes, and the others are unpacked up to the limit to see.
"""

from __future__ import annotations

import bz2
import lzma
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import zarr
from numcodecs.registry import register_codec
from zarr.codecs._v2 import V2Codec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.codec_pipeline import BatchedCodecPipeline
from zarr.registry import register_pipeline

from action_diffusion.datasets.images.codecs import CHUNK_SHAPE, Jpeg2000, JpegXl

FILTERED = 8
"""Times the bytes of a chunk that may come out of its compressor: filters may hold a number in as many bytes."""
_SLACK = 1 << 18
_ZSTD_BLOCK = 1 << 17
_LZMA_MEMORY = 1 << 28
_STREAMS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=47),
    "zlib": lambda: zlib.decompressobj(wbits=47),
    "bz2": bz2.BZ2Decompressor,
    "lzma": lambda: lzma.LZMADecompressor(memlimit=_LZMA_MEMORY),
}


class BoundedPipeline(BatchedCodecPipeline):
    """Zarr's own way to decode chunks, behind `check_unpacked`."""

    async def decode_batch(
        self, chunk_bytes_and_specs: Iterable[tuple[Buffer | None, ArraySpec]]
    ) -> Iterable[NDBuffer | None]:
        chunks = list(chunk_bytes_and_specs)
        for chunk, spec in chunks:
            if chunk is not None:
                n_bytes = math.prod(spec.shape) * spec.dtype.to_native_dtype().itemsize
                for codec in self._packed_by():
                    check_unpacked(chunk.to_bytes(), codec, FILTERED * n_bytes + _SLACK)
                CHUNK_SHAPE.set(spec.shape)
        return await super().decode_batch(chunks)

    def _packed_by(self) -> list[str]:
        """Names of its compressors, of which there is at most one."""
        if isinstance(self.array_bytes_codec, V2Codec):
            compressor = self.array_bytes_codec.compressor
            return [] if compressor is None else [str(compressor.get_config()["id"])]
        return [str(codec.to_dict()["name"]).removeprefix("numcodecs.") for codec in self.bytes_bytes_codecs]


def register_codecs() -> None:
    """From now on Zarr reads images in JPEG XL and JPEG 2000, and no chunk unpacks to more than it may."""
    register_codec(JpegXl)
    register_codec(Jpeg2000)
    register_pipeline(BoundedPipeline)
    zarr.config.set({"codec_pipeline.path": f"{BoundedPipeline.__module__}.{BoundedPipeline.__qualname__}"})


def check_unpacked(packed: bytes, codec: str, limit: int) -> None:
    """Raises `ValueError` where `packed`, by the codec of this name, holds more than `limit` bytes."""
    if codec in _STREAMS:
        n_bytes = _streamed(packed, _STREAMS[codec], limit)
    elif codec in _CLAIMS:
        n_bytes = _CLAIMS[codec](packed)
    else:
        return
    if n_bytes > limit:
        more = "or more " if codec in _STREAMS else ""
        raise ValueError(f"a chunk unpacks to {n_bytes:,} bytes {more}where at most {limit:,} can belong")


def _streamed(packed: bytes, start: Callable[[], Any], limit: int) -> int:
    """Bytes that come out, counted up to just above the limit."""
    n_bytes = 0
    try:
        while packed and n_bytes <= limit:
            stream = start()
            n_bytes += len(stream.decompress(packed, limit - n_bytes + 1))
            packed = stream.unused_data
    except (zlib.error, OSError, lzma.LZMAError, EOFError):
        pass  # the decoder itself says so
    return n_bytes


def _zstd_size(packed: bytes) -> int:
    """Of all frames; of one that does not say its size, what its blocks can hold at most."""
    n_bytes, place = 0, 0
    while place < len(packed):
        if packed[place : place + 4] != b"\x28\xb5\x2f\xfd":
            return n_bytes  # the decoder refuses it, or takes it for a checksum
        flags = packed[place + 4]
        single = flags >> 5 & 1
        place += 5 + (not single) + (0, 1, 2, 4)[flags & 3]
        width = (single, 2, 4, 8)[flags >> 6]
        size = int.from_bytes(packed[place : place + width], "little") + (256 if width == 2 else 0)
        place += width
        largest = 0
        while place + 3 <= len(packed):
            header = int.from_bytes(packed[place : place + 3], "little")
            kind, n = header >> 1 & 3, header >> 3
            largest += n if kind < 2 else _ZSTD_BLOCK  # as it is, one byte repeated, packed
            place += 3 + (1 if kind == 1 else n)
            if header & 1:
                break
        n_bytes += size if width else largest
        place += 4 * (flags >> 2 & 1)
    return n_bytes


_CLAIMS: dict[str, Callable[[bytes], int]] = {
    "zstd": _zstd_size,
    "blosc": lambda packed: int.from_bytes(packed[4:8], "little"),
    "lz4": lambda packed: int.from_bytes(packed[:4], "little"),
}
