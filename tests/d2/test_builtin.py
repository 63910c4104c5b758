"""The stand-in for Detectron2 by itself: runs everywhere."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch

from expedite_d2.d2 import builtin


def test_import_leaves_the_name_detectron2_alone():
    code = "import sys, expedite_d2.d2.builtin; print('detectron2' in sys.modules)"
    environment = {**os.environ, "EXPEDITE_D2_PROVIDER": "builtin"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"


def test_cfg_merges_base_files_tuples_and_python_tags(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "MODEL:\n  BACKBONE:\n    FREEZE_AT: 0\nSOLVER:\n  STEPS: (10, 20)\nVERSION: 2\n"
    )
    (tmp_path / "leaf.yaml").write_text(
        "_BASE_: base.yaml\n"
        "SOLVER:\n  MAX_ITER: 30\n"
        "INPUT:\n  MIN_SIZE_TRAIN: !!python/object/apply:eval ['[x * 10 for x in range(2)]']\n"
    )
    cfg = builtin.get_cfg()
    cfg.merge_from_file(str(tmp_path / "leaf.yaml"))
    assert cfg.SOLVER.STEPS == (10, 20)
    assert cfg.SOLVER.MAX_ITER == 30
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert cfg.INPUT.MIN_SIZE_TRAIN == (0, 10)


def test_get_cfg_returns_independent_copies():
    first, second = builtin.get_cfg(), builtin.get_cfg()
    first.MODEL.PIXEL_MEAN[0] = 0.0
    assert second.MODEL.PIXEL_MEAN[0] == 103.53


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("MODEL:\n  BACKBONE:\n    DEPHT: 3\n", KeyError, "MODEL.BACKBONE.DEPHT"),
        ("SOLVER:\n  MAX_ITER: many\n", ValueError, "SOLVER.MAX_ITER"),
        ("VERSION: 1\n", ValueError, "VERSION 2, got 1"),
    ],
)
def test_cfg_names_the_bad_key(tmp_path, text, error, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        builtin.get_cfg().merge_from_file(str(path))


def test_cfg_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.yaml"):
        builtin.get_cfg().merge_from_file(str(tmp_path / "absent.yaml"))


def test_registries_build_what_the_config_names():
    registry = builtin.BACKBONE_REGISTRY

    class Plain(builtin.Backbone):
        def __init__(self, cfg, input_shape):
            super().__init__()
            self.channels = input_shape.channels
            self._out_features = ["res2"]
            self._out_feature_channels = {"res2": 8}
            self._out_feature_strides = {"res2": 4}

        def forward(self, images):
            return {"res2": images}

    registry.register(Plain)
    try:
        cfg = builtin.get_cfg()
        cfg.MODEL.BACKBONE.NAME = "Plain"
        backbone = builtin.build_backbone(cfg)
        assert backbone.channels == 3
        assert backbone.size_divisibility == 0
        assert backbone.padding_constraints == {}
        assert backbone.output_shape() == {"res2": builtin.ShapeSpec(channels=8, stride=4)}
        cfg.MODEL.BACKBONE.NAME = "Unheard"
        with pytest.raises(KeyError, match="Unheard"):
            builtin.build_backbone(cfg)
    finally:
        del registry._obj_map["Plain"]


def test_backbone_is_abstract():
    with pytest.raises(TypeError):
        builtin.Backbone()


def test_instances_index_all_fields_together():
    objects = builtin.Instances((4, 6))
    objects.scores = torch.tensor([0.1, 0.9, 0.5])
    objects.pred_boxes = builtin.Boxes(torch.arange(12.0).view(3, 4))
    objects.names = ["a", "b", "c"]
    last = objects[-1]
    assert len(last) == 1 and last.names == ["c"] and last.scores.tolist() == [0.5]
    assert last.pred_boxes.tensor.tolist() == [[8.0, 9.0, 10.0, 11.0]]
    both = builtin.Instances.cat([objects, last])
    assert len(both) == 4 and both.names == ["a", "b", "c", "c"]
    assert both.image_size == (4, 6)


def test_instances_survive_copy_and_pickle():
    objects = builtin.Instances((4, 6), scores=torch.tensor([0.5]))
    for copied in (copy.deepcopy(objects), pickle.loads(pickle.dumps(objects))):
        assert copied.image_size == (4, 6) and copied.scores.tolist() == [0.5]


def test_instances_refuse_a_field_of_another_length():
    objects = builtin.Instances((4, 6), scores=torch.zeros(3))
    with pytest.raises(AssertionError, match="'pred_classes' must have 3 entries, got 2"):
        objects.pred_classes = torch.zeros(2)
    with pytest.raises(AttributeError, match="pred_masks"):
        _ = objects.pred_masks


def test_image_list_pads_to_the_largest():
    images = [torch.ones(3, 5, 7), torch.ones(3, 6, 4)]
    batch = builtin.ImageList.from_tensors(images, size_divisibility=4, pad_value=9.0)
    assert batch.tensor.shape == (2, 3, 8, 8)
    assert batch.image_sizes == [(5, 7), (6, 4)]
    assert torch.equal(batch[1], images[1])
    assert batch.tensor[0, :, 5:].unique().tolist() == [9.0]


def test_bit_masks_boxes_by_hand():
    masks = torch.zeros(2, 5, 6, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    boxes = builtin.BitMasks(masks).get_bounding_boxes()
    assert boxes.tensor.tolist() == [[2.0, 1.0, 6.0, 3.0], [0.0, 0.0, 0.0, 0.0]]
    assert boxes.area().tolist() == [8.0, 0.0]


@pytest.mark.parametrize("size", [1, 5, 8])
def test_inference_samplers_cover_every_index_once(monkeypatch, size):
    monkeypatch.setattr(builtin.comm, "get_world_size", lambda: 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(builtin.comm, "get_rank", lambda rank=rank: rank)
        sampler = builtin.InferenceSampler(size)
        assert len(sampler) == len(list(sampler))
        seen += list(sampler)
    assert seen == list(range(size))


def test_training_samplers_share_one_stream(monkeypatch):
    monkeypatch.setattr(builtin.comm, "get_world_size", lambda: 2)
    streams = []
    for rank in range(2):
        monkeypatch.setattr(builtin.comm, "get_rank", lambda rank=rank: rank)
        sampler = builtin.TrainingSampler(5, seed=3)
        streams.append(list(itertools.islice(sampler, 10)))
    joined = [index for pair in zip(*streams, strict=True) for index in pair]
    assert all(sorted(joined[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (2.0, TypeError)])
def test_training_sampler_refuses_bad_sizes(size, error):
    with pytest.raises(error, match="TrainingSampler: size"):
        builtin.TrainingSampler(size, seed=0)


def test_catalogs_register_once_and_name_what_is_there():
    catalog = type(builtin.DatasetCatalog)()
    catalog.register("toy", lambda: [{"image_id": 1}])
    assert catalog.get("toy") == [{"image_id": 1}]
    with pytest.raises(AssertionError, match="'toy' is already registered"):
        catalog.register("toy", list)
    with pytest.raises(KeyError, match="'toys' is not registered; registered are: toy"):
        catalog.get("toys")


def test_metadata_keeps_its_first_value():
    catalog = type(builtin.MetadataCatalog)()
    metadata = catalog.get("toy").set(thing_classes=["cup"])
    assert catalog.get("toy") is metadata
    metadata.thing_classes = ["cup"]
    with pytest.raises(AssertionError, match="thing_classes"):
        metadata.thing_classes = ["bowl"]
    with pytest.raises(AttributeError, match="'toy' has no 'stuff_classes'"):
        _ = metadata.stuff_classes
    assert metadata.get("stuff_classes", []) == []


def test_checkpointer_reads_model_zoo_pickles(tmp_path):
    model = torch.nn.Linear(2, 1, bias=False)
    zoo = {"model": {"weight": model.weight.detach().numpy() + 1}, "__author__": "somebody"}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps(zoo))
    expected = model.weight.detach() + 1
    builtin.DetectionCheckpointer(model).load(str(path))
    assert torch.equal(model.weight, expected)
    path.write_bytes(pickle.dumps({"blobs": {}}))
    with pytest.raises(ValueError, match="name matching"):
        builtin.DetectionCheckpointer(model).load(str(path))


def test_comm_in_a_world_of_one():
    comm = builtin.comm
    assert (comm.get_rank(), comm.get_world_size()) == (0, 1)
    assert (comm.get_local_rank(), comm.get_local_size()) == (0, 1)
    assert comm.is_main_process()
    assert comm.all_gather("x") == comm.gather("x") == ["x"]
    losses = {"loss": torch.tensor(1.0)}
    assert comm.reduce_dict(losses) == losses
    comm.synchronize()


def test_configurable_takes_a_config_or_arguments():
    class Thing:
        @builtin.configurable
        def __init__(self, depth, width=2):
            self.depth, self.width = depth, width

        @classmethod
        def from_config(cls, cfg):
            return {"depth": cfg.MODEL.RESNETS.DEPTH}

    cfg = builtin.get_cfg()
    assert vars(Thing(cfg)) == {"depth": 50, "width": 2}
    assert vars(Thing(cfg, width=5)) == {"depth": 50, "width": 5}
    assert vars(Thing(cfg=cfg)) == {"depth": 50, "width": 2}
    assert vars(Thing(depth=1)) == {"depth": 1, "width": 2}


def test_seeds_repeat_the_random_numbers():
    builtin.seed_all_rng(7)
    first = torch.rand(3)
    builtin.seed_all_rng(7)
    assert torch.equal(first, torch.rand(3))


def test_path_manager_knows_what_detectron2_publishes(tmp_path, monkeypatch):
    from iopath.common import file_io

    fetched = []

    def download(url, directory, *, filename):
        fetched.append(url)
        (tmp_path / filename).write_text("x")
        return str(tmp_path / filename)

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(file_io, "download", download)
    address = "detectron2://ImageNetPretrained/a/R-50.pkl"
    assert builtin.PathManager.get_local_path(address) == str(tmp_path / "R-50.pkl")
    with builtin.PathManager.open(address) as file:
        assert file.read() == "x"
    assert fetched == ["https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/a/R-50.pkl"]
    assert builtin.DetectionCheckpointer(torch.nn.Linear(1, 1)).path_manager is builtin.PathManager
