"""Who answers the questions: a drafter with its target in this process, plain decoding, or a walk over its answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from dspark_serving.drafters import DrafterSpec, check_fit
from dspark_serving.drafters.readers.deepspec import VOCABULARY_FILE
from dspark_serving.scheduler.calibration import FILE_NAME, Calibration
from dspark_serving.scheduler.survival_map import FILE_NAME as SURVIVAL_MAP
from dspark_serving.scheduler.survival_map import survival_map_beside
from dspark_training.bundle.export import load_bundle
from dspark_training.config import OptimConfig
from dspark_training.data.chat import ChatTemplate
from dspark_training.data.conversation import Message, Prompt
from dspark_training.data.generate import Request
from dspark_training.data.store import Sample
from dspark_training.data.vocab import DraftVocab
from dspark_training.evaluation.drafting import BlockProposer, ChainProposer, Drafter, NoDrafter, proposer_of
from dspark_training.evaluation.records import Record, rounded
from dspark_training.evaluation.rounds import Decoded, decode
from dspark_training.evaluation.walk import Walk, walk_drafter
from dspark_training.features.cache import target_fingerprint
from dspark_training.features.source import OnlineFeatures
from dspark_training.objectives.build import build_objective
from dspark_training.target import Target

PLAIN = "off"  # the arm without speculation


class Ask(NamedTuple):
    """One turn of a question, behind the turns that were answered."""

    question: Prompt
    turn: int
    messages: list[Message]


class Subject(Protocol):
    """What is evaluated."""

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str | None: ...

    @property
    def gamma(self) -> int | None:
        """Drafts a round; None where that is not known."""

    @property
    def calibration(self) -> Calibration | None:
        """Of its confidences, if it comes with one."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What its answers depend on, beside questions, temperature and length."""

    def answer(self, asks: Sequence[Ask], temperature: float, max_tokens: int) -> Iterator[list[Record]]:
        """The records of every turn asked, some at a time."""


class Loaded(NamedTuple):
    """A drafter on disk, fit for the target."""

    path: Path
    proposer: BlockProposer | ChainProposer
    spec: DrafterSpec


def load_drafter(path: Path, target: Target, target_path: Path) -> Loaded:
    """A drafter's network and what decoding needs of it.

    Raises:
        CheckpointError: it is damaged, incomplete, of a kind that the networks here do not have, or for another target.
        DataError: the survival map in its directory cannot be used.
    """
    network, spec = load_bundle(path, target=target)
    network.to(target.device)
    spec = check_fit(spec, target.config.to_dict(), target_path)
    ids_U = torch.tensor(spec.draft_token_ids or range(spec.vocab_size), device=target.device)
    judge = survival_map_beside(path, spec.gamma, has_head=spec.has_confidence)
    return Loaded(path, proposer_of(network, target, spec.target_layer_ids, ids_U, judge), spec)


class LocalSubject:
    """Speculative decoding in this process.

    Args:
        name: how results call it.
        loaded: None decodes plainly.
        batch_size: requests decoded together.
    """

    def __init__(self, name: str, target: Target, loaded: Loaded | None, *, batch_size: int, seed: int) -> None:
        self.name = name
        self.family = loaded.spec.family if loaded else None
        self._target, self._loaded, self._batch_size, self._seed = target, loaded, batch_size, seed
        self._drafter: Drafter = loaded.proposer if loaded else NoDrafter()
        self._template = ChatTemplate.of(target)
        self.gamma = self._drafter.gamma or None
        self.calibration = _calibration(loaded) if loaded else None

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            "how": "rounds",
            "target_weights": target_fingerprint(self._target),
            "drafter": _drafter_hash(self._loaded.path) if self._loaded else None,
            "dtype": str(self._target.model.dtype),
            "batch_size": self._batch_size,
            "seed": self._seed,
        }

    def answer(self, asks: Sequence[Ask], temperature: float, max_tokens: int) -> Iterator[list[Record]]:
        by_key = {f"{ask.question.key}/{ask.turn}": ask for ask in asks}
        requests = {
            key: Request(key, self._template.prompt_ids(ask.messages), temperature, max_tokens)
            for key, ask in by_key.items()
        }
        batches = decode(
            self._target, self._drafter, list(requests.values()), batch_size=self._batch_size, seed=self._seed
        )
        for batch in batches:
            yield [self._record(by_key[d.key], requests[d.key], d) for d in batch]

    def _record(self, ask: Ask, request: Request, decoded: Decoded) -> Record:
        return Record(
            question=ask.question.key,
            turn=ask.turn,
            domain=ask.question.domain,
            text=self._target.tokenizer.decode(decoded.answer_ids, skip_special_tokens=True),
            output_tokens=len(decoded.answer_ids),
            seconds=decoded.seconds,
            rounds=len(decoded.accepted),
            round_tokens=len(decoded.answer_ids) - 1 if decoded.accepted else 0,  # the first is the prefill's
            prompt_ids=request.prompt_ids,
            answer_ids=decoded.answer_ids,
            accepted=decoded.accepted,
            verified=decoded.verified,
            confidence=rounded(decoded.confidence),
        )


class WalkSubject:
    """The rounds of a drafter counted on greedy answers that are already there: fast, temperature 0 only.

    Args:
        answers: finds the plain greedy record of a turn.
    """

    calibration = None

    def __init__(self, name: str, target: Target, loaded: Loaded, answers: Callable[[Ask], Record]) -> None:
        self.name, self.family, self.gamma = name, loaded.spec.family, loaded.proposer.gamma
        self._target, self._path, self._answers = target, loaded.path, answers
        vocab = DraftVocab(loaded.proposer.ids_U.tolist(), loaded.spec.vocab_size, target.device)
        nothing = OptimConfig(steps=1)  # nobody trains: only agreement is looked at
        self._objective = build_objective(loaded.spec.family, loaded.proposer.model, target, vocab, nothing)
        self._source = OnlineFeatures(target, loaded.proposer.layer_ids)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            "how": "walk",
            "target_weights": target_fingerprint(self._target),
            "drafter": _drafter_hash(self._path),
            "dtype": str(self._target.model.dtype),
        }

    def answer(self, asks: Sequence[Ask], temperature: float, max_tokens: int) -> Iterator[list[Record]]:
        records = [self._answers(ask) for ask in asks]
        for record in records:
            # A single token has nothing behind it to draft.
            walks = (
                [Walk([], [])]
                if record.output_tokens < 2
                else walk_drafter(self._objective, self._source, [sample_of(record)])
            )
            yield [walked(record, walks[0], self.gamma)]


def sample_of(record: Record) -> Sample:
    """The answer as walks take it."""
    start, ids = len(record.prompt_ids), record.prompt_ids + record.answer_ids
    return Sample(record.question, record.domain, 0.0, ids, [(start, len(ids))])


def walked(record: Record, walk: Walk, gamma: int) -> Record:
    """The record of an answer with the rounds of `gamma` drafts of a walk over it; it has no time of its own."""
    return record.model_copy(
        update={
            "seconds": 0.0,
            "rounds": len(walk.accepted),
            "round_tokens": record.output_tokens - 1 if walk.accepted else 0,
            "accepted": walk.accepted,
            "verified": [min(behind, gamma) for behind in walk.verified],
            "confidence": [],
        }
    )


def _calibration(loaded: Loaded) -> Calibration | None:
    path = loaded.path / FILE_NAME
    return Calibration.load(path, loaded.proposer.gamma) if path.is_file() else None


def _drafter_hash(path: Path) -> str:
    """Of every file that drafts and their confidences depend on; a calibration is applied to answers that are there."""
    digest = hashlib.sha256()
    others = (path / name for name in ("config.json", VOCABULARY_FILE, SURVIVAL_MAP))
    for file in [*sorted(path.glob("*.safetensors")), *(other for other in others if other.is_file())]:
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
