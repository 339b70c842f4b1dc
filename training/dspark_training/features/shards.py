"""Checksummed records in append-only shard files under a cap on disk: the oldest shard makes room for new records."""

from __future__ import annotations

import contextlib
import errno
import logging
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dspark_serving.errors import OptionError

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<4s16sIII")  # magic, digest, payload bytes, crc32 of the payload, crc32 of the fields before
_MAGIC = b"dsF1"
_ALIGN = 8  # a record's payload can be memory-mapped as fp32
_SHARDS = 16


class Place(NamedTuple):
    """Where a record's payload lies."""

    shard: Path
    offset: int
    length: int
    crc: int


class RecordRing:
    """Records by digest. A process appends to shards of its own only, and reads those of every writer.

    Args:
        directory: where the shards lie; created if absent.
        cap_bytes: of all shards of all writers together.
        seed: of the checksums; records written under another seed are not seen.
        writer: this process and how many there are (rank, world size).

    Raises:
        OptionError: the cap is too small for a shard.
    """

    def __init__(self, directory: Path, cap_bytes: int, seed: int, writer: tuple[int, int] = (0, 1)) -> None:
        self._directory, self._seed = directory, seed
        self._rank, self._writers = writer
        self._cap = cap_bytes // self._writers
        self.shard_bytes = self._cap // _SHARDS
        if self.shard_bytes <= _HEADER.size:
            raise OptionError(
                f"a feature cache of {cap_bytes} bytes", expected="room for records", fix="Raise features.cap_gb."
            )
        self.damaged = 0
        self.evicted_shards = 0
        self.bytes_written = 0
        self._places: dict[bytes, Place] = {}
        self._scanned: dict[Path, int] = {}  # shard -> bytes that were indexed
        self._file: BinaryIO | None = None
        self._path = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._drop_foreign_shards()
        self._refresh()

    def __len__(self) -> int:
        return len(self._places)

    def disk_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(_size(path) for path in self._directory.glob("*.shard"))

    def get(self, digest: bytes) -> np.ndarray | None:
        """The payload of a record; None if it is absent, evicted or damaged (then it is counted, and dropped)."""
        if digest not in self._places and self._writers > 1:
            self._refresh()
        place = self._places.get(digest)
        if place is None:
            return None
        try:
            payload = np.array(np.memmap(place.shard, mode="r", offset=place.offset, shape=(place.length,)))
        except (FileNotFoundError, ValueError):  # evicted by its writer, or cut short
            payload = None
        if payload is not None and zlib.crc32(payload.data, self._seed) == place.crc:
            return payload
        del self._places[digest]
        if place.shard.exists():
            self.damaged += 1
            log.warning(
                "a damaged feature record in %s at byte %d is computed again (%d so far)",
                place.shard,
                place.offset,
                self.damaged,
            )
        return None

    def put(self, digest: bytes, payload: bytes) -> bool:
        """Append a record; False if it is too large for a shard.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        fields = _HEADER.pack(_MAGIC, digest, len(payload), zlib.crc32(payload, self._seed), 0)
        header = fields[:-4] + struct.pack("<I", zlib.crc32(fields[:-4], self._seed))
        record = header + payload + bytes(-(len(header) + len(payload)) % _ALIGN)
        if len(record) > self.shard_bytes:
            return False
        file = self._shard_for(len(record))
        start = file.tell()
        try:
            written = file.write(record)
            if written != len(record):
                raise OSError(errno.ENOSPC, "short write")
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(start)
                file.seek(start)
            raise
        self._scanned[self._path] = start + len(record)
        self.bytes_written += len(record)
        crc = zlib.crc32(payload, self._seed)
        self._places[digest] = Place(self._path, start + _HEADER.size, len(payload), crc)
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _shard_for(self, record_bytes: int) -> BinaryIO:
        """The open shard, or a new one after making room under the cap."""
        if self._file is not None and self._file.tell() + record_bytes <= self.shard_bytes:
            return self._file
        self.close()
        own = sorted(self._directory.glob(f"{self._rank:03}-*.shard"))
        held = sum(_size(path) for path in own)
        while own and held + self.shard_bytes > self._cap:
            oldest = own.pop(0)
            held -= _size(oldest)
            oldest.unlink(missing_ok=True)
            self.evicted_shards += 1
        number = int(own[-1].stem.partition("-")[2]) + 1 if own else 0
        self._path = self._directory / f"{self._rank:03}-{number:08}.shard"
        self._file = self._path.open("xb", buffering=0)
        self._refresh()
        return self._file

    def _drop_foreign_shards(self) -> None:
        """Shards of writers that a run with fewer processes does not have would escape the cap."""
        for path in self._directory.glob("*.shard"):
            if int(path.stem.partition("-")[0]) >= self._writers and self._rank == 0:
                path.unlink(missing_ok=True)

    def _refresh(self) -> None:
        """Index what other writers (or an earlier run) appended, and forget evicted shards."""
        shards = sorted(self._directory.glob("*.shard"))
        gone = self._scanned.keys() - set(shards)
        if gone:
            self._scanned = {path: end for path, end in self._scanned.items() if path not in gone}
            self._places = {d: place for d, place in self._places.items() if place.shard not in gone}
        for path in shards:
            if _size(path) > self._scanned.get(path, 0):
                self._scan(path)

    def _scan(self, path: Path) -> None:
        """Walk the headers from where the last scan ended; a torn record at the end is not indexed."""
        size, offset = _size(path), self._scanned.get(path, 0)
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            while offset + _HEADER.size <= size:
                file.seek(offset)
                header = file.read(_HEADER.size)
                magic, digest, length, crc, own_crc = _HEADER.unpack(header)
                if magic != _MAGIC or zlib.crc32(header[:-4], self._seed) != own_crc:
                    self.damaged += 1
                    log.warning("%s is damaged at byte %d: the records behind it are computed again", path, offset)
                    offset = size
                    break
                end = offset + _HEADER.size + length
                if end > size:
                    break
                self._places[digest] = Place(path, offset + _HEADER.size, length, crc)
                offset = end + -(_HEADER.size + length) % _ALIGN
        self._scanned[path] = offset


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
