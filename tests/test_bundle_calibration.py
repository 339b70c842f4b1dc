"""Calibration from held-out answers: the rounds are those of real decoding, and the fit is the one of the server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dspark_training.bundle.amend import add_cost_tables, calibrate_bundle
from dspark_training.bundle.calibrate import answered, fit_and_score, held_out_labels
from dspark_training.bundle.card import quality_section
from dspark_training.bundle.export import Confidence, load_bundle, save_confidence
from dspark_training.bundle.manifest import check_manifest
from dspark_training.bundle.rounds import HeldOutRounds, held_out_rounds
from dspark_training.data.conversation import Prompt
from dspark_training.data.store import Sample
from dspark_training.data.vocab import DraftVocab
from dspark_training.features.source import OnlineFeatures
from dspark_training.models.backbone import BlockDrafter
from typer.testing import CliRunner

from dspark_serving.cli.main import app
from dspark_serving.drafters import make_view, read_spec
from dspark_serving.drafters.spec import Family
from dspark_serving.errors import DataError
from dspark_serving.scheduler.calibration import Calibration, logit, sigmoid
from dspark_serving.scheduler.calibration_fit import fit_temperatures
from dspark_serving.scheduler.cost_table import COST_DIRECTORY, checkpoint_identity, load_cost, save_cost
from dspark_serving.scheduler.survival_map import STATISTICS, SurvivalMap
from tests.bundle_models import LAYER_IDS, PROMPT, SOME_IDS, Exported, export_tiny
from tests.oracle import speculative_decode
from tests.test_cost_table import KEY, fitted

PROMPTS = [Prompt.ask("chat", text) for text in ("abcab", "hello he", "xyxyxy", "0123", "aab", "zzz", "qw qw", "..;..")]


def walked(exported: Exported, samples: list[Sample], seed: int = 0) -> HeldOutRounds:
    drafter, spec = load_bundle(exported.path)
    vocab = DraftVocab(spec.draft_token_ids or range(spec.vocab_size), spec.vocab_size)
    return held_out_rounds(
        exported.target, drafter, OnlineFeatures(exported.target, LAYER_IDS), vocab, samples, seed=seed
    )


def test_greedy_rounds_are_those_of_real_decoding(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, "dspark")
    drafter, _ = load_bundle(exported.path)
    assert isinstance(drafter, BlockDrafter)
    decoded = speculative_decode(drafter, exported.target.model, LAYER_IDS, PROMPT, 60)
    sample = Sample("x", "math", 0.0, PROMPT + decoded.tokens, [(len(PROMPT), len(PROMPT) + len(decoded.tokens))])
    rounds = walked(exported, [sample])
    whole = rounds.verify_lens_N == 5
    count = int(whole.sum())
    assert count > 10
    assert rounds.accepted_N[whole].tolist() == decoded.accepted[:count]
    assert (rounds.accepted_N < rounds.verify_lens_N).all()
    assert rounds.confidence_NG is not None
    assert ((rounds.confidence_NG > 0) & (rounds.confidence_NG < 1)).all()


def test_answers_that_are_no_plain_draw_of_the_targets_are_left_out(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, "dspark")
    ids = [*PROMPT, 10, 11, 12, 13]
    whole = Sample("whole", "x", 0.8, ids, [(len(PROMPT), len(ids))])
    cut, greedy = whole._replace(key="cut", top_p=0.9), whole._replace(key="greedy", temperature=0.0, top_p=0.9)
    rounds = walked(exported, [cut, whole, greedy, whole._replace(key="given", temperature=None)])
    assert sorted(set(rounds.temperature_N.tolist())) == [0.0, 0.8]
    assert len(set(rounds.sample_N.tolist())) == 2, "top_p cuts nothing of a greedy answer"


def test_confidences_behind_a_rejection_are_of_the_drafters_own_tokens(tmp_path: Path) -> None:
    """As in serving: what the text goes on with must not be seen by rows that follow a rejected draft."""
    exported = export_tiny(tmp_path, "dspark")
    answer = [10, 11, 12, 13, 14, 15]
    texts = [answer, [*answer[:1], 300, 301, 302, 303, 304]]
    samples = [Sample(str(i), "math", 0.0, PROMPT + t, [(len(PROMPT), len(PROMPT) + 6)]) for i, t in enumerate(texts)]
    one, other = (walked(exported, [sample]) for sample in samples)
    assert one.accepted_N[0] == other.accepted_N[0] == 0  # random text: nothing is accepted
    assert one.confidence_NG is not None
    assert other.confidence_NG is not None
    np.testing.assert_allclose(one.confidence_NG[0], other.confidence_NG[0], rtol=1e-5)


@pytest.mark.parametrize("ids", [None, SOME_IDS], ids=["whole", "reduced"])
def test_sampled_drafts_are_accepted_as_often_as_the_rejection_rule_does(
    tmp_path: Path, ids: tuple[int, ...] | None
) -> None:
    """First drafts: the expected acceptance is sum_x min(p(x), q(x)), computed here from the distributions."""
    exported = export_tiny(tmp_path, "dflash", ids=ids)
    drafter, heat = exported.drafter, 1.3
    assert isinstance(drafter, BlockDrafter)
    ids_BT = torch.tensor([PROMPT])
    features = exported.target.features(ids_BT, torch.ones_like(ids_BT), LAYER_IDS)
    anchor = torch.tensor([[len(PROMPT) - 1]])
    with torch.no_grad():
        hidden = drafter.hidden(features.context_BTM, anchor, torch.tensor([[PROMPT[-1]]]), exported.target.embed)
        allowed = exported.vocab.ids_V
        q = torch.zeros(512)
        q[allowed] = torch.softmax(hidden[0, 0, 0] @ exported.target.lm_head_weight_VD[allowed].T / heat, -1)
        p = torch.softmax(features.last_BTD[0, -1] @ exported.target.lm_head_weight_VD.T / heat, -1)
    want = float(torch.minimum(p, q).sum())
    assert 0.02 < want < 0.98
    drawn = torch.multinomial(p, 1500, replacement=True, generator=torch.Generator().manual_seed(5)).tolist()
    end = len(PROMPT) + 1
    samples = [Sample(str(i), "x", heat, [*PROMPT, token], [(end - 2, end)]) for i, token in enumerate(drawn)]
    rounds = walked(exported, samples)
    assert rounds.verify_lens_N.tolist() == [2] * 1500  # the answer ends: what follows is not known
    share = float((rounds.accepted_N >= 1).mean())
    assert share == pytest.approx(want, abs=4 * (want * (1 - want) / 1500) ** 0.5)


def synthetic(temperature: float, count: int = 4000, *, head_noise: float = 0.0) -> HeldOutRounds:
    """Rounds of a head whose logits are `temperature` times too extreme, and noisy; the statistics are a bit noisy."""
    rng = np.random.default_rng(3)
    truth = sigmoid(rng.normal(1.0, 1.0, size=(count, 4)).astype(np.float32))
    accepted = (rng.random((count, 4)) < truth).cumprod(axis=1).sum(axis=1)
    noise = rng.normal(size=(2, count, 4)).astype(np.float32)
    claimed = sigmoid((logit(truth) + head_noise * noise[0]) * np.float32(temperature))
    seen = logit(truth) + 0.3 * noise[1]
    statistics = np.stack([seen, np.abs(seen), 1 - sigmoid(seen)], axis=-1)
    return HeldOutRounds(
        np.arange(count) // 10, np.zeros(count), np.full(count, 5), accepted, claimed, statistics.astype(np.float32)
    )


def test_a_known_temperature_is_found_and_lowers_the_error_elsewhere() -> None:
    fit = fit_and_score(synthetic(2.0))
    assert fit is not None
    assert fit.confidence.calibration is not None
    assert fit.confidence.calibration.temperatures_G == pytest.approx((2.0,) * 4, rel=0.3)
    assert fit.confidence.calibration.fitted_on["answers"] == 400
    assert all(new.ece < old.ece / 2 for old, new in zip(fit.before, fit.after, strict=True))


def test_the_fit_is_the_one_from_recordings() -> None:
    rounds, fit = synthetic(2.0), fit_and_score(synthetic(2.0))
    assert fit is not None
    assert fit.confidence.calibration is not None
    assert fit_temperatures(held_out_labels(rounds)).temperatures_G == fit.confidence.calibration.temperatures_G


def test_without_a_head_a_survival_map_is_fitted() -> None:
    fit = fit_and_score(synthetic(2.0)._replace(confidence_NG=None))
    assert fit is not None
    found = fit.confidence.survival_map
    assert found is not None
    assert found.greedy != SurvivalMap.default(4).greedy
    assert found.sampled == SurvivalMap.default(4).sampled  # no sampled rounds
    assert np.mean([score.ece for score in fit.after]) < 0.03


def test_a_map_takes_the_place_of_a_head_that_ranks_worse() -> None:
    good, bad = fit_and_score(synthetic(1.0)), fit_and_score(synthetic(1.0, head_noise=2.0))
    assert good is not None
    assert bad is not None
    assert good.confidence.survival_map is None
    assert bad.confidence.survival_map is not None
    assert all(new.auroc > old.auroc for old, new in zip(bad.before, bad.after, strict=True))
    assert "judged by survival_map.json" in quality_section(bad, 400)
    assert "judged by the confidence head" in quality_section(good, 400)


def test_a_new_fit_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    save_confidence(tmp_path, Confidence(Calibration.identity(4), SurvivalMap.default(4)))
    save_confidence(tmp_path, Confidence(None, SurvivalMap.default(4)))
    assert [path.name for path in tmp_path.iterdir()] == ["survival_map.json"]


def test_too_few_rounds_fit_nothing() -> None:
    assert fit_and_score(synthetic(2.0, count=60)) is None


@pytest.mark.parametrize("family", ["dspark", "dflash", "eagle3"])
def test_a_calibrated_bundle_is_what_the_server_reads(tmp_path: Path, family: Family) -> None:
    exported = export_tiny(tmp_path, family, ids=SOME_IDS)
    calibrate_bundle(
        exported.path, exported.target, PROMPTS, temperatures=(0.0, 1.0), max_new_tokens=80, batch_size=8
    )  # fmt: skip
    check_manifest(exported.path)
    view = make_view(read_spec(exported.path), tmp_path / "cache")
    mapped = (view / "survival_map.json").exists()
    assert mapped or family == "dspark"
    if mapped:
        assert SurvivalMap.load(view / "survival_map.json", 4).fitted_on
    if (view / "calibration.json").exists():
        assert Calibration.load(view / "calibration.json", 4).gamma == 4
    card = (exported.path / "README.md").read_text()
    assert card.startswith("# a card")
    assert "predicted survival of drafts" in card
    assert ("judged by survival_map.json" in card) == mapped


def test_the_command_calibrates_and_shows_what_it_gained(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, "dflash")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in PROMPTS))
    options = ["--target", str(tmp_path / "llama"), "--prompts", str(prompts), "--dtype", "float32"]
    command = ["bundle", "calibrate", str(exported.path), *options, "--max-new-tokens", "80"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "AUROC" in done.output
    SurvivalMap.load(exported.path / "survival_map.json", 4)
    wrong = CliRunner().invoke(app, [*command, "--dtype", "int4"])
    assert (wrong.exit_code, "int4" in wrong.stderr) == (2, True)


def test_too_few_answers_leave_the_bundle_alone(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, "dspark")
    before = (exported.path / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="too few rounds"):
        calibrate_bundle(
            exported.path, exported.target, PROMPTS[:1], temperatures=(0.0,), max_new_tokens=4, batch_size=8
        )
    assert (exported.path / "manifest.json").read_bytes() == before


def test_answers_are_the_targets_greedy_ones(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, "dflash")
    for prompt, sample in zip(
        PROMPTS, answered(exported.target, PROMPTS, 0.0, max_new_tokens=9, batch_size=3), strict=True
    ):
        ids = exported.target.chat_ids(prompt.text)
        alone = exported.target.model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)[0].tolist()
        assert sample.ids == alone
        assert sample.spans == [(len(ids), len(alone))]


def test_an_answer_is_to_all_that_stands_before_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """System text and tools included; the first of several, and none where the template refuses the conversation."""
    exported = export_tiny(tmp_path, "dflash")
    exported.target.tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }}:{% endfor %}{% for m in messages %}"
        "{% if m.content == 'no' %}{{ raise_exception('not so') }}{% endif %}[{{ m.content }}]{% endfor %}"
    )
    texts = (("system", "be"), ("user", "hi"), ("user", "so"))
    tool = {"type": "function", "function": {"name": "f"}}
    prompt = Prompt("chat", tuple({"role": role, "content": text} for role, text in texts), (tool,))
    asked = [Prompt.ask("chat", "no"), prompt]
    (sample,) = answered(exported.target, asked, 0.0, max_new_tokens=9, batch_size=2)
    ((start, end),) = sample.spans
    assert sample.ids[:start] == exported.target.tokenizer("f:[be][hi]", add_special_tokens=False).input_ids
    assert (sample.key, end) == (prompt.key, len(sample.ids))
    assert "1 skipped (1 the chat template refuses the conversation (not so))" in caplog.text


def test_statistics_are_those_of_logits_over_the_whole_vocabulary(tmp_path: Path) -> None:
    from dspark_training.bundle.rounds import _statistics

    from dspark_serving.scheduler.survival_map import draft_statistics

    logits = torch.randn(2, 3, len(SOME_IDS))
    whole = torch.full((2, 3, 512), -torch.inf)
    whole[..., list(SOME_IDS)] = logits / 0.7
    heat = torch.full((2, 3), 0.7)
    torch.testing.assert_close(_statistics(logits, heat, 512), draft_statistics(whole))
    assert len(STATISTICS) == 3


def test_cost_tables_of_this_machine_travel_with_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    exported = export_tiny(tmp_path, "dspark")
    with pytest.raises(DataError, match="no server on this machine"):
        add_cost_tables(exported.path)
    identity = checkpoint_identity(make_view(read_spec(exported.path), tmp_path / "cache"))
    key = KEY.model_copy(update={"drafter": identity})
    save_cost(tmp_path / "cache" / COST_DIRECTORY, key, fitted())
    save_cost(tmp_path / "cache" / COST_DIRECTORY, KEY, fitted())  # of another drafter
    assert add_cost_tables(exported.path) == [key.file_name]
    check_manifest(exported.path)
    # Elsewhere: another cache, the bundle in another place.
    moved = exported.path.rename(tmp_path / "elsewhere")
    view = make_view(read_spec(moved), tmp_path / "other-cache")
    assert checkpoint_identity(view) == identity
    found = load_cost(view / COST_DIRECTORY, key)
    assert found is not None
    assert found.samples == fitted().samples
    json.loads((view / COST_DIRECTORY / key.file_name).read_text())
