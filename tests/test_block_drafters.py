"""DSpark and DFlash drafters of every kind on real servers: drafts as an independent reference drafts, text as without.

One tiny random target and drafter in fp32 for each server; the policy is switched while it runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from dspark_serving.drafters import canonical_names, check_fit, make_view, read_spec
from tests import draft_spy
from tests.block_reference import BlockReference
from tests.published_formats import write_published
from tests.server import Server, serve, speculation
from tests.tiny_blocks import DFLASH, make_tiny_block
from tests.tiny_models import Arch, load_tiny_target, make_tiny_target

pytestmark = pytest.mark.real_server

PROMPTS = [[5, 6, 7, 8], list(range(40, 90)), [17, 300, 4, 99, 260, 31]]
TOKENS = 24


class Case(NamedTuple):
    """What one server serves."""

    algorithm: str  # as typed
    target: Arch
    drafter: dict[str, Any] | str  # fields of a canonical one, or a published format


CASES = {
    "z-lab": Case("dflash", "qwen3", "z-lab-dflash"),
    "z-lab-windowed": Case("dflash", "qwen3", "z-lab-dflash-windowed"),
    "specforge-dflash": Case("dflash", "llama", "specforge-dflash"),
    "speculators-dflash": Case("dflash", "qwen2", "speculators-dflash"),
    "deepspec-dflash": Case("dflash", "qwen3", "deepspec-dflash"),
    "deepspec-rnn": Case("dspark", "qwen3", "deepspec-dspark-rnn"),
    "dflash-anchor-llama-layers": Case("DFlash", "llama", DFLASH | {"layer_kind": "llama", "attention_bias": True}),
    "deepspec-gated": Case("dspark", "qwen2", "deepspec-dspark-gated"),
    "rnn-llama-layers": Case(
        "DSpark", "gemma3", {"markov_head_type": "rnn", "layer_kind": "llama", "confidence_head_with_markov": False}
    ),
    "deepspec-gemma4": Case("dspark", "gemma4", "deepspec-gemma4-dspark"),
    "no-markov-own-vocabulary": Case(
        "dspark",
        "qwen3",
        DFLASH
        | {
            "family": "dspark",
            "enable_confidence_head": True,
            "own_embedding": True,
            "own_head": True,
            "draft_token_ids": list(range(7, 407, 5)),
        },
    ),
    "speculators-windowed": Case("dspark", "llama", "speculators-dspark-windowed"),
    "specforge-windowed-causal": Case("dspark", "qwen3", "specforge-dspark-windowed"),
}


class Served(NamedTuple):
    server: Server
    spied: Path
    case: Case
    target: PreTrainedModel
    reference: BlockReference

    def answers(self, concurrency: int) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda prompt: self.server.generate(prompt, max_new_tokens=TOKENS), PROMPTS))

    def features(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            hidden = self.target(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return torch.cat([hidden[layer + 1][0] for layer in self.reference.config["target_layer_ids"]], dim=-1)


@pytest.fixture(scope="module", params=CASES, ids=str)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    case, root = CASES[request.param], tmp_path_factory.mktemp("block")
    config = make_tiny_target(root / "target", case.target)
    drafter = root / "drafter"
    if isinstance(case.drafter, str):
        write_published(drafter, config, case.drafter, layer_ids=(0, 2))
    else:
        make_tiny_block(drafter, config, **case.drafter)
    target = load_tiny_target(root / "target", case.target)
    spec = check_fit(read_spec(drafter), config)
    reference = BlockReference(
        make_view(spec, root / "reference"),
        target.get_input_embeddings().weight.detach(),
        target.get_output_embeddings().weight.detach(),
        canonical_names(spec.format),
    )
    options = [*speculation(drafter, case.algorithm), "--dspark-policy", "full", "--dspark-profile-seconds", "0"]
    environment = draft_spy.environment(root)
    with serve(root / "target", *options, log=root / "server.log", environment=environment) as server:
        yield Served(server, root, case, target, reference)


@pytest.fixture(scope="module")
def plain(served: Served) -> list[list[int]]:
    """Greedy tokens of the target alone, by transformers."""
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            out = served.target.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
        found.append(out[0, len(prompt) :].tolist())
    return found


def test_the_plugin_serves_it_and_names_its_family(served: Served) -> None:
    report = served.server.report()
    assert (report["active"], report["family"]) == (True, served.reference.config["family"])


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("policy", ["off", "full", "threshold"])
def test_greedy_text_is_the_targets_own(served: Served, plain: list[list[int]], policy: str, concurrency: int) -> None:
    served.server.use(policy, **({"threshold": 0.5} if policy == "threshold" else {}))
    before = served.server.report()
    assert [answer["output_ids"] for answer in served.answers(concurrency)] == plain
    report = served.server.report()
    rounds, rows = (report[name] - before[name] for name in ("request_rounds", "verified_tokens"))
    if policy == "threshold" and served.reference.config["enable_confidence_head"]:
        assert rounds < rows < (1 + served.reference.config["block_size"]) * rounds


def test_drafts_equal_the_reference(served: Served) -> None:
    served.server.use("full")
    compared = 0
    for answer, prompt in zip(served.answers(1), PROMPTS, strict=True):
        blocks = draft_spy.drafts_by_request(served.spied)[answer["meta_info"]["id"]]
        ids, done = [*prompt, *answer["output_ids"]], len(prompt) + 1  # prefill gives the first anchor
        for block in blocks:
            context = ids[: done - 1]
            assert block == served.reference.draft(served.features(context), ids[done - 1]).tokens
            accepted = next((k for k, token in enumerate(block) if token != ids[done + k]), len(block))
            done += accepted + 1
            compared += 1
            if done + len(block) > len(ids):
                break
    assert compared > 3 * len(PROMPTS)


def test_the_reference_depends_on_the_context(served: Served) -> None:
    """Negative control: a drafter that does not see the target's features drafts something else."""
    features = served.features(PROMPTS[1])
    assert served.reference.draft(features, 9).tokens != served.reference.draft(torch.zeros_like(features), 9).tokens


@pytest.mark.parametrize("ignored", ["window", "direction"])
def test_the_reference_depends_on_what_rows_see(served: Served, ignored: str) -> None:
    """Negative control: rows that see beyond the window, or in the other direction, draft something else.

    Without a window neither changes anything.
    """
    reference = copy.copy(served.reference)
    windowed = "sliding_attention" in reference.config["layer_types"]
    changed = (
        {"sliding_window": 2048} if ignored == "window" else {"is_causal": not reference.config.get("is_causal", True)}
    )
    reference.config = reference.config | changed
    features = served.features(PROMPTS[1])
    assert (served.reference.draft(features, 9).tokens != reference.draft(features, 9).tokens) == windowed


def test_sampling_finishes(served: Served) -> None:
    answer = served.server.generate(PROMPTS[1], temperature=1.0, top_p=0.9, max_new_tokens=TOKENS, ignore_eos=True)
    assert len(answer["output_ids"]) == TOKENS
