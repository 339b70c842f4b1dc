"""Everything a training run is told, validated before anything runs."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dspark_training.features.compress import CodecName


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Frozen):
    """Where prompts come from and how the target answers them."""

    samples: str | None = Field(
        None, description="answered already: a store by `dspark data build` or a JSONL file by `dspark data answers`"
    )
    prompts: tuple[str, ...] = Field((), description="JSONL files of prompts, or names of datasets")
    openings: str | None = Field(None, description="seeds of the messages that the target writes itself")
    written_prompts: dict[str, int] = Field(default_factory=dict, description="domain -> messages the target writes")
    suffix: str = Field("", description="text appended to a share of one domain's prompts")
    suffix_domain: str = "math"
    suffix_share: float = Field(0.0, ge=0, le=1)
    greedy_share: float = Field(0.75, ge=0, le=1, description="share of answers decoded greedily")
    temperature: float = Field(0.8, gt=0, description="of the other answers")
    max_new_tokens: int = Field(256, gt=0)
    max_prompt_tokens: int = Field(512, gt=0)
    max_samples: int | None = Field(None, gt=1, description="answers to generate, from prompts drawn at random")
    batch_size: int = Field(96, gt=0, description="sequences generated at once")
    validation_share: float = Field(0.03, gt=0, lt=0.5)


class DrafterShape(_Frozen):
    """The drafter's own dimensions; the rest comes from the target."""

    num_layers: int = Field(2, gt=0)
    block_size: int = Field(5, gt=0, description="draft tokens a block (gamma)")
    target_layer_ids: tuple[int, ...] = Field(description="decoder layers of the target whose output is the context")
    mask_token_id: int = Field(ge=0)
    markov_rank: int = Field(64, gt=0)
    markov_head_type: Literal["none", "vanilla", "gated", "rnn"] = "vanilla"
    confidence_head: bool = True
    draft_vocab_size: int = Field(8192, gt=0, description="most frequent tokens that a draft may contain")
    init_layers: tuple[int, ...] = Field((), description="target layers that the draft layers start from")


class OptimConfig(_Frozen):
    """Objective weights (DeepSpec's DSpark recipe) and optimisation."""

    ce_weight: float = Field(0.1, ge=0)
    l1_weight: float = Field(0.9, ge=0)
    confidence_weight: float = Field(1.0, ge=0)
    position_decay: float = Field(4.0, gt=0, description="weight of position k is exp(-k / position_decay)")
    learning_rate: float = Field(1e-3, gt=0)
    markov_lr_scale: float = Field(
        10.0, gt=0, description="learning rate of the Markov head against the rest: its rows are rarely visited"
    )
    warmup_share: float = Field(0.04, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the drafter's products; weights, softmaxes and divergences stay in fp32"
    )
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for the matrices of fc and the layers")
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.0, ge=0, lt=1, description="of averaged weights, which are then kept; 0: none")
    patience: int | None = Field(
        None, gt=0, description="validations without a longer accepted length before the run ends with the best weights"
    )
    steps: int = Field(2000, gt=0, description="optimizer steps at most")
    micro_batches: int = Field(
        1, gt=0, description="batches whose gradients make one optimizer step, of all processes together"
    )
    sequences: int = Field(4, gt=0, description="sequences in one target forward, hence in a batch")
    anchors: int = Field(96, gt=0, description="anchors drawn from a sequence in one batch")
    steps_per_forward: int = Field(2, gt=0, description="batches, on disjoint anchors, fed by one target forward")
    pool: int = Field(8, gt=0, description="target forwards whose anchors are mixed, so that successive steps differ")

    @model_validator(mode="after")
    def _lanes(self) -> Self:
        if self.pool % self.micro_batches:
            raise ValueError(f"pool {self.pool} is no multiple of micro_batches {self.micro_batches}")
        return self


class FeaturesConfig(_Frozen):
    """Where the target's features come from in every epoch."""

    source: Literal["online", "cached"] = Field("online", description="run the target each time, or keep features")
    codec: CodecName = Field("int8", description="of cached features; int3 takes under 1/4 of bf16's bytes")
    cap_gb: float = Field(8.0, gt=0, description="limit on disk in 10^9 bytes; the oldest features make room")
    directory: str | None = Field(None, description="of the cache; default: features/ under the work directory")
    layer_ids: tuple[int, ...] | None = Field(
        None,
        description="layers that the cache holds; default: those that the drafter reads. Drafters that read different "
        "layers can share a directory that holds all of them",
    )


class WarmStartConfig(_Frozen):
    """A drafter that the weights start from."""

    path: str = Field(description="directory in any format that serving reads")
    part: Literal["all", "heads", "backbone"] = "all"


class RunConfig(_Frozen):
    """One training run: a recipe file holds exactly these fields."""

    algorithm: Literal["dspark", "dflash", "eagle3"] = "dspark"
    data: DataConfig
    drafter: DrafterShape
    optim: OptimConfig = OptimConfig()
    features: FeaturesConfig = FeaturesConfig()
    warm_start: WarmStartConfig | None = None
    licence: str = Field("other", description="of the finished drafter, named in its card")
    seed: int = 7
    threads: int = Field(0, ge=0, description="CPU threads, 0: as torch chooses")
    tensorboard: bool = Field(False, description="also write TensorBoard events")
    save_every_seconds: float = Field(120.0, gt=0)
    validate_every_steps: int = Field(100, gt=0)
