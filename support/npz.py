"""The format of an episode file: what it holds, and the bytes of the .npz.

isal reads and writes them fast; damaged, foreign and hostile files are found.
"""

import errno
import io
import json
import math
import os
import struct
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from isal import isal_zlib

from support.cli import fail

CHUNK_SCHEMA = 1  # of chunks; another one is skipped and named
LONGEST_EPISODE = 2_000  # no episode is longer: a file that says so is damaged or a zip bomb
MAX_META_BYTES, MAX_COLUMNS = 1 << 20, 1000
FRAME = (64, 64, 3)
META = dict(schema=int, source=str, track_seed=int, uid=str, policy=dict, preprocess=int)
META |= dict(frames=int, return_=float)  # name: type; collectors add more of their own
DEFLATE_LEVEL = 1  # isal: 13 us a frame, and 1,439 bytes; zlib's level 2: 59 us, 1,499 bytes
NPY_HEADER = 128  # bytes before the values of every array that `write_npz` writes
READ_ERRORS = (ValueError, LookupError, TypeError, OSError, EOFError, RuntimeError, OverflowError)
READ_ERRORS += (zipfile.BadZipFile, isal_zlib.error, struct.error)  # by damaged or hostile files
DAMAGE_ERRNOS = (None, errno.EINVAL, errno.ENOENT)  # a seek out of the file; a file that is gone


def npy_header(dtype, shape):
    """The bytes that numpy writes before an array of this dtype and shape."""
    out, descr = io.BytesIO(), np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue()


def write_npz(file, arrays):
    """Writes {name: array} to an open file: what `np.savez_compressed` would, four times as fast.

    The same arrays give the same bytes: every member bears the date 1980-01-01.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name, array in arrays.items():
            array = np.asarray(array, order="C")
            member = zipfile.ZipInfo(f"{name}.npy")
            member.compress_type = zipfile.ZIP_DEFLATED
            with z.open(member, "w") as out:
                # zipfile takes no other deflate; without this line it only writes more slowly
                out._compressor = isal_zlib.compressobj(DEFLATE_LEVEL, zlib.DEFLATED, -15)
                out.write(npy_header(array.dtype, array.shape))
                out.write(memoryview(array).cast("B") if array.ndim else array.tobytes())


class NpzReader:
    """An open .npz file. Sizes and CRCs come from its directory, before anything is inflated."""

    def __init__(self, file):
        self.file, self.zip = file, zipfile.ZipFile(file)

    def info(self, name):
        """What the directory says of an array: `CRC`, `file_size`, `compress_size` and others."""
        return self.zip.getinfo(f"{name}.npy")

    def nbytes(self, name):
        """Bytes of an array's values."""
        return self.info(name).file_size - NPY_HEADER

    def array(self, name, dtype, shape):
        """One array, read-only. ValueError unless its CRC, dtype and shape are as expected.

        Never more bytes than the directory promises are inflated: no zip bomb unfolds. The header
        is compared, never parsed, so that a pickled object is never loaded.
        """
        info = self.info(name)
        self.file.seek(info.header_offset)
        local_header = self.file.read(30)  # ends with the lengths of a name and an extra field
        self.file.seek(sum(struct.unpack("<26x2H", local_header)), os.SEEK_CUR)
        raw = self.file.read(info.compress_size)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            raw = isal_zlib.decompressobj(-15).decompress(raw, info.file_size + 1)

        if len(raw) != info.file_size or isal_zlib.crc32(raw) != info.CRC:
            raise ValueError(f"{name}: its bytes are not those that were written (CRC)")
        if raw[:NPY_HEADER] != npy_header(dtype, shape):
            raise ValueError(f"{name}: expected {np.dtype(dtype)} {shape}, found another array")
        return np.frombuffer(raw, dtype, math.prod(shape), NPY_HEADER).reshape(shape)


def check_meta(meta):
    """ValueError unless a meta describes an episode of this project in this CHUNK_SCHEMA."""
    if not isinstance(meta, dict):
        raise ValueError("meta is no dict")
    for k, kind in META.items():
        if type(meta.get(k)) is not kind:
            raise ValueError(f"meta: expected {k} to be {kind.__name__}, found {meta.get(k)!r:.40}")
    if meta["schema"] != CHUNK_SCHEMA:
        raise ValueError(f"chunk schema {meta['schema']}, this code reads {CHUNK_SCHEMA}")
    T, total = meta["frames"], meta["return_"]
    if not 0 < T <= LONGEST_EPISODE or not math.isfinite(total):
        found = f"{T} steps with a return of {total}"
        raise ValueError(f"{found}, expected 1 to {LONGEST_EPISODE} steps")


def array_specs(T, columns):
    """{name: (dtype, shape)} of the arrays of an episode of T steps."""
    return {
        "obs": (np.uint8, (T + 1, *FRAME)),
        "act": (np.float32, (T, 3)),
        "reward": (np.float32, (T,)),
        "terminated": (np.bool_, (T,)),
        "truncated": (np.bool_, (T,)),
        "telemetry": (np.float32, (T + 1, columns)),
    }


def check_finite(arrays):
    """ValueError for a float32 array of {name: array} that holds a NaN or an infinity."""
    for name, array in arrays.items():
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")


@contextmanager
def open_chunk(path):
    """(NpzReader, meta, array_specs) of an episode file whose sizes are those that its meta says.

    Only the meta is inflated. Whatever damage raises in the `with` block becomes one Refusal. An
    OSError of the system (permission, a failing disk) passes: the file may be whole.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("not a file")  # a pipe or a device would never end
        with open(path, "rb") as f:
            npz = NpzReader(f)
            meta, specs = read_directory(npz)
            yield npz, meta, specs
    except READ_ERRORS as e:
        if isinstance(e, OSError) and e.errno not in DAMAGE_ERRNOS:
            raise OSError(e.errno, os.strerror(e.errno), str(path)) from None
        fail(f"{path}: damaged, cut off or foreign ({e or type(e).__name__})")


def read_directory(npz):
    """(meta, array_specs) of an episode. ValueError where the sizes of its arrays do not fit."""
    if "meta.npy" not in npz.zip.namelist():
        raise ValueError("no episode; move it away, or write it with `buffer.write_chunk`")
    if npz.nbytes("meta") > MAX_META_BYTES:
        raise ValueError("meta is over 1 MiB")
    meta = json.loads(str(npz.array("meta", f"<U{npz.nbytes('meta') // 4}", ())))
    check_meta(meta)
    columns = npz.nbytes("telemetry") // (4 * meta["frames"] + 4)
    specs = array_specs(meta["frames"], min(columns, MAX_COLUMNS))
    for name, (dtype, shape) in specs.items():
        expected = math.prod(shape) * np.dtype(dtype).itemsize
        if npz.nbytes(name) != expected:
            raise ValueError(f"{name} holds {npz.nbytes(name)} bytes, expected {expected}")
    return meta, specs
