"""The stand-in and the real Detectron2 on the same inputs."""

from __future__ import annotations

import importlib
import inspect
import itertools
import pickle

import pytest
import torch

from expedite_d2.d2 import builtin

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="needs the real Detectron2")


class _Real:
    """Detectron2's objects by the names that the stand-in gives them."""

    _HOMES = (
        "checkpoint config data data.samplers engine layers modeling structures utils "
        "utils.env utils.file_io utils.registry"
    ).split()

    def __getattr__(self, name):
        for home in self._HOMES:
            module = importlib.import_module(f"detectron2.{home}")
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(name)


REAL = _Real()
BOTH = pytest.mark.parametrize("d2", [builtin, REAL], ids=["builtin", "detectron2"])


def _flat(cfg, prefix=""):
    for key, value in cfg.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, type(value), value


# config


def test_defaults_are_equal_in_keys_values_and_types():
    ours, theirs = list(_flat(builtin.get_cfg())), list(_flat(REAL.get_cfg()))
    assert sorted(ours, key=str) == sorted(theirs, key=str)


def test_base_and_leaf_yaml_load_to_the_same_config(tmp_path):
    (tmp_path / "base.yaml").write_text(
        """
MODEL:
  BACKBONE: {FREEZE_AT: 0, NAME: "build_resnet_backbone"}
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  RESNETS: {DEPTH: 50, STRIDE_IN_1X1: False, OUT_FEATURES: ["res2", "res3", "res4", "res5"]}
DATASETS:
  TRAIN: ("coco_2017_train_panoptic",)
  TEST: ("coco_2017_val_panoptic_with_sem_seg",)
SOLVER:
  BASE_LR: 0.0001
  STEPS: (327778, 355092)
  CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: "full_model", CLIP_VALUE: 0.01, NORM_TYPE: 2.0}
  AMP: {ENABLED: True}
INPUT:
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 640) for x in range(5, 21)]"]
  CROP:
    ENABLED: True
    TYPE: "absolute"
    SIZE: (640, 640)
TEST: {EVAL_PERIOD: 5000, AUG: {ENABLED: False, MIN_SIZES: [320, 480], MAX_SIZE: 4480}}
VERSION: 2
"""
    )
    (tmp_path / "leaf.yaml").write_text(
        """
_BASE_: base.yaml
MODEL:
  META_ARCHITECTURE: "MaskFormer"
  SEM_SEG_HEAD: {NAME: "MaskFormerHead", NUM_CLASSES: 133, CONVS_DIM: 256, NORM: "GN"}
SOLVER: {MAX_ITER: 737500}
"""
    )
    cfgs = [builtin.get_cfg(), REAL.get_cfg()]
    for cfg in cfgs:
        cfg.merge_from_file(str(tmp_path / "leaf.yaml"))
        cfg.merge_from_list(["SOLVER.BASE_LR", "1e-3", "DATASETS.TEST", "('x',)"])
    assert list(_flat(cfgs[0])) == list(_flat(cfgs[1]))
    assert cfgs[0].dump() == cfgs[1].dump()


@BOTH
def test_unknown_key_is_a_key_error_that_names_it(d2, tmp_path):
    (tmp_path / "bad.yaml").write_text("SOLVER:\n  MAX_ITRE: 3\n")
    with pytest.raises(KeyError, match="SOLVER.MAX_ITRE"):
        d2.get_cfg().merge_from_file(str(tmp_path / "bad.yaml"))


@BOTH
def test_configurable(d2):
    class Thing:
        @d2.configurable
        def __init__(self, depth, width=2):
            self.depth, self.width = depth, width

        @classmethod
        def from_config(cls, cfg, scale=1):
            return {"depth": cfg.MODEL.RESNETS.DEPTH * scale}

    cfg = d2.get_cfg()
    assert vars(Thing(cfg, width=5, scale=2)) == {"depth": 100, "width": 5}
    assert vars(Thing(3)) == {"depth": 3, "width": 2}

    @d2.configurable(from_config=lambda cfg: {"a": cfg.SEED})
    def call(a, b=1):
        return a, b

    assert call(cfg, b=4) == (-1, 4)
    assert call(2) == (2, 1)


# structures


def _boxes():
    return torch.tensor(
        [[-3.0, 2.0, 5.0, 9.0], [4.0, 4.0, 4.0, 8.0], [1.0, 1.0, 30.0, 40.0], [2.0, 3.0, 2.5, 3.5]]
    )


def test_boxes():
    ours, theirs = builtin.Boxes(_boxes()), REAL.Boxes(_boxes())
    for measure in (
        lambda boxes: boxes.area(),
        lambda boxes: boxes.nonempty(),
        lambda boxes: boxes.nonempty(threshold=1.0),
        lambda boxes: boxes[1].tensor,
        lambda boxes: boxes[-1].tensor,
        lambda boxes: boxes[1:3].tensor,
        lambda boxes: boxes[torch.tensor([True, False, True, False])].tensor,
        lambda boxes: boxes[torch.tensor([2, 0])].tensor,
        lambda boxes: boxes.clone().to("cpu").tensor,
        lambda boxes: type(boxes).cat([boxes, boxes[0]]).tensor,
        lambda boxes: torch.stack(list(boxes)),
    ):
        torch.testing.assert_close(measure(ours), measure(theirs), rtol=0, atol=0)
    ours.clip((8, 20))
    theirs.clip((8, 20))
    assert torch.equal(ours.tensor, theirs.tensor)
    assert len(ours) == len(theirs) and ours.device == theirs.device
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    "value", [torch.zeros(0), [], [[1, 2, 3, 4]], torch.zeros(2, 4, dtype=torch.float64)]
)
def test_boxes_from_anything(value):
    ours, theirs = builtin.Boxes(value).tensor, REAL.Boxes(value).tensor
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.shape == theirs.shape


@BOTH
def test_boxes_refuse_another_shape(d2):
    with pytest.raises(AssertionError):
        d2.Boxes(torch.zeros(2, 3))


def test_bit_masks():
    masks = torch.rand(4, 11, 13, generator=torch.Generator().manual_seed(0)) > 0.97
    masks[2] = False
    ours, theirs = builtin.BitMasks(masks), REAL.BitMasks(masks)
    assert torch.equal(ours.get_bounding_boxes().tensor, theirs.get_bounding_boxes().tensor)
    assert torch.equal(ours.get_bounding_boxes().area(), theirs.get_bounding_boxes().area())
    assert torch.equal(ours.nonempty(), theirs.nonempty())
    assert ours.image_size == theirs.image_size and len(ours) == len(theirs)
    for item in (1, slice(1, 3), torch.tensor([True, False, False, True])):
        assert torch.equal(ours[item].tensor, theirs[item].tensor)
    cat = [type(m).cat([m, m[0]]).tensor for m in (ours, theirs)]
    assert torch.equal(*cat)
    counts = [type(m)(masks.numpy().astype("uint8")).tensor for m in (ours, theirs)]
    assert torch.equal(*counts) and counts[0].dtype == torch.bool
    assert repr(ours) == repr(theirs)


def _instances(d2):
    objects = d2.Instances((20, 30), pred_boxes=d2.Boxes(_boxes()))
    objects.scores = torch.tensor([0.5, 0.2, 0.9, 0.1], dtype=torch.float64)
    objects.pred_masks = torch.zeros(4, 20, 30, dtype=torch.bool)
    objects.set("tags", ["a", "b", "c", "d"])
    return objects


def _plain(objects):
    fields = {name: getattr(value, "tensor", value) for name, value in objects.get_fields().items()}
    return len(objects), objects.image_size, fields


@pytest.mark.parametrize(
    "operation",
    [
        lambda objects: objects,
        lambda objects: objects[2],
        lambda objects: objects[-1],
        lambda objects: objects[1:3],
        lambda objects: objects.to("cpu"),
        lambda objects: type(objects).cat([objects, objects[0], objects[1:]]),
        lambda objects: pickle.loads(pickle.dumps(objects)),
    ],
)
def test_instances(operation):
    ours, theirs = (_plain(operation(_instances(d2))) for d2 in (builtin, REAL))
    assert ours[:2] == theirs[:2]
    assert list(ours[2]) == list(theirs[2])
    for name, value in ours[2].items():
        torch.testing.assert_close(value, theirs[2][name]) if torch.is_tensor(value) else None
        assert torch.is_tensor(value) or value == theirs[2][name]


@BOTH
def test_instances_index_by_mask_and_by_numbers(d2):
    objects = _instances(d2)
    objects.remove("tags")
    assert objects[objects.scores > 0.3].scores.tolist() == [0.5, 0.9]
    assert objects[torch.tensor([3, 0])].scores.tolist() == [0.1, 0.5]
    assert objects.has("scores") and not objects.has("tags")


@BOTH
def test_instances_errors(d2):
    objects = _instances(d2)
    with pytest.raises(AssertionError):
        objects.pred_classes = torch.zeros(3)
    with pytest.raises(AttributeError):
        _ = objects.pred_classes
    with pytest.raises(IndexError):
        objects[4]
    with pytest.raises(NotImplementedError):
        len(d2.Instances((1, 1)))
    with pytest.raises(NotImplementedError):
        iter(objects)


@pytest.mark.parametrize("shapes", [[(5, 7)], [(5, 7), (9, 3)], [(32, 32), (32, 32)]])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"size_divisibility": 8, "pad_value": 2.5},
        {"size_divisibility": 1},
        {"size_divisibility": 4, "padding_constraints": {"size_divisibility": 16}},
        {"size_divisibility": 4, "padding_constraints": {"square_size": 48}},
        {"padding_constraints": {"square_size": 0, "size_divisibility": 32}},
        {"padding_constraints": {}},
    ],
)
def test_image_list(shapes, arguments):
    images = [torch.rand(3, *shape) for shape in shapes]
    ours = builtin.ImageList.from_tensors(images, **arguments)
    theirs = REAL.ImageList.from_tensors(images, **arguments)
    assert torch.equal(ours.tensor, theirs.tensor)
    assert ours.image_sizes == theirs.image_sizes and len(ours) == len(theirs)
    assert all(torch.equal(ours[i], theirs[i]) for i in range(len(images)))
    assert ours.to(torch.float64).tensor.dtype == theirs.to(torch.float64).tensor.dtype
    masks = [torch.ones(shape, dtype=torch.bool) for shape in shapes]
    padded = [d2.ImageList.from_tensors(masks, **arguments).tensor for d2 in (builtin, REAL)]
    assert torch.equal(*padded)


# samplers, command line, catalogs


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_samplers(monkeypatch, rank, world_size):
    for d2 in (builtin, REAL):
        monkeypatch.setattr(d2.comm, "get_rank", lambda: rank)
        monkeypatch.setattr(d2.comm, "get_world_size", lambda: world_size)
    for size in (1, 2, 7):
        ours, theirs = builtin.InferenceSampler(size), REAL.InferenceSampler(size)
        assert list(ours) == list(theirs) and len(ours) == len(theirs)
        for shuffle in (True, False):
            streams = [
                list(itertools.islice(d2.TrainingSampler(size, shuffle=shuffle, seed=11), 20))
                for d2 in (builtin, REAL)
            ]
            assert streams[0] == streams[1]


def _options(parser):
    return [
        (a.option_strings, a.dest, a.default, a.type, a.nargs, a.metavar, type(a).__name__)
        for a in parser._actions
    ]


def test_argument_parser():
    parsers = [builtin.default_argument_parser(), REAL.default_argument_parser()]
    assert _options(parsers[0]) == _options(parsers[1])
    line = "--config-file a.yaml --num-gpus 2 --eval-only --resume MODEL.WEIGHTS b.pth".split()
    assert parsers[0].parse_args(line) == parsers[1].parse_args(line)
    assert parsers[0].parse_args([]) == parsers[1].parse_args([])


@BOTH
def test_dataset_catalog(d2):
    catalog = d2.DatasetCatalog
    catalog.register("conformance_toy", lambda: [{"image_id": 3}])
    try:
        assert "conformance_toy" in catalog and "conformance_toy" in catalog.list()
        assert catalog.get("conformance_toy") == [{"image_id": 3}]
        with pytest.raises(AssertionError, match="conformance_toy"):
            catalog.register("conformance_toy", list)
        with pytest.raises(AssertionError):
            catalog.register("conformance_other", "no function")
    finally:
        catalog.remove("conformance_toy")
    with pytest.raises(KeyError, match="conformance_toy.*not registered"):
        catalog.get("conformance_toy")


@BOTH
def test_metadata_catalog(d2):
    catalog = d2.MetadataCatalog
    metadata = catalog.get("conformance_toy")
    try:
        assert metadata.set(thing_classes=["a"], ignore_label=255) is metadata
        assert catalog.get("conformance_toy").thing_classes == ["a"]
        assert metadata.name == "conformance_toy" and "conformance_toy" in catalog.list()
        assert metadata.as_dict() == {
            "name": "conformance_toy",
            "thing_classes": ["a"],
            "ignore_label": 255,
        }
        assert metadata.get("stuff_classes") is None and metadata.get("stuff_classes", 1) == 1
        with pytest.raises(AttributeError, match="stuff_classes"):
            _ = metadata.stuff_classes
        with pytest.raises(AssertionError):
            metadata.ignore_label = 0
        metadata.ignore_label = 255
    finally:
        catalog.remove("conformance_toy")
    assert "conformance_toy" not in catalog.list()


# models, checkpoints, signatures


def test_shape_spec_and_backbone():
    assert repr(builtin.ShapeSpec(3, stride=4)) == repr(REAL.ShapeSpec(3, stride=4))
    for d2 in (builtin, REAL):

        class Small(d2.Backbone):
            def forward(self, images):
                return {"res2": images}

        small = Small()
        small._out_features = ["res2"]
        small._out_feature_channels = {"res2": 8}
        small._out_feature_strides = {"res2": 4}
        assert small.size_divisibility == 0 and small.padding_constraints == {}
        assert small.output_shape() == {"res2": d2.ShapeSpec(channels=8, stride=4)}


def _training(d2, folder, value):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    torch.nn.init.constant_(model[0].weight, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=value)
    model(torch.rand(4, 2)).sum().backward()
    optimizer.step()
    return model, optimizer, d2.DetectionCheckpointer(model, str(folder), optimizer=optimizer)


@pytest.mark.parametrize(
    ("writer", "reader"), [(builtin, REAL), (REAL, builtin)], ids=["ours-theirs", "theirs-ours"]
)
def test_checkpoints_of_the_other_load(tmp_path, writer, reader):
    model, optimizer, checkpointer = _training(writer, tmp_path, 0.5)
    checkpointer.save("model_0000009", iteration=9)
    fresh, fresh_optimizer, fresh_checkpointer = _training(reader, tmp_path, 0.25)
    extra = fresh_checkpointer.resume_or_load("", resume=True)
    assert extra["iteration"] == 9
    assert fresh_checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000009.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    states = [o.state_dict() for o in (optimizer, fresh_optimizer)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert torch.equal(states[0]["state"][0]["exp_avg"], states[1]["state"][0]["exp_avg"])


@BOTH
def test_checkpointer_reads_bare_state_dicts_and_pickles(d2, tmp_path):
    source = torch.nn.Linear(2, 1)
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    arrays = {name: value.numpy() for name, value in source.state_dict().items()}
    zoo = {"model": arrays, "__author__": "conformance"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(zoo))
    for name in ("bare.pth", "zoo.pkl"):
        model = torch.nn.Linear(2, 1)
        d2.DetectionCheckpointer(model).load(str(tmp_path / name))
        assert torch.equal(model.weight, source.weight)


@pytest.mark.parametrize(
    "name",
    "build_backbone build_model get_cfg default_argument_parser default_setup seed_all_rng "
    "configurable TrainingSampler InferenceSampler DetectionCheckpointer Boxes BitMasks Instances "
    "ImageList Backbone ShapeSpec ImageList.from_tensors Instances.cat Boxes.cat BitMasks.cat "
    "Boxes.clip Boxes.nonempty Instances.set CfgNode.merge_from_file comm.all_gather comm.gather "
    "comm.reduce_dict comm.create_local_process_group comm.get_local_rank comm.synchronize "
    "DatasetCatalog.register MetadataCatalog.get".split(),
)
def test_arguments_have_the_same_names_and_defaults(name):
    signatures = []
    for d2 in (builtin, REAL):
        found = d2
        for part in name.split("."):
            found = getattr(found, part)
        parameters = inspect.signature(found).parameters.values()
        signatures.append([(p.name, p.default, p.kind) for p in parameters])
    assert signatures[0] == signatures[1]


def test_surface_launch_and_logger_keep_their_arguments():
    from expedite_d2.d2 import launch, setup_logger

    real_logger = importlib.import_module("detectron2.utils.logger").setup_logger
    for ours, theirs in ((launch, REAL.launch), (setup_logger, real_logger)):
        names = [list(inspect.signature(function).parameters) for function in (ours, theirs)]
        assert names[0] == names[1]


def test_path_managers_resolve_the_same_addresses(monkeypatch):
    from iopath.common.file_io import HTTPURLHandler

    monkeypatch.setattr(HTTPURLHandler, "_get_local_path", lambda self, path, **kwargs: path)
    for address in ("detectron2://a/b.pkl", "https://host/c.pth", "http://host/d", "/tmp/e.pth"):
        ours, theirs = (d2.PathManager.get_local_path(address) for d2 in (builtin, REAL))
        assert ours == theirs
