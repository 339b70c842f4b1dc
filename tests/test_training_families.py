"""Every algorithm and head, for targets of every shape, by the same calls: only the target's path changes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
import torch
from dspark_training.bundle.export import export_bundle, load_bundle
from dspark_training.config import DataConfig, DrafterShape, OptimConfig, RunConfig
from dspark_training.data.blocks import pad
from dspark_training.data.generate import Request, complete
from dspark_training.data.store import Sample
from dspark_training.models.eagle3 import Eagle3Drafter
from dspark_training.models.setup import Drafter, dims_for, new_drafter
from dspark_training.target import Target
from dspark_training.trainer import Trainer
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from dspark_serving.drafters import check_fit, make_view
from dspark_serving.errors import CheckpointError
from tests import eagle3_models
from tests.block_reference import BlockReference
from tests.sampled_distribution import chi_square, of_text
from tests.tiny_models import Arch, make_tiny_target, write_tokenizer

LAYER_IDS = (0, 2)
GAMMA = 3
ALGORITHMS = ["dspark-vanilla", "dspark-gated", "dspark-rnn", "dflash", "eagle3"]
PROMPT = [40, 41, 42, 70, 71, 40, 41, 42]


@pytest.fixture(scope="module", params=get_args(Arch))
def target_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_tiny_target(path, request.param)
    return path


@pytest.fixture(scope="module")
def target(target_path: Path) -> Target:
    return Target.load(target_path)


def shape(name: str, **fields: Any) -> DrafterShape:
    head = name.partition("-")[2] or "vanilla"
    sizes: dict[str, Any] = {"mask_token_id": 3, "markov_rank": 4, "draft_vocab_size": 128, "block_size": GAMMA}
    return DrafterShape(target_layer_ids=LAYER_IDS, markov_head_type=head, **sizes | fields)


def samples(n: int = 24) -> list[Sample]:
    rng, rows = random.Random(0), []
    for i in range(n):
        prompt = [rng.randrange(500) for _ in range(rng.randrange(3, 9))]
        ids = prompt + [(i + 3 * j) % 90 for j in range(16)]
        rows.append(Sample(f"{i:03}", "math", 0.0, ids, [(len(prompt), len(ids))]))
    return rows


def trained(name: str, target: Target, output: Path, steps: int = 30) -> Trainer:
    config = RunConfig(
        algorithm=name.partition("-")[0],
        data=DataConfig(prompts=(), validation_share=0.2),
        drafter=shape(name),
        optim=OptimConfig(steps=steps, sequences=4, anchors=6, learning_rate=3e-3, pool=2),
        validate_every_steps=steps // 3,
    )
    trainer = Trainer(config, target, samples(), output)
    trainer.run()
    return trainer


@pytest.mark.parametrize("name", ALGORITHMS)
def test_training_learns_and_the_export_computes_the_same(
    target: Target, target_path: Path, tmp_path: Path, name: str
) -> None:
    trainer = trained(name, target, tmp_path / "work")
    losses = [row["validation_loss"] for row in trainer.history]
    assert losses[-1] < losses[0]
    shape_, vocab, scale = trainer.config.drafter, trainer.vocab, trainer.scale_M
    export_bundle(tmp_path / "bundle", trainer.drafter, target, shape_, vocab, scale, "card", {})
    served, spec = load_bundle(tmp_path / "bundle")
    check_fit(spec, json.loads((target_path / "config.json").read_text()))
    assert spec.family == name.partition("-")[0]
    features = features_of(target, PROMPT)[:, :-1]
    with torch.no_grad():
        want = hidden_of(trainer.drafter, features * scale, target)
        got = hidden_of(served, features, target)
        assert (got - want).norm() / want.norm() < 0.05  # bf16 weights
        # What a server reads from the files, by their definition.
        drafted = served_draft(make_view(spec, tmp_path / "views"), target, features[0])
        assert drafted == greedy(served, target, vocab.ids_V, features)


def features_of(target: Target, ids: list[int]) -> Tensor:
    ids_BT = torch.tensor([ids])
    return target.features(ids_BT, torch.ones_like(ids_BT), LAYER_IDS).context_BTM.float()


def hidden_of(drafter: Drafter, features: Tensor, target: Target) -> Tensor:
    """Rows behind the last token of PROMPT, teacher-forced on some tokens where the drafter sees them."""
    anchors, previous = torch.tensor([[len(PROMPT) - 1]]), torch.tensor([[[PROMPT[-1], 5, 6]]])
    padded = torch.nn.functional.pad(features, (0, 0, 0, 1))
    if isinstance(drafter, Eagle3Drafter):
        return drafter(padded, torch.tensor([[*PROMPT[1:], 0]]), anchors, previous, target.embed)
    return drafter.hidden(padded, anchors, previous[..., 0], target.embed)


def greedy(drafter: Drafter, target: Target, ids_V: Tensor, features: Tensor) -> list[int]:
    """The block that the plain drafter drafts behind the last token of PROMPT."""
    head_VD, tokens = target.lm_head_weight_VD[ids_V], [PROMPT[-1]]
    if isinstance(drafter, Eagle3Drafter):
        context = drafter.context(features, torch.tensor([PROMPT[1:]]), torch.tensor([0]), target.embed)
        chain = drafter.begin(context, torch.tensor([[len(PROMPT) - 1]]))
        for _ in range(GAMMA):
            hidden, chain = drafter.step(context.rows, chain, torch.tensor([[tokens[-1]]]), target.embed)
            tokens.append(int(ids_V[(head_VD @ hidden[0, 0]).argmax()]))
        return tokens[1:]
    hidden_KD = hidden_of(drafter, features, target)[0, 0]
    for k in range(GAMMA):
        logits_V = target.soft_cap(head_VD @ hidden_KD[k])
        if drafter.markov_head is not None:
            latent_KR = drafter.markov_head.latent(hidden_KD[: k + 1], torch.tensor(tokens))
            logits_V = logits_V + drafter.markov_head.markov_w2.weight[ids_V] @ latent_KR[-1]
        tokens.append(int(ids_V[logits_V.argmax()]))
    return tokens[1:]


def served_draft(view: Path, target: Target, features_TM: Tensor) -> list[int]:
    """The same by the references that the served drafters are compared with; weights are taken as the file has them."""
    embedding, head = target.model.get_input_embeddings().weight, target.lm_head_weight_VD
    if json.loads((view / "config.json").read_text())["family"] == "eagle3":
        drafter = eagle3_models.Drafter.read(view, target.model)
        return (
            drafter._replace(weights={k: w.float() for k, w in drafter.weights.items()})
            .draft(PROMPT, features_TM)
            .tokens
        )
    reference = BlockReference(view, embedding, head)
    reference.weights = {name: weight.float() for name, weight in reference.weights.items()}
    return reference.draft(features_TM, PROMPT[-1]).tokens


def test_features_are_what_transformers_shows(target: Target) -> None:
    ids_BT = torch.tensor([PROMPT * 3])  # longer than the window of Gemma's tiny targets
    out = target.model(ids_BT, output_hidden_states=True)
    features = target.features(ids_BT, torch.ones_like(ids_BT), LAYER_IDS)
    want = torch.cat([out.hidden_states[i + 1] for i in LAYER_IDS], -1)
    torch.testing.assert_close(features.context_BTM, want)
    logits = target.soft_cap(features.last_BTD @ target.lm_head_weight_VD.T)
    torch.testing.assert_close(logits, out.logits, rtol=1e-4, atol=1e-4)


def write_gemma2(path: Path, **fields: Any) -> Any:
    """Write a random Gemma 2 with its tokenizer; returns it as transformers runs it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **fields, attn_implementation="eager"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(path)
    write_tokenizer(path)
    return model.eval()


def test_capped_attention_scores_are_kept(tmp_path: Path) -> None:
    """Gemma 2, whose attention no fused kernel computes."""
    model = write_gemma2(tmp_path, vocab_size=512, attn_logit_softcapping=0.5)
    ids_BT = torch.tensor([PROMPT])
    want = model(ids_BT, output_hidden_states=True).hidden_states[2]
    got = Target.load(tmp_path).features(ids_BT, torch.ones_like(ids_BT), (1,)).context_BTM
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_drawn_answers_are_distributed_as_those_of_a_target_that_caps_its_logits(tmp_path: Path) -> None:
    prompt, heat = [1, 2, 3, 4], 0.7
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": 1.0}
    write_gemma2(tmp_path, vocab_size=10, eos_token_id=[99], **caps)
    requests = [Request(str(i), prompt, heat, 2) for i in range(6000)]
    generator = torch.Generator().manual_seed(0)
    batches = complete(Target.load(tmp_path), requests, batch_size=1000, generator=generator)
    found = [tuple(completion.answer_ids) for batch in batches for completion in batch]
    assert chi_square(found, of_text(tmp_path, prompt, 2, temperature=heat)) > 1e-3


def test_padding_changes_no_features(target: Target) -> None:
    long, short = PROMPT * 3, PROMPT * 2
    sequences = pad([Sample(str(len(ids)), "x", 0.0, ids, [(1, len(ids))]) for ids in (long, short)])
    batched = target.features(sequences.ids_BT, sequences.mask_BT, LAYER_IDS).context_BTM
    torch.testing.assert_close(batched[1, : len(short)], features_of(target, short)[0], rtol=1e-4, atol=1e-4)


def test_answers_are_the_targets_own(target: Target) -> None:
    prompts = [PROMPT, PROMPT * 2, PROMPT[:3]]
    requests = [Request(str(i), ids, 0.0, 12) for i, ids in enumerate(prompts)]
    generator = torch.Generator().manual_seed(0)
    got = {
        c.key: c.answer_ids for batch in complete(target, requests, batch_size=3, generator=generator) for c in batch
    }
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        alone = target.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False
        )
        assert got[request.key] == alone[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("algorithm", ["dspark", "eagle3"])
def test_layers_start_from_the_targets(target: Target, algorithm: Any) -> None:
    drafter = new_drafter(target, shape("", init_layers=(1, 2)), algorithm, seed=0)
    source, first = target.decoder.layers[1], cast(Any, drafter.layers[0])
    assert torch.equal(first.mlp.up_proj.weight, source.mlp.up_proj.weight)
    x = torch.randn(3, target.config.hidden_size)
    torch.testing.assert_close(drafter.norm(x), target.decoder.norm(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.input_layernorm(x), source.input_layernorm(x), rtol=1e-4, atol=1e-4)


def test_a_target_that_shows_no_layers_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50))
    target = Target(model, SimpleNamespace())
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel exposes no hidden states"):
        target.features(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long), (0,))


def test_a_target_without_one_width_for_all_layers_is_refused(target: Target) -> None:
    config = SimpleNamespace(**target.config.to_dict() | {"intermediate_size": [96, 192]})
    target_ = SimpleNamespace(config=config, decoder=target.decoder)
    with pytest.raises(CheckpointError, match="intermediate_size"):
        dims_for(target_, shape(""), "dspark")  # type: ignore[arg-type]
