"""Addresses of checkpoints: what handlers fetch, and what they cannot. Nothing is connected to."""

from __future__ import annotations

import io
import logging
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from http.client import RemoteDisconnected
from pathlib import Path
from typing import Any

import pytest
import torch
from iopath.common.file_io import PathHandler

from expedite_d2.d2 import PathManager
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.addresses import local_path
from expedite_d2.d2.config import PROJECT, load_config


class Store(PathHandler):
    """Files of a folder under ``store://``; a name with "broken" fails as libraries do."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _get_supported_prefixes(self) -> list[str]:
        return ["store://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        if "broken" in path:
            raise RuntimeError("AccessDenied\nby a library of many lines")
        return str(self.folder / path.removeprefix("store://"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, handlers that remember nothing, and ``store://``."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    handlers = PathManager._path_handlers.copy()
    for handler in handlers.values():
        if hasattr(handler, "cache_map"):
            monkeypatch.setattr(handler, "cache_map", {})
    PathManager.register_handler(Store(tmp_path))
    yield tmp_path / "cache"
    PathManager._path_handlers = handlers


class Response(io.BytesIO):
    """What urlopen returns."""

    def __init__(self, content: bytes, announced: int) -> None:
        super().__init__(content)
        self.headers = Message()
        self.headers["Content-Length"] = str(announced)

    def info(self) -> Message:
        return self.headers


def serve(
    monkeypatch: pytest.MonkeyPatch, content: bytes, announced: int | None = None
) -> list[str]:
    """Let urllib answer with a file; the addresses that it was asked for."""
    asked: list[str] = []

    def urlopen(url: str, *args: Any, **kwargs: Any) -> Response:
        asked.append(url)
        return Response(content, len(content) if announced is None else announced)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def checkpoint(path: Path) -> bytes:
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("detectron2://X/1/model.pth", "https://dl.fbaipublicfiles.com/detectron2/X/1/model.pth"),
        ("https://host/a/model.pth", "https://host/a/model.pth"),
        ("http://host/a/model.pth", "http://host/a/model.pth"),
        ("ftp://host/a/model.pth", "ftp://host/a/model.pth"),
    ],
)
def test_an_address_is_fetched_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, asked: str
) -> None:
    requests = serve(monkeypatch, checkpoint(tmp_path / "x.pth"))
    models = [torch.nn.Linear(2, 3) for _ in range(2)]
    for model in models:
        load_weights(model, address)
    assert requests == [asked]
    assert torch.equal(models[0].weight, models[1].weight)
    assert torch.equal(models[0].weight, torch.load(tmp_path / "x.pth")["weight"])
    assert cache in local_path(address).parents


def test_a_registered_handler_gives_files_and_folders(cache: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "x.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/variant.yml").write_text("net_kwargs: {}")
    checkpoint(tmp_path / "folder/checkpoint.pth")
    for address in ("store://x.pth", "store://folder"):
        load_weights(torch.nn.Linear(2, 3), address)


def test_a_config_keeps_an_address_as_it_is() -> None:
    cfg = load_config(
        "scenes/semantic/segmenter_vit_mini.yaml", ["MODEL.WEIGHTS", "detectron2://a.pkl"]
    )
    assert cfg.MODEL.WEIGHTS == "detectron2://a.pkl"
    assert local_path("expedite_d2://a.pth") == PROJECT / "weights/a.pth"
    assert local_path("./a/../b.pth") == Path("./a/../b.pth")


REFUSED = urllib.error.URLError(ConnectionRefusedError(111, "Connection refused"))
OFFLINE = urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))
MISSING = urllib.error.HTTPError("https://host/a.pth", 404, "Not Found", Message(), None)


@pytest.mark.parametrize("address", ["detectron2://a.pth", "https://host/a.pth"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OFFLINE, "Name or service not known"),
        (REFUSED, "Connection refused"),
        (MISSING, "HTTP Error 404: Not Found"),
        (TimeoutError("timed out"), "timed out"),
        (RemoteDisconnected("Remote end closed connection"), "Remote end closed connection"),
        (ValueError(), "ValueError"),
    ],
)
def test_without_a_connection_there_is_one_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch, address: str, error: Exception, reason: str
) -> None:
    def urlopen(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(OSError) as caught:
        load_weights(torch.nn.Linear(2, 3), address)
    assert str(caught.value) == f"{address} cannot be fetched: {reason}"
    assert not list(cache.rglob("*.pth"))


def test_half_a_download_is_never_taken_for_the_whole(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, address = checkpoint(tmp_path / "x.pth"), "https://host/a.pth"
    serve(monkeypatch, content[:500], announced=len(content))
    with pytest.raises(OSError, match=r"a.pth cannot be fetched: retrieval incomplete: got only"):
        load_weights(torch.nn.Linear(2, 3), address)
    assert not list(cache.rglob("*.pth")) and not list(cache.rglob("*.tmp"))
    serve(monkeypatch, content)
    load_weights(torch.nn.Linear(2, 3), address)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/a.pth", "no handler for s3:// is registered with the PathManager"),
        ("file:///a.pth", "no handler for file:// is registered with the PathManager"),
        ("gs://a.pth", "no handler for gs:// is registered with the PathManager"),
        ("store://broken.pth", "AccessDenied"),
        ("detectron3://a.pkl", "no handler for detectron3:// is registered with the PathManager"),
    ],
)
def test_an_address_that_no_handler_can_fetch_is_named(
    cache: Path, address: str, message: str
) -> None:
    with pytest.raises(OSError) as caught:
        load_weights(torch.nn.Linear(2, 3), address)
    assert str(caught.value) == f"{address} cannot be fetched: {message}"


def test_an_address_whose_file_is_missing_is_told(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.pth not found"):
        load_weights(torch.nn.Linear(2, 3), "store://no.pth")


def test_what_was_fetched_is_named_by_its_address(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint(tmp_path / "x.pth")
    with caplog.at_level(logging.INFO, logger="expedite_d2"):
        load_weights(torch.nn.Linear(2, 3), "store://x.pth")
    assert "loaded store://x.pth" in caplog.text
    with pytest.raises(ValueError, match="store://x.pth is a checkpoint of another model"):
        load_weights(torch.nn.Linear(2, 4), "store://x.pth")
