"""Named settings for a section of the configuration: what `preset: paper` means, key by key.

Source: the YOLO11 settings of the code published with arXiv 2507.16782. Its loss weights apply to sums over a batch;
ours apply to the mean over images, so each is converted for the published batch of 32 images at 640 pixels (the same
number of pixels as its 512 images at 160). Per image, in the order task, BatchNorm, first BatchNorm, total variation,
the published (.5 * 32, .05, 5, 2e-3) divided by 32 are (.5, .05 / 32, 5 / 32, 2e-3 / 32).

Where the published settings of another family differ, PRESETS_OF_FAMILY has them; they hold in an experiment, which
knows its family, over those of PRESETS. YOLOv5's (the commands in its README, and hyps.qat.yaml) are converted for its
batch of 32 images at 640 pixels alike; its objectness gain at low resolution, 16 times too small there, is not copied.
Those of the transformers (its scripts for Swin-T and Swin-S) are means over a batch already; the patch embedding is
quantized and FPN and heads are not. They train without an average and, after a warm-up, at a constant rate, since their
steps come after the last epoch. Its real labels are not copied.

Two-stage detectors have 8 bits by default, at every bit-width, in their heads, which the published quantizer leaves in
float, and in their first stage, a hundredth of the weights: with 4-bit weights these cost more than all other layers
together (resnet/README.md, vit/README.md).
"""

from typing import Any

# What a preset leaves as an earlier layer has it: on what, where and with how many bits. All other keys are its recipe.
KEPT = {
    "synthesis": frozenset(
        {
            *("num_images", "image_size", "low_resolution_size", "batch_size"),
            *("annotations", "real_images", "mixed_precision", "directory"),
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
    "tensorrt": {"profile": "inputs", "activation_range": "signed"},
}

# What each preset of all three stages is for, and how long it takes.
TAKES = {
    "quick": "64 images and calibration, no training; about 90 seconds for an n model at 320 pixels on two free CPU "
    "cores, minutes for larger models and images",
    "default": "the full recipe, 2048 images and 100 epochs of training; hours on a GPU, days on a CPU",
    "paper": "the published settings; hours on a GPU, days on a CPU",
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "synthesis": {
        "quick": {
            "num_images": 64,
            "batch_size": 16,
            "low_resolution_iterations": 30,
            "iterations": 6,
            "label_sampling": {"every": 10},
        },
        "paper": {
            "source": "task",
            "image": "pixels",
            "labels": "one_box",
            "iterations": 3000,
            "learning_rate": 0.2,
            "low_resolution_iterations": 3000,
            "low_resolution_learning_rate": 0.2,
            "loss": "paper",
            "weights": {
                "task": 0.5,
                "batch_norm": 0.05 / 32,
                "first_batch_norm": 5 / 32,
                "patch_similarity": 0.05,
                "total_variation": 2e-3 / 32,
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
        "quick": {"calibration_batch_size": 16},
        "paper": {
            "quantizer": "lsq",
            "weight_levels": "uniform",
            "activation_levels": "uniform",
            "softmax_quantizer": "auto",
            "weight_granularity": "tensor",
            "activation_range": "signed",
            "scale_init": "lsq",
            "range_headroom": 1.0,
            "fold_layernorm": False,
            "calibration_images": 32,
            "calibration_batch_size": 32,
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
            "schedule": "linear",
            "warm_up": 0,
            "weight_decay": 5e-4,
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
        },
    },
}

PRESETS_OF_FAMILY: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "yolov5": {
        "synthesis": {
            "paper": {
                "iterations": 2500,
                "low_resolution_iterations": 2500,
                "weights": {
                    "task": 0.5,
                    "batch_norm": 0.01 / 32,
                    "first_batch_norm": 2 / 32,
                    "total_variation": 5e-4 / 32,
                },
                "label_sampling": {"every": 50, "start": 800 / 2500, "stop": 1.0},
                "erase": True,
            }
        },
        "training": {
            "paper": {
                "batch_size": 32,
                "learning_rate": 1e-4,
                "scale_learning_rate": 1e-4,
                "affine_learning_rate": 1e-4,
                "task_weight": 0.04 * 32,
            }
        },
    },
    "resnet": {
        "quantization": {
            "default": {"eight_bit_roles": ["early", "head"]},
            "quick": {"eight_bit_roles": ["early", "head"]},
            "paper": {"calibration_batch_size": 8},  # one batch sets the scales; 32 images need much memory here
        }
    },
    "vit": {
        "synthesis": {"paper": {"weights": {"task": 10.0, "patch_similarity": 1.0, "total_variation": 1e-3}}},
        "quantization": {
            "default": {"eight_bit_roles": ["early", "head"]},
            "quick": {"eight_bit_roles": ["early", "head"]},
            "paper": {"float_roles": ["late", "head", "output", "attention_input"], "calibration_batch_size": 8},
        },
        "training": {
            "paper": {
                "epochs": 15,
                "batch_size": 8,
                "optimizer": "adamw",
                "weight_decay": 0.05,
                "learning_rate": 1e-6,
                "scale_learning_rate": 1e-6,
                "affine_learning_rate": 1e-6,
                "schedule": "constant",
                "warm_up": 1000,
                "ema_decay": 0.0,
                "task_weight": 1.0,
                "logit_weight": 1.0,
                "temperature": 1.0,
                "feature_loss": "block_mse",
            }
        },
    },
}
