"""What an evaluation says of its answers: lengths, intervals, acceptance by position, differences, confidence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from dspark_training.evaluation.figures import (
    accepted_length,
    conditional_acceptance,
    difference,
    labels_of,
    position_rows,
)
from dspark_training.evaluation.questions import SOURCES, questions_of, read_questions
from dspark_training.evaluation.records import Record, RecordFile
from dspark_training.evaluation.subjects import sample_of, walked
from dspark_training.evaluation.walk import walk, walk_prompt_lookup

from dspark_serving.errors import DataError
from dspark_serving.scheduler.calibration import Calibration


def record(question: str, accepted: list[int], verified: list[int] | None = None, **others: object) -> Record:
    rounds = len(accepted)
    known = {"turn": 0, "domain": "math", "text": "", "output_tokens": 1 + rounds + sum(accepted), "seconds": 1.0}
    return Record(
        question=question,
        rounds=rounds,
        round_tokens=rounds + sum(accepted),
        accepted=accepted,
        verified=verified or [4] * rounds,
        **(known | others),
    )


def test_accepted_length_weighs_rounds_alike() -> None:
    found = accepted_length([record("a", [0]), record("b", [3, 3, 3])])
    assert found.value == (1 + 4 * 3) / 4
    assert found.low <= found.value <= found.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(200):
        # answers differ in how easy they are: rounds of one answer are alike
        answers = []
        for i in range(40):
            ease = rng.choice([0.2, 0.8])
            answers.append(record(str(i), [int(rng.random() < ease) for _ in range(20)]))
        found = accepted_length(answers)
        hits += found.low <= 1.5 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_a_paired_difference_is_narrower_than_the_lengths_it_is_of() -> None:
    rng = random.Random(1)
    ours, theirs = [], []
    for i in range(50):
        ease = rng.randrange(4)
        theirs.append(record(str(i), [ease] * 10))
        ours.append(record(str(i), [ease] * 9 + [4]))
    found, single = difference(ours, theirs), accepted_length(ours)
    assert found.low > 0, "a small gain on every question is certain"
    assert found.high - found.low < (single.high - single.low) / 3
    nothing = difference(ours, ours)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_only_questions_of_both_are_compared() -> None:
    assert difference([record("a", [3]), record("b", [0])], [record("a", [1])]).value == 2


def test_conditional_acceptance_counts_what_was_reached_and_known() -> None:
    rounds = record("a", [0, 2, 4, 1], [4, 4, 4, 1])  # the last answer ends at its first draft
    # position 1: 4 rounds, 3 kept; 2: those with 1 kept, without the cut one: 2, both kept; 3: 2, one kept; 4: 1 of 1
    assert conditional_acceptance([rounds], 4) == [3 / 4, 1.0, 1 / 2, 1.0]
    assert conditional_acceptance([record("a", [0])], 2) == [0.0, None]


def test_drafts_behind_the_end_of_a_walked_answer_are_left_out() -> None:
    """Two tokens are left and both match: of five drafts the third is neither kept nor rejected."""
    answered = record("a", [], output_tokens=3, prompt_ids=[1, 7, 8, 9, 2], answer_ids=[7, 8, 9])
    found = walked(answered, walk_prompt_lookup(sample_of(answered), 5), 5)
    assert (found.accepted, found.verified) == ([2], [2])
    assert conditional_acceptance([found], 5) == [1.0, 1.0, None, None, None]
    assert walked(answered, walk([0] * 7), 5).verified == [5, 5, 5, 4, 3, 2, 1]


def test_confidence_quality_knows_a_good_head_from_a_bad_one() -> None:
    rng = np.random.default_rng(0)
    true_N2 = rng.uniform(size=(4000, 2))
    kept_N2 = (rng.uniform(size=true_N2.shape) < true_N2).cumprod(axis=1)
    good = record("a", kept_N2.sum(1).tolist(), [2] * 4000, confidence=true_N2.tolist())
    bad = record("a", kept_N2.sum(1).tolist(), [2] * 4000, confidence=(1 - true_N2).tolist())
    labels = labels_of([good]), labels_of([bad])
    assert labels[0] is not None
    assert labels[1] is not None
    one, two = (position_rows(found, None, {}) for found in labels if found is not None)
    assert all(row["ece"] < 0.04 and row["auroc"] > 0.8 for row in one)
    assert two[0]["ece"] > 0.3
    assert two[0]["auroc"] < 0.3
    calibrated = position_rows(labels[0], Calibration((2.0, 2.0)), {})
    assert [row["confidence"] for row in calibrated] == ["raw", "raw", "calibrated", "calibrated"]
    assert calibrated[2]["ece"] > calibrated[0]["ece"], "a wrong temperature must show"
    assert labels_of([record("a", [1])]) is None


ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "2 + 2?", "answer": "4"},
    "math500": {"problem": "Find $x$.", "solution": "", "answer": "1", "subject": "Algebra", "level": 1},
    "aime25": {"problem": "Find $n$.", "answer": 70, "problem_idx": 1},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "entry_point": "f"},
    "mbpp": {"task_id": 2, "prompt": "Write a function that adds.", "code": "", "test_list": ["assert"]},
    "livecodebench": {"question_content": "Sum the numbers.", "starter_code": "class Solution:", "platform": "x"},
    "mt-bench": {"category": "writing", "prompt": ["Write a poem.", "Shorten it."], "reference": []},
    "alpaca": {"instruction": "Translate.", "input": "Bonjour", "output": "Hello", "text": "..."},
    "arena-hard-v2": {"uid": "1", "category": "hard_prompt", "prompt": "Explain TCP."},
}
WORDS = {"livecodebench": "class Solution:", "alpaca": "Bonjour", "humaneval": "def f(x):", "gsm8k": "boxed{}"}


def test_every_published_dataset_has_a_mapping_and_a_test() -> None:
    assert set(ROWS) == set(SOURCES)


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_published_layout_become_questions(name: str, tmp_path: Path) -> None:
    split = SOURCES[name].split
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.Dataset.from_list([ROWS[name], ROWS[name]]).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    found, questions = read_questions(f"{name}={tmp_path}", 0, turns=2)
    assert found == name
    assert [q.domain for q in questions] == [SOURCES[name].domain], "equal questions are asked once"
    assert len(list(questions[0].openings())) == (2 if name == "mt-bench" else 1)
    assert WORDS.get(name, "") in questions[0].messages[0]["content"]


def test_a_row_without_its_columns_is_named() -> None:
    with pytest.raises(DataError, match=r"row 1 of gsm8k .*question"):
        questions_of("gsm8k", [ROWS["gsm8k"], {"prompt": "x"}])
    with pytest.raises(DataError, match="row 0 of arena-hard-v2"):
        questions_of("arena-hard-v2", [{"prompt": " "}])


def test_a_file_of_turns_or_prompts(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"turns": ["one", "two"]}\n{"prompt": "three", "domain": "code"}\n')
    name, questions = read_questions(f"gsm8k={path}", 10)
    assert name == "gsm8k"
    assert [(q.domain, [m["content"] for m in q.messages]) for q in questions] == [
        ("math", ["one"]),
        ("code", ["three"]),
    ]
    assert [m["content"] for m in read_questions(f"mine={path}", 0, turns=5)[1][0].messages] == ["one", "two"]


def test_a_part_of_a_dataset_is_spread_over_it(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(100)))
    assert [q.text for q in read_questions(f"x={path}", 4)[1]] == ["0", "25", "50", "75"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"domain": "math"}', '{"turns": []}', '{"turns": [1]}'])
def test_a_malformed_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"q\.jsonl:2"):
        read_questions(f"x={path}", 0)


def test_an_unknown_dataset_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="arena-hard-v2"):
        read_questions("gsm9k", 1)
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        read_questions(f"mine={tmp_path}/missing.jsonl", 1)


def test_records_survive_a_kill_and_refuse_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    file = RecordFile(path, {"max_tokens": 5})
    file.add([record("b", [1], confidence=[[0.5, 0.25]]), record("a", [2])])
    with path.open("a") as opened:
        opened.write('{"question": "half')
    again = RecordFile(path, {"max_tokens": 5})
    assert again.records == file.records
    assert [r.question for r in again.answers_to(["a", "b"])] == ["a", "b"]
    with pytest.raises(DataError, match="max_tokens"):
        RecordFile(path, {"max_tokens": 6})
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(DataError, match="damaged"):
        RecordFile(path, {"max_tokens": 5})
