"""mmdet's Mask R-CNN with a Swin: detections and losses of mmdet's own, both stages, and mmcv's operators replaced."""

import copy
import logging
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from common.checkpoints.rcnn_architecture import CONFIGURATIONS
from common.checkpoints.read import save_tensors
from common.config.load import load_config
from common.config.schema import QuantizationConfig, SynthesisConfig, TrainingConfig
from common.detection.detector import build_detector, load_detector
from common.detection.masks import paste
from common.detection.roi_losses import ellipses
from common.detection.roi_outputs import MASK_PROPOSALS, PROPOSALS
from common.detection.types import Targets
from common.distillation.trainer import train
from common.quantization import calibrate, plan_layers, quantize
from common.runtime.errors import UserError
from common.synthesis import ImageSet, synthesize
from tools.shapes.train_vit import micro
from vit import adapter, ops
from vit.models import CONFIGS, OFFICIAL, check_published, class_counts, recognise

from mmdet.structures import DetDataSample  # isort: skip  (after vit.models)
from mmdet.structures.mask import BitmapMasks  # isort: skip
from mmengine.config import Config  # isort: skip
from mmengine.structures import InstanceData  # isort: skip
from mmcv.ops import batched_nms, nms, roi_align, soft_nms  # isort: skip  (after vit.ops)


SHIPPED = Path(__file__).parents[2] / "configs/vit"

SIZE = 96


def random_detector(architecture):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = build_detector("vit", architecture)
        found.state = found.build().state_dict()
    return found


@pytest.fixture(scope="module")
def detector():
    return random_detector(micro(4))


@pytest.fixture(scope="module")
def module(detector):
    return detector.build()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def target():
    return Targets(torch.tensor([[8.0, 8.0, 60.0, 70.0], [40.0, 30.0, 90.0, 88.0]]), torch.tensor([1, 3]))


@pytest.mark.parametrize("shape", [(64, 96), (50, 77)])
def test_detections_are_those_of_mmdet_on_the_same_picture(detector, module, shape):
    """Through mmdet's own preprocessing with its padding, from a picture of bytes in BGR."""
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8))
    sample = DetDataSample(metainfo={"img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)})
    settings = module.roi_head.test_cfg
    kept = settings.score_thr
    settings.score_thr = 0.2
    wanted = module.test_step({"inputs": [picture.flip(0)], "data_samples": [sample]})[0].pred_instances
    settings.score_thr = kept
    iou, most = settings.nms.iou_threshold, settings.max_per_img
    (found,) = detector.detect(module, picture[None].float() / 255, 0.2, iou, most)
    assert len(found.labels) == len(wanted.labels) > 0
    assert torch.equal(found.labels, wanted.labels)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes, wanted.bboxes, rtol=1e-4, atol=1e-3)
    # mmdet stretches the grid of a mask over its box by another interpolation, so outlines differ by a pixel.
    assert (paste(found.masks, found.boxes, *shape) == wanted.masks).float().mean() > 0.98


def test_the_exported_module_detects_what_mmdet_detects(detector, module):
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    limits = module.roi_head.test_cfg
    given = limits.score_thr, limits.nms.iou_threshold, limits.max_per_img
    (wanted,) = detector.detect(module, image, *given)
    with torch.no_grad():
        (found,) = detector.detections(detector.export_module(module)(image), *given)
    assert len(wanted.scores) > 20
    for ours, theirs in zip(
        (found.boxes, found.scores, found.labels, found.masks),
        (wanted.boxes, wanted.scores, wanted.labels, wanted.masks),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_losses_are_mmdets_where_nothing_is_sampled(images):
    everything = {f"train_cfg.{part}.sampler.num": 10**7 for part in ("rpn", "rcnn")}
    architecture = micro(4)
    detector = random_detector(architecture | {"overrides": architecture["overrides"] | everything})
    module, labels, masks = detector.build(), target().labels, ellipses(target().boxes, SIZE, SIZE)
    with torch.no_grad():
        output = detector.head_output(module, images[:1], [Targets(target().boxes, labels, masks)])
        features = module.extract_feat(adapter.normalised(module, images[:1]))
        truth = InstanceData(bboxes=target().boxes, labels=labels)
        metas = [{"img_shape": (SIZE, SIZE), "pad_shape": (SIZE, SIZE)}]
        wanted = module.rpn_head.loss_by_feat(*module.rpn_head(features), [truth], metas)
        sample = DetDataSample(metainfo=metas[0])
        sample.gt_instances = truth
        sample.gt_instances.masks = BitmapMasks(masks.numpy().astype(np.uint8), SIZE, SIZE)
        regions = InstanceData(bboxes=output.proposals.boxes[0], scores=torch.ones(PROPOSALS))
        wanted |= module.roi_head.loss(features, [regions], [sample])
    for ours, theirs in (
        ("objectness", wanted["loss_rpn_cls"]),
        ("rpn_box", wanted["loss_rpn_bbox"]),
        ("class", wanted["loss_cls"]),
        ("box", wanted["loss_bbox"]),
        ("mask", wanted["loss_mask"]),
    ):
        total = sum(theirs) if isinstance(theirs, list) else theirs
        torch.testing.assert_close(output.losses[ours][0], total.squeeze(), rtol=1e-4, atol=1e-5)
        assert total > 0


def test_a_students_rows_are_about_the_teachers_regions(detector, module, images):
    student = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in student.rpn_head.parameters():
            parameter.mul_(-1)  # it would propose something else by itself
    reference = detector.head_output(module, images)
    alone = detector.head_output(student, images)
    aligned = detector.head_output(student, images, None, reference.proposals)
    assert not torch.equal(alone.proposals.boxes, reference.proposals.boxes)
    for name in ("classes", "boxes", "masks"):
        torch.testing.assert_close(aligned.terms[name].values, reference.terms[name].values)
    assert reference.terms["classes"].values.shape == (2, PROPOSALS, 5)
    assert reference.terms["masks"].values.shape == (2, MASK_PROPOSALS * 28 * 28, 1)


def test_training_mode_drops_no_paths(detector, module, images):
    student = copy.deepcopy(module).train()
    first, second = (detector.head_output(student, images).terms["anchors"].values for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, detector.head_output(module, images).terms["anchors"].values)


@pytest.mark.parametrize(("depth", "config"), [(6, "swin-t-p4-w7_fpn_ms"), (18, "swin-s-p4-w7_fpn_amp")])
def test_a_checkpoint_of_openmmlab_is_recognised_by_its_shapes(depth, config, tmp_path):
    narrow = {
        "backbone.embed_dims": 12,
        "backbone.depths": [2, 2, depth, 2],
        "backbone.num_heads": [1, 2, 3, 6],
        "backbone.window_size": 5,
        "neck.in_channels": [12, 24, 48, 96],
    }
    upstream = random_detector({"config": micro(80)["config"], "overrides": narrow})
    meta = {"CLASSES": tuple(f"thing {i}" for i in range(80)), "epoch": np.int64(36)}
    torch.save({"meta": meta, "state_dict": upstream.state}, tmp_path / "weights.pth")
    loaded = load_detector("vit", tmp_path / "weights.pth")
    assert config in loaded.architecture["config"]
    assert loaded.architecture["overrides"].items() >= narrow.items()
    assert loaded.class_names == meta["CLASSES"]
    state = loaded.build().state_dict()
    assert all(torch.equal(state[name], value) for name, value in upstream.state.items())


@pytest.mark.parametrize(
    "meta",
    [
        {"dataset_meta": {"classes": ("ant", "bee", "cat", "dog"), "palette": None}},
        {"dataset_meta": {"CLASSES": ["ant", "bee", "cat", "dog"]}},
        {"CLASSES": ("ant", "bee", "cat", "dog")},
    ],
    ids=["3.x", "3.0", "2.x"],
)
def test_class_names_of_all_versions_of_mmdet_are_found(meta, tmp_path):
    narrow = {"backbone.embed_dims": 12, "backbone.num_heads": [1, 2, 3, 6], "neck.in_channels": [12, 24, 48, 96]}
    upstream = random_detector({"config": CONFIGURATIONS["t"], "overrides": narrow | class_counts(4)})
    torch.save({"meta": meta, "state_dict": upstream.state}, tmp_path / "epoch_1.pth")
    assert load_detector("vit", tmp_path / "epoch_1.pth").class_names == ("ant", "bee", "cat", "dog")


@pytest.mark.parametrize("key", ["cfg", "config"])
def test_a_configuration_beside_the_weights_that_says_another_network_is_refused(key, tmp_path, capfd):
    path, own = tmp_path / "epoch_1.pth", Config.fromfile(CONFIGS / CONFIGURATIONS["t"])
    narrow = {"backbone.embed_dims": 12, "backbone.num_heads": [1, 2, 3, 6], "neck.in_channels": [12, 24, 48, 96]}
    detector = random_detector({"config": CONFIGURATIONS["t"], "overrides": narrow | class_counts(4)})
    own.merge_from_dict({f"model.{name}": value for name, value in (narrow | class_counts(4)).items()})
    own.merge_from_dict({"model.backbone.drop_path_rate": 0.5, "model.rpn_head.loss_bbox.loss_weight": 2.0})

    def saved(text):
        torch.save({"meta": {key: text}, "state_dict": detector.state}, path)
        return path

    load_detector("vit", saved(own.pretty_text + "\nfrom a_module import something\nmodel_wrapper: dict = None\n"))
    for text in ("(((", "print('executed')", "model['neck'] = 1", "5", {"model": {}}, torch.ones(2)):
        with pytest.raises(UserError, match=r"epoch_1.pth: the configuration in its `meta` cannot be read \(.*; leave"):
            load_detector("vit", saved(text))
    assert capfd.readouterr().out == ""  # nothing of it runs


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("rpn_head=dict(anchor_generator=dict(scales=[4]))", r"rpn_head.anchor_generator.scales \[4\], where \[8\]"),
        ("backbone=dict(qk_scale=0.1)", "backbone.qk_scale 0.1, where None"),
        ("), img_norm_cfg = dict(to_rgb=False", "img_norm_cfg.to_rgb False, where True"),
        ("neck=dict(act_cfg=dict(type='ReLU'))", "neck.act_cfg"),
        (
            "roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(pool_mode='max')))",
            ".*pool_mode max, where avg",
        ),
        (
            "roi_head=dict(mask_roi_extractor=dict(roi_layer=dict(aligned=False)))",
            ".*aligned False, where True",
        ),
        ("roi_head=dict(bbox_head=dict(cls_predictor_cfg=dict(type='NormedLinear')))", ".*cls_predictor_cfg"),
        ("rpn_head=dict(anchor_generator=dict(base_sizes=[4, 8, 16, 32, 64]))", "rpn_head.anchor_generator.base_sizes"),
        ("rpn_head=dict(bbox_coder=dict(clip_border=False))", "rpn_head.bbox_coder.clip_border False, where True"),
        ("neck=dict(**dict(upsample_cfg=dict(mode='bilinear')))", "neck.upsample_cfg.mode bilinear, where nearest"),
        ("neck=dict(dream=True)", "neck.dream True, where nothing of that name"),
        ("backbone=dict(norm_cfg=dict(type='LN', eps=1e-6))", "backbone.norm_cfg.eps 1e-06, where 1e-05"),
    ],
)
def test_a_setting_that_mmdets_configuration_leaves_out_is_compared_with_its_default(said, place):
    architecture = {"config": CONFIGURATIONS["t"], "overrides": {}}
    default = (
        "dict(neck=dict(act_cfg=None, upsample_cfg=dict(mode='nearest')), backbone=dict(norm_cfg=dict(type='LN')))"
    )
    check_published({"cfg": f"model = {default}"}, architecture, "a.pth")
    said = f"model = dict({said})".replace("), img", ")\nimg")
    with pytest.raises(UserError, match=f"a.pth: its configuration has {place}"):
        check_published({"cfg": said}, architecture, "a.pth")


@pytest.mark.parametrize("size", "ts")
def test_each_swin_is_measured_as_mmdet_measures_it(size):
    own = Config.fromfile(CONFIGS / CONFIGURATIONS[size])
    settings = load_config(SHIPPED / "swin_t.yaml").evaluation  # of Swin-S as well, with other weights
    (resize,) = [step for step in own.test_pipeline if step["type"] == "Resize"]
    assert resize["keep_ratio"]
    assert settings.resize == "shorter_side"
    assert (settings.longest_side, settings.image_size) == tuple(resize["scale"])
    rules = own.model.test_cfg.rcnn
    assert (settings.confidence, settings.iou, settings.max_detections) == (
        rules.score_thr, rules.nms.iou_threshold, rules.max_per_img,
    )  # fmt: skip


def test_coco_names_the_classes_where_the_file_does_not():
    assert build_detector("vit", micro(80)).class_names[79] == "toothbrush"
    assert build_detector("vit", micro(4)).class_names == ("class 1", "class 2", "class 3", "class 4")


def test_an_official_file_that_is_missing_is_fetched_with_the_digits_of_its_name(monkeypatch, tmp_path):
    asked = []

    def fetch(weights, release, sums):
        asked.append((f"{release}/{weights.name}", sums[weights.name]))
        raise UserError("offline")

    monkeypatch.setattr(adapter, "fetch", fetch)
    for name in OFFICIAL:
        with pytest.raises(UserError, match="offline"):
            load_detector("vit", tmp_path / name)
    name = "mask_rcnn_swin-t-p4-w7_fpn_1x_coco"
    folder = f"https://download.openmmlab.com/mmdetection/v2.0/swin/{name}"
    assert asked[0] == (f"{folder}/{name}_20210902_120937-9d6b7cfa.pth", "9d6b7cfa")


def test_anything_else_is_refused_in_one_line(detector, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: no Mask R-CNN of mmdet with a Swin"):
        load_detector("vit", tmp_path / "other.pth")
    with pytest.raises(UserError, match="give the path of a checkpoint, or one of the official names"):
        load_detector("vit", tmp_path / "missing.pth")
    without = {name: t for name, t in detector.state.items() if "rpn_cls" not in name}
    about = {"family": "vit", "architecture": micro(4)}
    save_tensors(tmp_path / "part.safetensors", without, about)
    with pytest.raises(UserError, match=r"rpn_head\.rpn_cls"):
        load_detector("vit", tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"found 'swin/none\.py'; Input should be 'swin/mask-rcnn_swin-t"):
        build_detector("vit", micro(4) | {"config": "swin/none.py"}).build()
    assert recognise({"fc.weight": torch.zeros(1)}) is None


def test_both_stages_run_and_log_what_the_images_were_optimized_for(detector, tmp_path, caplog):
    """Images out of the detector, a W4A4 copy calibrated and trained on them."""
    config = SynthesisConfig(
        num_images=3, image_size=64, batch_size=2, low_resolution_size=64, low_resolution_iterations=2, iterations=2,
        directory=tmp_path / "sets",
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        made = ImageSet(synthesize(detector, config, seed=0, device=torch.device("cpu"), weights_sha256="0" * 64))
    assert "patch similarity entropy of 8 blocks (no BatchNorm)" in caplog.text
    assert all(np.isfinite(row["patch_similarity"]) for row in made.description["history"])
    teacher = detector.build()
    before = copy.deepcopy(teacher.state_dict())
    settings = QuantizationConfig(weight_bits=4, activation_bits=4)
    plan = plan_layers(detector, teacher, settings)
    student = quantize(teacher, plan, settings)
    batch, _ = made.batch(range(3), torch.device("cpu"))
    report = calibrate(detector, teacher, student, plan, [batch], settings)
    errors = {row["name"]: row["output_error"] for row in report.layers if "output_error" in row}
    for name in ("stages.0.blocks.1.attn.w_msa.qkv", "stages.1.blocks.0.ffn.layers.1", "stages.2.downsample.reduction"):
        assert 0 < errors[f"backbone.{name}"] < 1
    training = TrainingConfig(epochs=1, batch_size=2, task_weight=0.1, holdout=0.3)
    train(detector, teacher, student, made, training, seed=0, device=torch.device("cpu"), directory=tmp_path / "train")
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())


def test_suppression_keeps_what_mmcvs_own_example_keeps():
    boxes = torch.tensor(
        [
            [49.1, 32.4, 51.0, 35.9],
            [49.3, 32.9, 51.0, 35.3],
            [49.2, 31.8, 51.0, 35.4],
            [35.1, 11.5, 39.1, 15.7],
            [35.6, 11.8, 39.3, 14.2],
            [35.3, 11.5, 39.9, 14.5],
            [35.2, 11.7, 39.7, 15.7],
        ]
    )
    scores = torch.tensor([0.9, 0.9, 0.5, 0.5, 0.5, 0.4, 0.3])
    kept, indices = nms(boxes, scores, 0.6)
    assert indices.tolist() == [0, 3, 4]  # IoU .81 with the fourth, .64 with the fifth
    assert kept[:, 4].tolist() == pytest.approx([0.9, 0.5, 0.5])


def test_an_offset_makes_sides_one_pixel_longer():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])  # IoU 0, or 1/2 where both are a pixel longer
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.4, offset=0)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.4, offset=1)[1].tolist() == [0]


def test_classes_do_not_suppress_each_other():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 3)
    scores, classes = torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 0, 1])
    _, indices = batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.5})
    assert indices.tolist() == [1, 2]


@pytest.mark.parametrize("aligned", [True, False])
def test_regions_of_a_ramp_have_the_values_of_its_formula(aligned):
    """Bilinear samples of a ramp are the ramp, and the mean of a bin's samples is its value at the bin's centre."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(20.0), indexing="ij")
    maps = (2 * x + 3 * y).expand(2, 1, 16, 20).clone()
    regions = torch.tensor([[0.0, 4.0, 6.0, 20.0, 22.0], [1.0, 8.0, 8.0, 24.0, 12.0]])
    pooled = roi_align(maps, regions, (2, 4), 0.5, 0, "avg", aligned)
    assert pooled.shape == (2, 1, 2, 4)
    shift = 0.5 if aligned else 0.0
    for i, (_, x1, y1, x2, y2) in enumerate((regions * 0.5).tolist()):
        for row in range(2):
            for column in range(4):
                centre_x = x1 + (column + 0.5) * (x2 - x1) / 4 - shift
                centre_y = y1 + (row + 0.5) * (y2 - y1) / 2 - shift
                assert pooled[i, 0, row, column].item() == pytest.approx(2 * centre_x + 3 * centre_y, rel=1e-5)


def test_the_gradient_of_roi_align_is_right():
    maps = torch.rand(2, 3, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    regions = torch.tensor([[0.0, 1.2, 2.1, 12.0, 9.0], [1.0, 0.0, 0.0, 17.0, 15.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: roi_align(m, regions, (3, 2), 0.5, 2, "avg", True), (maps,))


def test_half_precision_maps_are_pooled_at_float_precision():
    maps = torch.rand(1, 4, 12, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    regions = torch.tensor([[0.0, 1.7, 2.3, 40.9, 37.1]])
    half = roi_align(maps, regions, (7, 7), 0.25, 0, "avg", True)
    exact = roi_align(maps.float(), regions, (7, 7), 0.25, 0, "avg", True)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, exact.bfloat16())


def test_any_other_operator_is_refused_when_it_is_called():
    boxes, scores = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0.9])
    with pytest.raises(NotImplementedError, match="operator softnms needs mmcv with its compiled operators"):
        soft_nms(boxes, scores, 0.3)
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        roi_align(torch.zeros(1, 1, 4, 4), torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]]), (1, 1), 1.0, 0, "max", True)


def test_real_operators_win(monkeypatch):
    real = ModuleType(ops.NAME)
    monkeypatch.setitem(sys.modules, ops.NAME, real)
    assert ops.install() is real
    monkeypatch.delitem(sys.modules, ops.NAME)
    monkeypatch.setattr(ops, "find_spec", lambda name: object())
    with pytest.raises(ModuleNotFoundError):  # it is asked for by name, and here there is none
        ops.install()
