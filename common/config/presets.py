"""Named settings for a section of the configuration: what `preset: paper` means, key by key.

Source: the code published with arXiv 2507.16782 (commit 4dc4857), and what it takes over from Ultralytics 8.3.53 and
mmdet 2.22. PRESETS has the values of YOLO11; PRESETS_OF_FAMILY those in which another family differs; they hold in an
experiment, which knows its family. tests/config/published_recipe.json has the values as published, with their places,
and docs/reproduce.md what is not followed, and why.

Units. Published loss weights apply to what is summed over the published batch; ours to means over images, so that the
batch is free. Where the published task loss is multiplied by the batch (YOLO) the other weights are divided by it: 32
of 640 pixels, and in the pass of 160 pixels 512 (YOLO11) or 64 (YOLOv5), which `low_resolution_factors` are for. Where
it is a mean (two-stage detectors) they are not. Two-stage detectors optimise images after ImageNet's normalisation: a
learning rate there is DEVIATION times as large in pixels, and total variation too. Total variation is measured as in a
batch of 32 images of 640 pixels; its published norm grows with the root of the number of pixels.

Two-stage detectors have 8 bits by default, at every bit-width, in their heads, which the published quantizer leaves in
float, and in their first stage, a hundredth of the weights: with 4-bit weights these cost more than all other layers
together (resnet/README.md, vit/README.md).
"""

from typing import Any

# What a preset leaves as an earlier layer has it: on what, where and with how many bits. All other keys are its recipe.
KEPT = {
    "synthesis": frozenset(
        {
            *("num_images", "image_size", "low_resolution_size"),
            *("annotations", "real_images", "autocast", "directory"),
        }
    ),
    "quantization": frozenset({"weight_bits", "activation_bits"}),
    "training": frozenset({"checkpoint_every", "wandb"}),
}

# What a run needs so that a runtime of `zsqdet export` runs it fast (docs/deployment.md).
EXPORTED: dict[str, dict[str, Any]] = {
    "onnxruntime": {"profile": "full"},
    "openvino": {"profile": "inputs"},
    "opencv": {"profile": "full"},
    "tensorrt": {"profile": "inputs", "activation_range": "symmetric"},
}

# How long each preset of all three stages takes.
TAKES = {
    "quick": "a minute and a half on two free cores for an n model at 320 pixels, five minutes for an s model at 640",
    "default": "hours on a GPU, days on a CPU",
    "paper": "hours on a GPU, days on a CPU",
}

DEVIATION = 0.226  # mean of the three of ImageNet's pixels, .229, .224, .225

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "synthesis": {
        "quick": {
            "num_images": 48,
            "batch_size": 24,
            "autocast": True,
            "low_resolution_iterations": 30,
            "iterations": 6,
            "label_sampling": {"every": 10},
        },
        "paper": {
            "source": "task",
            "batch_size": 32,
            "image": "pixels",
            "noise": "uniform",
            "clip": False,
            "labels": "one_box",
            "iterations": 3000,
            "learning_rate": 0.2,
            "low_resolution_iterations": 3000,
            "low_resolution_learning_rate": 0.2,
            "warm_up": 0,
            "betas": [0.9, 0.999],
            "epsilon": 1e-8,
            "loss": "paper",
            "weights": {
                "task": 0.5,
                "batch_norm": 0.05 / 32,
                "first_batch_norm": 5 / 32,
                "patch_similarity": 0.05,
                "total_variation": 2e-3 / 32,
            },
            "low_resolution_factors": {
                "task": 1.0,
                "batch_norm": 32 / 512,
                "first_batch_norm": 32 / 512,
                "patch_similarity": 1.0,
                "total_variation": 32 / 512,  # 512 images of 160 pixels have as many pixels as 32 of 640
            },
            "label_sampling": {
                "every": 100,
                "start": 800 / 3000,
                "stop": 2800 / 3000,
                "confidence": 0.2,
                "overlap": 0.35,
                "min_area": 0.01,
                "max_area": 0.85,
            },
            "erase": False,
            "flip": False,
            "jitter": 0,
        },
    },
    "quantization": {
        "quick": {"calibration_batch_size": 24},
        "paper": {
            "quantizer": "lsq",
            "weight_levels": "uniform",
            "activation_levels": "uniform",
            "softmax_quantizer": "auto",
            "weight_granularity": "tensor",
            "weight_range": "symmetric",
            "activation_range": "symmetric",
            "scale_init": "lsq",
            "range_headroom": 1.0,
            "fold_layernorm": False,
            "calibration_images": 16,  # the first batch of training
            "calibration_batch_size": 16,
            "letterbox_padding": False,
            "rounding": "nearest",
            "batch_norm_correction": False,
            "float_roles": ["first", "late", "head", "output", "attention_input"],
            "eight_bit_roles": [],
            "profile": "inputs",
            "average_bits": None,
            "layers": {},
        },
    },
    "training": {
        "quick": {"epochs": 0},
        "paper": {
            "epochs": 100,
            "batch_size": 16,
            "learning_rate": 1e-5,
            "scale_learning_rate": 1e-5,
            "affine_learning_rate": 1e-5,
            "log_scale": False,
            "optimizer": "adam",
            "momentum": 0.937,
            "schedule": "linear_by_epoch",
            "milestones": [],
            "warm_up": 0,
            "warmup_epochs": 3.0,
            "warmup_bias_rate": 0.1,
            "accumulate": 4,
            "weight_decay": 5e-4,
            "decayed": ["weights", "scales"],
            "frozen": [],
            "task_weight": 0.01 * 16,
            "logit_weight": 0.1,
            "logit_loss": "flat_kl",
            "temperature": 4.0,
            "feature_weight": 1.0,
            "feature_loss": "all_mse",
            "gradient_clip": 10.0,
            "ema_decay": 0.9999,
            "freeze_batch_norm": False,
            "flip": False,
            "zoom": [1.0, 1.0],
            "holdout": 0.0,
            "selection": "last",
            "patience": None,
        },
    },
}

PRESETS_OF_FAMILY: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "yolov5": {
        "synthesis": {
            "paper": {
                "clip": True,
                "iterations": 2500,
                "low_resolution_iterations": 2500,
                "weights": {
                    "task": 0.5,
                    "batch_norm": 0.01 / 32,
                    "first_batch_norm": 2 / 32,
                    "total_variation": 5e-4 / 32,
                },
                "low_resolution_factors": {
                    "batch_norm": 32 / 64,
                    "first_batch_norm": 32 / 64,
                    "total_variation": 32 / 64 * (64 * 160**2 / (32 * 640**2)) ** 0.5,
                },
                "label_sampling": {"every": 50, "start": 800 / 2500, "stop": 1.0},
                "erase": True,
            }
        },
        "quantization": {"paper": {"calibration_images": 32, "calibration_batch_size": 32}},
        "training": {
            "paper": {
                "batch_size": 32,
                "accumulate": 2,
                "learning_rate": 1e-4,
                "scale_learning_rate": 1e-4,
                "affine_learning_rate": 1e-4,
                "momentum": 0.9,
                "task_weight": 0.04 * 32,
            }
        },
    },
    "resnet": {
        "synthesis": {
            "paper": {
                "clip": True,
                "noise": "normal",
                "iterations": 300,
                "low_resolution_iterations": 300,
                "learning_rate": 0.2 * DEVIATION,
                "low_resolution_learning_rate": 0.2 * DEVIATION,
                "weights": {
                    "task": 1.0,
                    "batch_norm": 0.05,
                    "first_batch_norm": 0.0,
                    "total_variation": 1e-4 / DEVIATION,
                },
                "low_resolution_factors": {"batch_norm": 1.0, "first_batch_norm": 1.0, "total_variation": 1.0},
            }
        },
        "quantization": {
            "default": {"eight_bit_roles": ["early", "head"]},
            "quick": {"eight_bit_roles": ["early", "head"]},
            "paper": {"calibration_images": 32, "calibration_batch_size": 32},
        },
        "training": {
            "paper": {
                "batch_size": 32,
                "accumulate": 1,
                "optimizer": "sgd",
                "momentum": 0.9,
                "learning_rate": 5e-3,
                "scale_learning_rate": 5e-3,
                "affine_learning_rate": 5e-3,
                "schedule": "steps",
                "milestones": [16, 22],
                "warm_up": 15,
                "warmup_epochs": 0.0,
                "warmup_bias_rate": 0.0,
                "weight_decay": 1e-4,
                "decayed": ["weights", "scales", "biases", "norms"],
                "frozen": ["backbone.body.conv1.*", "backbone.body.bn1.*", "backbone.body.layer1.*"],
                "gradient_clip": None,
                "ema_decay": 0.0,
                "task_weight": 1.0,
                "logit_weight": 1.0,
            }
        },
    },
    "vit": {
        "synthesis": {
            "paper": {
                "batch_size": 12,
                "noise": "imagenet",
                "iterations": 2000,
                "low_resolution_iterations": 2000,
                "learning_rate": 0.2 * DEVIATION,
                "low_resolution_learning_rate": 0.2 * DEVIATION,
                "warm_up": 100,
                "betas": [0.5, 0.9],
                "weights": {
                    "task": 10.0,
                    "patch_similarity": 1.0,
                    "total_variation": 1e-3 * (12 / 32) ** 0.5 / DEVIATION,
                },
                "low_resolution_factors": {"total_variation": 1.0},
            }
        },
        "quantization": {
            "default": {"eight_bit_roles": ["early", "head"]},
            "quick": {"eight_bit_roles": ["early", "head"]},
            "paper": {
                "float_roles": ["late", "head", "output", "attention_input"],
                "calibration_images": 1,
                "calibration_batch_size": 1,
            },
        },
        "training": {
            "paper": {
                "epochs": 15,
                "batch_size": 8,
                "accumulate": 1,
                "optimizer": "adamw",
                "momentum": 0.9,
                "weight_decay": 0.05,
                "decayed": ["weights", "scales", "biases"],
                "learning_rate": 1e-6,
                "scale_learning_rate": 1e-6,
                "affine_learning_rate": 1e-6,
                "schedule": "steps",
                "milestones": [27, 33],
                "warm_up": 1000,
                "warmup_epochs": 0.0,
                "warmup_bias_rate": 0.0,
                "gradient_clip": None,
                "ema_decay": 0.0,
                "task_weight": 1.0,
                "logit_weight": 1.0,
                "logit_loss": "joint_kl",
                "temperature": 1.0,
                "feature_loss": "block_mse",
            }
        },
    },
}


def with_preset(section: str, values: Any) -> Any:
    """Lays the named preset under the values that were given; a plain string is short for its name."""
    if isinstance(values, str):
        values = {"preset": values}
    if not isinstance(values, dict):
        return values
    return over(PRESETS[section].get(str(values.get("preset", "default")), {}), values)


def over(preset: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values over a preset; sections in it are joined."""
    nested = {k: v | values[k] for k, v in preset.items() if isinstance(v, dict) and isinstance(values.get(k), dict)}
    return preset | values | nested
