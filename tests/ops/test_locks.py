"""The locks pin every package to one version, and satisfy pyproject.toml."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("base", "torch-cpu", "engine-cpu", "test")
TORCH = "torch-cpu"  # the only lock without hashes
PIN = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([0-9][0-9a-z.+]*)((?: --hash=sha256:[0-9a-f]{64})*)")

# Declared dependencies that a lock leaves out, for the reason at the top of the lock.
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision", "triton", "llm", "llama-cpp-python", "pip"}


def lock(name: str) -> list[tuple[str, str]]:
    text = (ROOT / "ops" / "lock" / f"{name}.txt").read_text()
    lines = re.sub(r" \\\n +", " ", text).splitlines()
    pins = [PIN.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(pins), f"{name}: a line must be an exact pin like name==1.2, then its hashes"
    assert all(bool(pin[3]) == (name != TORCH) for pin in pins if pin), f"{name}: run ops/lock/update"
    return [(pin[1], pin[2]) for pin in pins if pin]


def requirements(name: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] if name == "base" else project["optional-dependencies"][name]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_a_lock_pins_each_package_once_in_order(name: str) -> None:
    packages = [package for package, _ in lock(name)]
    assert packages == sorted(packages)
    assert len(packages) == len(set(packages))


def test_one_version_of_each_package_over_all_locks() -> None:
    pins = {pin for name in NAMES for pin in lock(name)}
    assert len(pins) == len({package for package, _ in pins})
    base = {package for package, _ in lock("base")}
    assert not base & {package for name in NAMES[1:] for package, _ in lock(name)}


@pytest.mark.parametrize("name", ["base", "test"])
def test_the_locks_satisfy_the_project(name: str) -> None:
    pins = dict(lock("base")) | dict(lock(name))
    asked = requirements(name)
    assert asked
    for requirement in asked:
        assert requirement.specifier.contains(Version(pins[requirement.name.lower()])), requirement


@pytest.mark.parametrize("name", ["base", "engine-cpu", "test"])
def test_a_lock_is_complete(name: str) -> None:
    """Installed packages declare no dependency that the lock lacks, except those left out on purpose."""
    pins = dict(lock("base")) | dict(lock(name)) | dict(lock(TORCH) if name == "engine-cpu" else [])
    lacking = set()
    for package in pins:
        try:
            declared = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed here")
        for requirement in map(Requirement, declared):
            wanted = requirement.name.lower().replace("_", "-").replace(".", "-")
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            if wanted not in LEFT_OUT and (
                wanted not in pins or not requirement.specifier.contains(pins[wanted], prereleases=True)
            ):
                lacking.add(f"{package} wants {requirement}")
    assert not lacking
