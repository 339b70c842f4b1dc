"""Features on disk, compressed: what an epoch computed, the next one reads back."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark_serving.errors import OptionError
from dspark_training.data.blocks import Sequences
from dspark_training.features.compress import CODECS, CodecName
from dspark_training.features.shards import RecordRing
from dspark_training.features.source import Features, FeatureSource
from dspark_training.target import Target

log = logging.getLogger(__name__)

_IDENTITY = "cache.json"
_FORMAT = 1
_SAMPLED = 1024  # values of each weight tensor that the fingerprint looks at


class CacheIdentity(NamedTuple):
    """What the records of a cache depend on, besides the tokens."""

    target: str  # fingerprint of its configuration and weights
    hidden_size: int
    layer_ids: tuple[int, ...]
    scale_M: tuple[float, ...]

    @classmethod
    def of(cls, target: Target, layer_ids: tuple[int, ...], scale_M: Tensor | None) -> CacheIdentity:
        scale = () if scale_M is None else tuple(float(x) for x in scale_M)
        return cls(target_fingerprint(target), target.config.hidden_size, layer_ids, scale)


class CacheCounts(NamedTuple):
    """What a cache did since it was opened."""

    hits: int  # records read back
    misses: int  # records computed by the inner source
    damaged: int  # records whose checksum was wrong
    evicted_shards: int
    bytes_per_token: float  # written, checksums and headers included; 0 before the first record
    disk_bytes: int


class CachedFeatures:
    """A feature source in front of another one.

    Both a hit and a miss return what the codec kept, so a run's trajectory does not depend on what was cached.
    `last_BTD` is 0 where `Sequences.predicting_BT` is False: nothing is trained on it there.

    Args:
        inner: computes what is missing; it is called with the missing rows only.
        directory: holds the cache; created if absent.
        cap_bytes: limit on disk; the oldest shard of records makes room.
        codec: a key of CODECS.
        identity: what `inner` depends on; its layers are held.
        layer_ids: layers to return, if not all that are held.
        dtype: of the returned features.
        writer: this process and how many share the directory (rank, world size).

    Raises:
        OptionError: the directory holds features of another target, scale or codec.
    """

    def __init__(
        self,
        inner: FeatureSource,
        directory: Path,
        cap_bytes: int,
        codec: CodecName,
        identity: CacheIdentity,
        layer_ids: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        writer: tuple[int, int] = (0, 1),
    ) -> None:
        self._inner, self._dtype = inner, dtype
        self._codec = CODECS[codec]
        self._hidden, self._width = identity.hidden_size, identity.hidden_size * len(identity.layer_ids)
        self._columns: Tensor | None = None
        if layer_ids is not None and layer_ids != identity.layer_ids:
            self._columns = layer_columns(identity.layer_ids, layer_ids, self._hidden)
        seed = _claim(directory, codec, identity)
        self._ring = RecordRing(directory, cap_bytes, seed, writer)
        self._writing = True
        self._told_too_large = False
        self._hits = self._misses = self._bytes = self._tokens = 0

    def __call__(self, sequences: Sequences) -> Features:
        digests = [_digest(sequences, b) for b in range(len(sequences.keys))]
        payloads = [self._ring.get(digest) for digest in digests]
        missing = [b for b, payload in enumerate(payloads) if payload is None]
        self._hits += len(payloads) - len(missing)
        self._misses += len(missing)
        if missing:
            rows = _rows(sequences, missing)
            for b, payload in zip(missing, self._encode(self._inner(rows), rows), strict=True):
                self._keep(digests[b], payload, int(sequences.mask_BT[b].sum()))
                payloads[b] = np.frombuffer(bytearray(payload), dtype=np.uint8)
        held = self._decode([payload for payload in payloads if payload is not None], sequences)
        return held if self._columns is None else held._replace(context_BTM=held.context_BTM[..., self._columns])

    @property
    def counts(self) -> CacheCounts:
        ring = self._ring
        per_token = self._bytes / self._tokens if self._tokens else 0.0
        return CacheCounts(self._hits, self._misses, ring.damaged, ring.evicted_shards, per_token, ring.disk_bytes())

    def _keep(self, digest: bytes, payload: bytes, tokens: int) -> None:
        if not self._writing:
            return
        before = self._ring.bytes_written
        try:
            kept = self._ring.put(digest, payload)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._writing = False
            log.warning("the disk is full: features are computed online from here on, cached ones are still read")
            return
        if kept:
            self._bytes += self._ring.bytes_written - before
            self._tokens += tokens
        elif not self._told_too_large:
            self._told_too_large = True
            log.warning(
                "a sample of %d tokens needs %d bytes, a shard holds %d: such samples are not cached; raise cap_gb",
                tokens,
                len(payload),
                self._ring.shard_bytes,
            )

    def _encode(self, features: Features, rows: Sequences) -> list[bytes]:
        """A payload a row: normaliser, greedy token, scales, codes; each for its real or predicting tokens only."""
        payloads = []
        for b in range(len(rows.keys)):
            context_TM = features.context_BTM[b][rows.mask_BT[b].bool()].cpu()
            wanted_T = rows.predicting_BT[b]
            context_scales, context_codes = self._codec.context.encode(context_TM, self._hidden)
            last_scales, last_codes = self._codec.last.encode(features.last_BTD[b][wanted_T].cpu(), self._hidden)
            parts = [
                features.normaliser_BT[b][wanted_T].float(),
                features.top_BT[b][wanted_T].to(torch.int32),
                context_scales,
                last_scales,
                context_codes,
                last_codes,
            ]
            payloads.append(b"".join(part.cpu().contiguous().numpy().tobytes() for part in parts))
        return payloads

    def _decode(self, payloads: list[np.ndarray], sequences: Sequences) -> Features:
        """The inverse of `_encode` for every row, padded as `sequences` are."""
        batch, length = sequences.ids_BT.shape
        wanted_BT, real_BT = sequences.predicting_BT.cpu(), sequences.mask_BT.bool().cpu()
        context_BTM = torch.zeros(batch, length, self._width, dtype=self._dtype)
        last_BTD = torch.zeros(batch, length, self._hidden, dtype=self._dtype)
        normaliser_BT, top_BT = torch.zeros(batch, length), torch.zeros(batch, length, dtype=torch.long)
        context, last = self._codec
        for b, payload in enumerate(payloads):
            tokens, wanted = int(real_BT[b].sum()), int(wanted_BT[b].sum())
            take = _Reader(payload)
            normaliser_BT[b, wanted_BT[b]] = take(np.float32, wanted)
            top_BT[b, wanted_BT[b]] = take(np.int32, wanted).long()
            context_scales = take(np.float16, tokens, context.groups(self._width, self._hidden))
            last_scales = take(np.float16, wanted, last.groups(self._hidden, self._hidden))
            context_codes = take(np.uint8, tokens, context.code_bytes(self._width, self._hidden))
            last_codes = take(np.uint8, wanted, last.code_bytes(self._hidden, self._hidden))
            context_BTM[b, real_BT[b]] = context.decode(context_scales, context_codes, self._width).to(self._dtype)
            last_BTD[b, wanted_BT[b]] = last.decode(last_scales, last_codes, self._hidden).to(self._dtype)
        device = sequences.ids_BT.device
        return Features(*(part.to(device) for part in (context_BTM, last_BTD, normaliser_BT, top_BT)))


class _Reader:
    """Takes arrays one after the other from a payload."""

    def __init__(self, payload: np.ndarray) -> None:
        self._payload, self._at = payload, 0

    def __call__(self, dtype: type[np.generic], *shape: int) -> Tensor:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        part = self._payload[self._at : self._at + size].view(dtype).reshape(shape)
        self._at += size
        return torch.from_numpy(part)


def layer_columns(held: tuple[int, ...], wanted: tuple[int, ...], hidden_size: int) -> Tensor:
    """Where the dimensions of some captured layers lie among those of all held ones.

    Raises:
        OptionError: a layer that is not held.
    """
    missing = [layer for layer in wanted if layer not in held]
    if missing:
        raise OptionError(
            f"features.layer_ids {list(held)} lack {missing}",
            expected="all of drafter.target_layer_ids",
            fix="Add them, or leave features.layer_ids out.",
        )
    starts = torch.tensor([held.index(layer) * hidden_size for layer in wanted])
    return (starts[:, None] + torch.arange(hidden_size)).flatten()


def target_fingerprint(target: Target) -> str:
    """Of the target's configuration and of values spread over each of its weight tensors (not of every value)."""
    digest = hashlib.blake2b(target.config.to_json_string().encode(), digest_size=16)
    for name, tensor in target.model.state_dict().items():
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sampled.tobytes())
    return digest.hexdigest()


def _digest(sequences: Sequences, b: int) -> bytes:
    """Identity of a row: its tokens and which of them predict, under the sample's key."""
    length = int(sequences.mask_BT[b].sum())
    digest = hashlib.blake2b(sequences.keys[b].encode(), digest_size=16)
    digest.update(sequences.ids_BT[b, :length].cpu().numpy().tobytes())
    digest.update(sequences.predicting_BT[b, :length].cpu().numpy().tobytes())
    return digest.digest()


def _rows(sequences: Sequences, rows: list[int]) -> Sequences:
    """Some rows, without the padding that only the others needed."""
    rows_R = torch.tensor(rows, device=sequences.ids_BT.device)
    length = int(sequences.mask_BT[rows_R].sum(1).max())
    return Sequences(tuple(sequences.keys[b] for b in rows), *(part[rows_R, :length] for part in sequences[1:]))


def _claim(directory: Path, codec: CodecName, identity: CacheIdentity) -> int:
    """Write or check the directory's identity; returns the seed of its checksums."""
    path = directory / _IDENTITY
    stated: dict[str, Any] = {
        "format": _FORMAT,
        "codec": codec,
        "target": identity.target,
        "hidden_size": identity.hidden_size,
        "layer_ids": list(identity.layer_ids),
    }
    seed = zlib.crc32(json.dumps(stated).encode())
    scale = np.array(identity.scale_M)
    directory.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        unfinished = directory / f".{_IDENTITY}.{os.getpid()}"
        unfinished.write_text(json.dumps({**stated, "scale": scale.tolist()}))
        os.replace(unfinished, path)
        return seed
    try:
        found = json.loads(path.read_text())
        found_scale = np.array(found.pop("scale"), dtype=float)
    except (json.JSONDecodeError, KeyError, ValueError):
        found, found_scale = {}, scale
    differing = [key for key in stated if found.get(key) != stated[key]]
    # Another number of threads gives another last bit of the scale, hence no exact comparison.
    if found_scale.shape != scale.shape or not np.allclose(found_scale, scale, rtol=1e-3):
        differing.append("scale")
    if differing:
        raise OptionError(
            f"{directory} holds features with another {', '.join(differing)}",
            expected="a cache of this target, these layers, this scale and this codec",
            fix="Choose another features.directory, or delete this one.",
        )
    return seed
