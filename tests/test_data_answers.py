"""Answers by the target in this process: several turns, what is skipped, and going on after a kill."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dspark_training.config import DataConfig, DrafterShape, RunConfig
from dspark_training.data.answers import answer
from dspark_training.data.chat import ChatTemplate
from dspark_training.data.conversation import Prompt
from dspark_training.data.skipped import Skipped
from dspark_training.data.store import SampleStore
from dspark_training.data.tokenizer import fingerprint
from dspark_training.data.tokens import build, load_samples
from dspark_training.run import run_recipe
from dspark_training.target import Target

from dspark_serving.errors import DataError
from tests.tiny_models import make_tiny_target

# Every answer of a tiny target that is not cut ends with <eos>; the template closes an old answer with it too.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }}<eos>{% endif %}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = tmp_path_factory.mktemp("target")
    make_tiny_target(path, "llama")
    loaded = Target.load(path)
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


def ask(target: Target, prompts: list[Prompt], path: Path, **options: Any) -> SampleStore:
    settings: dict[str, Any] = {"greedy_share": 1.0, "temperature": 0.8, "max_new_tokens": 24, "max_prompt_tokens": 99}
    return answer(target, prompts, path, batch_size=4, seed=0, **settings | options)


def greedy(target: Target, prompt_ids: list[int], most: int) -> list[int]:
    """What transformers says, up to and with the stop token."""
    ids = torch.tensor([prompt_ids])
    out = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
    return out[0, len(prompt_ids) :].tolist()


def test_every_turn_is_the_targets_own_answer_to_what_was_said_before(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target.model.generation_config, "eos_token_id", [511, *range(100, 511, 6)])  # stop often
    asked = [Prompt("mt", tuple({"role": "user", "content": f"{a}{i}"} for a in "pq"[: 1 + i % 2])) for i in range(40)]
    store = ask(target, asked, tmp_path / "s.jsonl", thinking=False, max_prompt_tokens=999)
    left_out = tmp_path / "s.skipped.jsonl"
    rows = [json.loads(line) for line in left_out.read_text().splitlines()] if left_out.exists() else []
    assert {row["reason"] for row in rows} <= {"empty answer"}
    assert {p.key for p in asked} == store.prompt_keys() | {row["where"] for row in rows}
    second = 0
    for sample in store:
        assert sample.thinking is False
        for start, end in sample.spans:
            before, answered = sample.ids[:start], sample.ids[start:end]
            assert answered == greedy(target, before, 24)
            second += "[q" in target.tokenizer.decode(before).replace(" ", "")
    assert second > 3, "answers that end by themselves get a second turn"
    ones = {p.key: p.text for p in asked[::2]}
    for sample in store:
        if sample.key in ones:
            expected = target.tokenizer(f"[{ones[sample.key]}]", add_special_tokens=False).input_ids
            assert sample.ids[: sample.spans[0][0]] == expected


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_and_over_long_prompts_are_written_down(target: Target, tmp_path: Path) -> None:
    asked = [Prompt.ask("chat", f"say {i}") for i in range(30)] + [Prompt.ask("chat", "x" * 200)]
    path = tmp_path / "s.jsonl"

    def kill(done: int, total: int) -> None:
        assert total == 30
        if done >= 8:
            raise KilledError

    with pytest.raises(KilledError):
        ask(target, asked, path, progress=kill)
    kept = path.read_text()
    assert kept.count("\n") == 8
    store = ask(target, asked, path)
    assert path.read_text().startswith(kept)
    assert store.prompt_keys() == {p.key for p in asked[:30]}
    (row,) = [json.loads(line) for line in path.with_suffix(".skipped.jsonl").read_text().splitlines()]
    assert row["reason"] == "prompt of more than 99 tokens"
    with pytest.raises(DataError, match="not one of 1 prompts can be used"):
        ask(target, asked[30:], tmp_path / "none.jsonl")
    few = ask(target, asked, tmp_path / "few.jsonl", max_samples=5)
    assert len(few.prompt_keys()) == 5


def test_answers_of_another_tokenizer_do_not_join_and_are_not_trained_on(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [Prompt.ask("chat", f"say {i}") for i in range(4)]
    path, own = tmp_path / "s.jsonl", fingerprint(target.tokenizer)
    ask(target, asked[:2], path)
    before = path.read_bytes()
    build([path], tmp_path / "store", Skipped(None))
    assert load_samples(path, own) == list(load_samples(tmp_path / "store", own))
    build([tmp_path / "store"], tmp_path / "again", Skipped(None))
    monkeypatch.setattr(target.tokenizer, "chat_template", TEMPLATE + " ")
    with pytest.raises(DataError, match=r"s\.jsonl come from another tokenizer"):
        ask(target, asked, path)
    assert path.read_bytes() == before
    with pytest.raises(DataError, match="come from another tokenizer"):
        build([path], tmp_path / "new", Skipped(None), template=ChatTemplate.of(target))
    given = RunConfig(data=DataConfig(samples=""), drafter=DrafterShape(target_layer_ids=(0, 2), mask_token_id=3))
    for kept in (path, tmp_path / "store", tmp_path / "again"):
        config = given.model_copy(update={"data": DataConfig(samples=str(kept))})
        with pytest.raises(DataError, match=f"{kept} come from another tokenizer"):
            run_recipe(config, target, tmp_path / "b", tmp_path / "w", [], lambda step: None, lambda *stage: None)
    Path(f"{path}.tokenizer").unlink()  # as files of earlier versions are
    assert len(ask(target, asked, path).prompt_keys()) == 4
    monkeypatch.setattr(target.tokenizer, "chat_template", TEMPLATE)
    other = copy.deepcopy(target.tokenizer)
    assert fingerprint(other) == own
    other.add_tokens(["new"])
    assert fingerprint(other) != own


def test_a_conversation_that_the_template_refuses_at_its_second_turn_stops_no_other(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target.model.generation_config, "eos_token_id", [511, *range(100, 511, 6)])  # stop often
    refusal = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not so') }}{% endif %}{% endfor %}"
    monkeypatch.setattr(target.tokenizer, "chat_template", refusal + TEMPLATE)
    turns = [(f"p{i}", "no")[: 1 + i % 2] for i in range(40)]
    asked = [Prompt("mt", tuple({"role": "user", "content": text} for text in said)) for said in turns]
    path = tmp_path / "s.jsonl"
    kept = ask(target, asked, path, max_prompt_tokens=999).prompt_keys()
    rows = [json.loads(line) for line in path.with_suffix(".skipped.jsonl").read_text().splitlines()]
    refused = {row["where"] for row in rows if "not so" in row["reason"]}
    assert len(refused) > 3, "answers that end by themselves would get a second turn"
    assert refused <= {p.key for p in asked[1::2]}
    assert not refused & kept
    assert {p.key for p in asked} == kept | {row["where"] for row in rows}
