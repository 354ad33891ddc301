"""The schema of training."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.fields import BatchSize, Beta, Count, Preset, PresetSection, Rate, Steps, Weight, Zoom


class TrainingConfig(PresetSection):
    """Training: distillation from the full-precision detector."""

    presets_of = "training"

    preset: Preset = Field("default", description="a recipe; short: training=NAME; keys beside it change it")
    epochs: Steps = Field(100, description="0: calibration only (PTQ)")
    batch_size: BatchSize = Field(16, description="images in an update")
    learning_rate: Rate = Field(2e-5, description="learning rate of weights")
    affine_learning_rate: Rate = Field(5e-4, description="learning rate of biases and of BatchNorm's scale and shift")
    scale_learning_rate: Rate = Field(2e-4, description="learning rate of quantizers' scales and offsets")
    log_scale: bool = Field(True, description="train the logarithm of the scales, which keeps them positive")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="adamw: weight decay apart from the gradient"
    )
    momentum: Beta | None = Field(None, description="of SGD, or Adam's first beta; none: .937 with adam, .9 otherwise")
    schedule: Literal["cosine", "linear", "linear_by_epoch", "steps", "constant"] = Field(
        "cosine",
        description="decay of the learning rates. linear_by_epoch: constant within an epoch; steps: to a tenth after "
        "each epoch of `milestones`",
    )
    milestones: tuple[Count, ...] = Field((), description="epochs after which schedule: steps falls to a tenth")
    warm_up: Steps = Field(0, description="batches in which the learning rates rise linearly from a thousandth")
    warmup_epochs: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0,
        description="epochs, but 100 batches at least, in which the learning rates rise linearly from 0 and "
        "`accumulate` from 1, as Ultralytics does; in the place of warm_up",
    )
    warmup_bias_rate: Rate = Field(0.0, description="learning rate of biases at the start of warmup_epochs")
    accumulate: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="batches whose gradients are added up for an update; an epoch ends with one"
    )
    weight_decay: Rate = Field(0.0, description="weight decay of what `decayed` names")
    decayed: tuple[Literal["weights", "scales", "biases", "norms"], ...] = Field(
        ("weights",),
        description="what weight_decay acts on. scales: of quantizers, with their offsets; norms: scale and shift of "
        "normalisation; tables of positions never",
    )
    frozen: tuple[str, ...] = Field(
        (), description="name patterns of parameters that are not trained, e.g. [model.0.*]"
    )
    task_weight: Weight = Field(0.0, description="the detector's training loss on the synthetic labels")
    logit_weight: Weight = Field(1.0, description="of the difference of raw predictions")
    logit_loss: Literal["rows", "flat_kl", "joint_kl"] = Field(
        "rows",
        description="rows: per prediction, weighted by the higher confidence of teacher and student; as published, "
        "flat_kl: one softmax over each raw map, or joint_kl: one over all of them",
    )
    temperature: Annotated[float, Field(gt=0, le=1000)] = Field(4.0, description="of flat_kl and joint_kl")
    feature_weight: Weight = Field(1.0, description="of the difference of feature maps")
    feature_loss: Literal["blocks", "block_mse", "all_mse"] = Field(
        "blocks",
        description="blocks: relative error of block outputs; as published, all_mse: every convolution and BatchNorm, "
        "or block_mse: blocks of a transformer",
    )
    gradient_clip: Annotated[float, Field(gt=0, le=1_000_000_000)] | None = Field(
        10.0, description="largest global norm; none: any"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.98, description="0: no averaging")
    freeze_batch_norm: bool = Field(True, description="keep the running statistics while training")
    flip: bool = Field(True, description="mirror at random")
    zoom: tuple[Zoom, Zoom] = Field((0.7, 1.35), description="range of the random zoom, padding around")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="share of the set kept for selection")
    selection: Literal["holdout", "last"] = Field(
        "holdout",
        description="holdout: the epoch that detects most like the teacher on held-out synthetic images, or epoch 0",
    )
    patience: Count | None = Field(
        None, description="selection: holdout ends after so many epochs without a better one"
    )
    checkpoint_every: Count = Field(1, description="epochs between two states that training can go on from")
    wandb: str | None = Field(None, description="project of Weights & Biases that also gets the numbers of each epoch")

    @model_validator(mode="after")
    def _something_to_learn(self) -> "TrainingConfig":
        if self.epochs and not self.task_weight + self.logit_weight + self.feature_weight:
            raise ValueError("task_weight, logit_weight and feature_weight are all 0; give one of them a weight")
        if self.epochs and self.selection == "holdout" and not self.holdout:
            raise ValueError("selection: holdout needs `holdout` above 0; or take the last epoch with selection: last")
        if self.patience and self.selection == "last":
            raise ValueError("patience needs selection: holdout, which tells what is better; or leave patience out")
        if self.warm_up and self.warmup_epochs:
            raise ValueError("warm_up and warmup_epochs are two ways to say one thing; set one of them to 0")
        if self.schedule == "steps" and not self.milestones:
            raise ValueError("schedule: steps needs `milestones`, e.g. [16, 22]; or take schedule: constant")
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"zoom: found {list(self.zoom)}; the first number is the smaller one; swap them")
        return self
