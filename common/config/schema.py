"""The schema of an experiment: every key, its default and its meaning."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from common.checkpoints.rcnn_architecture import MOBILE, Epsilon
from common.config.fields import (
    CONTRADICTIONS,
    OLD_VALUES,
    BatchSize,
    Beta,
    Bits,
    Count,
    Fraction,
    LayerWidth,
    Pixels,
    Preset,
    PresetSection,
    Section,
    Sides,
    Steps,
    Weight,
)
from common.config.presets import EXPORTED, PRESETS, PRESETS_OF_FAMILY, over
from common.config.training import TrainingConfig
from common.detection.types import Role


class LossWeights(Section):
    """Weights of the loss terms of synthesis, each a mean over images."""

    task: Weight = Field(1.0, description="the detector's own training loss")
    batch_norm: Weight = Field(600.0, description="distance to the BatchNorm statistics of all layers")
    first_batch_norm: Weight = Field(0.5, description="the same for the first BatchNorm alone, on top")
    patch_similarity: Weight = Field(
        1.0, description="negative entropy of the similarities between patches, for detectors without BatchNorm"
    )
    total_variation: Weight = Field(10.0, description="total variation of the image")


class LossFactors(Section):
    """Factors of the weights in the low-resolution pass: published weights are for sums over another batch there."""

    task: Weight = Field(1.0, description="of weights.task, in the first pass")
    batch_norm: Weight = Field(1.0, description="of weights.batch_norm, in the first pass")
    first_batch_norm: Weight = Field(1.0, description="of weights.first_batch_norm, in the first pass")
    patch_similarity: Weight = Field(1.0, description="of weights.patch_similarity, in the first pass")
    total_variation: Weight = Field(1.0, description="of weights.total_variation, in the first pass")


class LabelSamplingConfig(Section):
    """Adaptive label sampling during the low-resolution pass (arXiv 2507.16782, section 3)."""

    every: Count = Field(100, description="iterations between two edits of the labels")
    start: Fraction = Field(0.27, description="first edit, as a fraction of the iterations; 1 keeps labels as drawn")
    stop: Fraction = Field(0.93, description="last edit, as a fraction of the iterations")
    confidence: Fraction = Field(0.2, description="score above which a detection may become a label")
    overlap: Fraction = Field(
        0.35, description="below this IoU with every label a detection is added, with every detection a label removed"
    )
    min_area: Fraction = Field(0.01, description="smallest box that is added, as a fraction of the image")
    max_area: Fraction = Field(0.85, description="largest box that is added, as a fraction of the image")

    @model_validator(mode="after")
    def _ranges(self) -> "LabelSamplingConfig":
        if self.stop < self.start < 1:
            raise ValueError(f"start: {self.start} is after stop: {self.stop}; swap them, or start: 1 for no edit")
        if self.max_area < self.min_area:
            raise ValueError(f"min_area: {self.min_area} is above max_area: {self.max_area}; swap them")
        return self


class SynthesisConfig(PresetSection):
    """Synthesis of the images."""

    presets_of = "synthesis"

    preset: Preset = Field("default", description="a recipe; short: synthesis=NAME; keys beside it change it")
    source: Literal["task", "batch_norm", "noise", "real"] = Field(
        "task",
        description="task: all loss terms; batch_norm: BatchNorm statistics only; noise: random pixels; real: the "
        "images in `real_images` (a baseline that is not zero-shot)",
    )
    num_images: Count = Field(2048, description="number of synthetic images")
    image_size: Pixels = Field(640, description="pixels, square")
    batch_size: BatchSize = Field(32, description="images optimised together, whose joint statistics are matched")
    labels: Literal["one_box", "mosaic", "multi_box", "scene", "true_label"] = Field(
        "mosaic",
        description="how the first labels are drawn (configs/README.md); true_label reads them from `annotations` and "
        "edits none, with source: real those of its images",
    )
    annotations: Path | None = Field(None, description="COCO JSON for labels: true_label")
    real_images: Path | None = Field(None, description="folder of images for source: real")
    image: Literal["pyramid", "pixels"] = Field(
        "pyramid",
        description="what is optimised. pyramid: images of five resolutions, added up; pixels: the pixels themselves",
    )
    noise: Literal["uniform", "normal", "imagenet"] = Field(
        "uniform",
        description="what image: pixels starts from. uniform: in [0, 1]; normal: mean 0, standard deviation 1; "
        "imagenet: normal, with the mean and standard deviation of ImageNet's pixels",
    )
    clip: bool = Field(
        True, description="clip image: pixels to [0, 1] after each step; false: never, and files have 16 bits"
    )
    iterations: Steps = Field(300, description="iterations of the last pass, at image_size")
    learning_rate: Annotated[float, Field(gt=0, le=10)] = Field(0.008, description="of Adam in the pass at image_size")
    low_resolution_size: Pixels = Field(160, description="pixels, square, of the images of the first pass")
    low_resolution_iterations: Steps = Field(
        700, description="iterations of the first pass, in which the labels are edited; 0 leaves it out"
    )
    low_resolution_learning_rate: Annotated[float, Field(gt=0, le=10)] = Field(
        0.012, description="of Adam in the first pass"
    )
    warm_up: Steps = Field(0, description="iterations of each pass in which the learning rate rises linearly")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of Adam, both passes")
    epsilon: Annotated[float, Field(ge=1e-16, le=1)] = Field(
        1e-12, description="of Adam, both passes; 1e-8 would exceed these gradients, which are means over many pixels"
    )
    loss: Literal["normalized", "paper"] = Field(
        "normalized",
        description="BatchNorm loss. normalized: relative to the standard deviation of each channel; paper: L2 norms "
        "of the differences of mean and variance",
    )
    weights: LossWeights = LossWeights()
    low_resolution_factors: LossFactors = LossFactors()
    label_sampling: LabelSamplingConfig = LabelSamplingConfig()
    erase: bool = Field(False, description="random erasing before the loss")
    flip: bool = Field(True, description="random horizontal flip before the loss")
    jitter: int = Field(0, ge=0, le=8192, description="random shift before the loss, up to so many pixels")
    autocast: bool = Field(False, description="bfloat16 autocast on a GPU, or a CPU with instructions for it")
    directory: Path = Field(
        Path("runs/synthetic"), description="where synthetic image sets are kept; runs with equal settings share one"
    )

    @model_validator(mode="after")
    def _sources(self) -> "SynthesisConfig":
        if self.labels == "true_label" and self.annotations is None:
            raise ValueError("labels: true_label needs `annotations`, a COCO JSON file")
        if self.source == "real" and self.real_images is None:
            raise ValueError("source: real needs `real_images`, a folder of images")
        optimised = self.iterations or (self.low_resolution_iterations and self.image == "pyramid")
        if self.source in ("task", "batch_norm") and not optimised:
            raise ValueError("iterations: 0 leaves the images as noise; give iterations, or take source: noise")
        of = self.weights
        image = (of.batch_norm, of.first_batch_norm, of.patch_similarity, *([of.task] if self.source == "task" else []))
        if self.source in ("task", "batch_norm") and not any(image):
            raise ValueError("weights: no term but total_variation is above 0; give another, or take source: noise")
        return self


class LayerBits(Section):
    """Bits of the layers that match a pattern; 32 leaves them in float."""

    weight_bits: LayerWidth = Field(description="of these layers' weights")
    activation_bits: LayerWidth = Field(description="of these layers' inputs")


class QuantizationConfig(PresetSection):
    """The quantizers and their calibration."""

    presets_of = "quantization"

    preset: Preset = Field("default", description="a recipe; short: quantization=NAME; keys beside it change it")
    weight_bits: Bits = Field(8, description="of the weights of quantized layers")
    activation_bits: Bits = Field(8, description="of the activations that quantized layers read")
    quantizer: Literal["lsq", "lsq+"] = Field(
        "lsq",
        description="uniform levels. lsq: learned scales, integer zero points of activations; lsq+: learned "
        "scales, learned real offsets of activations",
    )
    weight_levels: Literal["uniform", "codebook"] = Field(
        "uniform",
        description="of weights below 8 bits. uniform: W4 is INT4; codebook: indices into 2^bits INT8 entries, "
        "closer around zero (docs/quantizers.md)",
    )
    codebook: Literal["int8", "fp8"] = Field(
        "int8", description="entries of codebooks. int8: -127 to 127; fp8: those that INT8 and FP8 E4M3 have in common"
    )
    activation_levels: Literal["uniform", "minifloat"] = Field(
        "uniform",
        description="of activations below 8 bits. uniform: 2^bits evenly spaced codes; minifloat: integers of few "
        "significand bits",
    )
    weight_granularity: Literal["channel", "tensor"] = Field(
        "channel", description="one scale for each output channel, or one for the tensor"
    )
    weight_range: Literal["auto", "symmetric"] = Field(
        "auto",
        description="of uniform weights. auto: asymmetric (a zero point for each scale) below 8 bits, where scales are "
        "searched; symmetric: zero point 0",
    )
    activation_range: Literal["auto", "asymmetric", "symmetric", "unsigned"] = Field(
        "auto",
        description="asymmetric: with a zero point; symmetric: zero point 0, signed codes; unsigned: zero point 0, no "
        "negative codes; auto: unsigned where nothing is negative, else asymmetric",
    )
    scale_init: Literal["mse", "lsq"] = Field(
        "mse", description="mse: searched; lsq: 2 mean|x| / sqrt(Qp), one batch, no zero point"
    )
    range_headroom: float = Field(
        1.0,
        ge=1,
        le=16,
        description="ranges of activations are searched for values up to so many times as large as those of the "
        "synthetic images; for detectors without BatchNorm, where nothing ties these to the size of real ones",
    )
    softmax_quantizer: Literal["auto", "same", "log2", "log_sqrt2"] = Field(
        "auto",
        description="of attention probabilities. same: as all activations; log2, log_sqrt2: powers of these bases "
        "(RepQ-ViT); auto: log_sqrt2 if uniform activations have at most 4 bits and scale_init=mse, else same",
    )
    fold_layernorm: bool = Field(
        False, description="fold the channels' own ranges after a LayerNorm into the layer that reads them (RepQ-ViT)"
    )
    calibration_images: Count = Field(
        256, description="number of synthetic images used for calibration; all of them where there are fewer"
    )
    calibration_batch_size: BatchSize = Field(32, description="images calibrated on together")
    letterbox_padding: bool = Field(
        True, description="calibrate on images with letterbox padding; false: on the images as they are"
    )
    rounding: Literal["coordinate_descent", "gptq", "nearest"] = Field(
        "coordinate_descent",
        description="of weights. gptq: error compensated through the Hessian; coordinate_descent (default): GPTQ at "
        "the best of several scales, then single codes changed (after QuantEase); nearest needs no calibration images",
    )
    batch_norm_correction: bool = Field(True, description="relative correction of the running statistics")
    float_roles: tuple[Role, ...] = Field(("first", "output"), description="roles of layers that stay in float")
    eight_bit_roles: tuple[Role, ...] = Field((), description="roles of layers that get 8 bits, e.g. [early]")
    profile: Literal["inputs", "full"] = Field(
        "inputs",
        description="where quantizers stand. inputs: what layers read (OpenVINO, TensorRT); full: between layers as "
        "well, 8 bits (ONNX Runtime, OpenCV); see docs/deployment.md",
    )
    concat_scales: Literal["own", "shared"] = Field(
        "own",
        description="of profile: full. shared: one scale for all parts of a concatenation, so that it copies codes",
    )
    average_bits: Annotated[float, Field(ge=2, le=8)] | None = Field(
        None,
        description="mixed precision: limit of the average bits of the quantized weights; within it the layers whose "
        "rounding changes the predictions most get more bits, for weights and inputs",
    )
    mixed_precision_bits: tuple[Bits, ...] = Field(
        (8,), min_length=1, description="what mixed precision may give to a layer, e.g. [5, 6, 7, 8]"
    )
    layers: dict[str, LayerBits] = Field({}, description="exceptions by name pattern, e.g. {'model.1.*': {...}}")

    @field_validator("quantizer", "weight_range", "activation_range", mode="before")
    @classmethod
    def _old_value(cls, value: Any) -> Any:
        if isinstance(value, str) and value in OLD_VALUES:
            raise ValueError(f"found {value!r}, which is now {OLD_VALUES[value]}")
        return value

    @model_validator(mode="after")
    def _no_contradiction(self) -> "QuantizationConfig":
        for key, value, other, allowed, why in CONTRADICTIONS:
            found = getattr(self, other)
            if getattr(self, key) == value and found not in allowed:
                by = " (of preset: paper)" if self.preset == "paper" and key == "scale_init" else ""
                raise ValueError(
                    f"{other}: found {found!r}, but {key}: {value}{by} {why}; allowed with it: {' | '.join(allowed)}; "
                    f"or change {key}"
                )
        return self


class DataConfig(Section):
    """The data set to evaluate on. Only evaluation reads it; `data=PATH` is short for `data.dataset=PATH`."""

    dataset: Path | None = Field(
        None, description="data.yaml of Ultralytics or a folder of Pascal VOC (VOCdevkit/VOC2007); short: data=PATH"
    )
    split: str = Field("val", description="which part of `dataset`: train, val, test or another one that it has")
    images: Path | None = Field(
        None, description="folder of the images; without annotations fidelity is measured, which needs no labels"
    )
    annotations: Path | None = Field(None, description="their COCO JSON")

    @model_validator(mode="after")
    def _one_way(self) -> "DataConfig":
        if self.dataset is not None and (self.images is not None or self.annotations is not None):
            other = "data.images" if self.images is not None else "data.annotations"
            raise ValueError(f"dataset: found {self.dataset}, but also {other}; keep one of the two ways")
        if self.dataset is None and self.split != "val":
            raise ValueError(
                f"split: found {self.split}, but no data set that has parts; give data=PATH, or leave data.split out"
            )
        return self


class EvaluationConfig(Section):
    """How mAP is measured; the defaults are those of Ultralytics' validator."""

    resize: Literal["letterbox", "shorter_side", "stretch"] = Field(
        "letterbox",
        description="letterbox: the longer side to image_size, padded; shorter_side: the shorter side to image_size, "
        "as torchvision and mmdet do; stretch: both sides to image_size, as torchvision's SSDlite does",
    )
    image_size: Pixels = Field(640, description="pixels, of the side that `resize` names")
    longest_side: Pixels = Field(1333, description="pixels, limit of the longer side with resize: shorter_side")
    batch_size: BatchSize = Field(16, description="images in a batch")
    rectangular: bool = Field(True, description="pad a batch only as far as its images need; false: to squares")
    confidence: Fraction = Field(0.001, description="score below which detections are dropped")
    iou: Fraction = Field(0.7, description="IoU threshold of non-maximum suppression")
    max_detections: int = Field(300, ge=1, le=10_000, description="detections kept in an image")
    interpolation: Literal["linear", "area"] = Field("linear", description="area: to shrink images, as YOLOv5's val.py")
    directory: Path = Field(
        Path("runs/measured"), description="where full-precision results are kept; runs with equal settings share them"
    )


class DetectorConfig(Section):
    """What a state_dict of torchvision's detectors cannot say of its network."""

    model: Literal[MOBILE] | None = Field(  # type: ignore[valid-type]
        None, description="family resnet: which of the two models of torchvision whose tensors are the same"
    )
    backbone: str | None = Field(None, description="family resnet: name of a timm model with BatchNorm under an FPN")
    levels: tuple[Annotated[int, Field(ge=0, le=99)], ...] | None = Field(
        None, description="which of timm's feature maps (out_indices) the FPN reads; by default the last four"
    )
    anchor_sizes: tuple[Sides, ...] | None = Field(
        None, description="pixels, a row for each level and the pooled one after them, e.g. [[32], [64], [128, 180]]"
    )
    aspect_ratios: Sides | None = Field(None, description="height over width of the anchors, on all levels")
    frozen_epsilon: Epsilon | None = Field(
        None, description="of frozen BatchNorms: 0 after torchvision's COCO weights, 1e-5 after weights_backbone alone"
    )

    @property
    def given(self) -> dict[str, Any]:
        """What is set."""
        return self.model_dump(exclude_none=True)


class ExperimentConfig(Section):
    """One experiment: a detector, a bit-width, a run folder."""

    family: str = Field(
        "yolo11", description="yolo11, yolov5, resnet, onestage or vit: the folder with the detector's adapter.py"
    )
    weights: Path = Field(description="float checkpoint (.pt, .pth, .safetensors); `evaluate`: also a run or a graph")
    run_dir: Path = Field(
        Path("runs/experiment"),
        description="folder of the run; of a file runs/ and its name and the bits, e.g. runs/yolo11n_w4a8",
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="same seed, same machine, same result")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    preset: Preset = Field(
        "default", description="recipe of all stages. quick: few images and no training; paper: the published settings"
    )
    detector: DetectorConfig = DetectorConfig()
    data: DataConfig = DataConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: Literal[*EXPORTED] | None = Field(  # type: ignore[valid-type]
        None,
        description="runtime that `zsqdet run` also exports for (FP8: `zsqdet export RUN --to fp8`); sets "
        "quantization.profile, and with tensorrt quantization.activation_range, unless they are given",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset_of_all(cls, values: Any) -> Any:
        """Hands the preset to the sections, with the settings that this family has of its own."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        own = PRESETS_OF_FAMILY.get(str(values.get("family")), {})
        for name in PRESETS:
            section = values.get(name, {})
            section = {"preset": section} if isinstance(section, str) else section
            if isinstance(section, dict):
                section = {"preset": values.get("preset", "default")} | section
                values[name] = over(own.get(name, {}).get(str(section["preset"]), {}), section)
        wanted = EXPORTED.get(str(values.get("export")))
        if wanted and isinstance(values["quantization"], dict):
            values["quantization"] = wanted | values["quantization"]
        return values

    @field_validator("export")
    @classmethod
    def _can_be_exported(cls, value: str | None, info: ValidationInfo) -> str | None:
        quantization = info.data.get("quantization")
        for key, needed in EXPORTED.get(str(value), {}).items() if quantization else ():
            if (found := getattr(quantization, key)) != needed:
                raise ValueError(
                    f"found {value}, but quantization.{key}: {found}; {value} needs {needed}; leave that key out, or "
                    "export by hand with `zsqdet export`"
                )
        return value
