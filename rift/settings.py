"""Settings: one frozen struct, read once from `rift.toml` and the command line.

A wrong setting stops the start and names its key, its value and what is wanted.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from rift import catalogue
from rift.catalogue import Catalogue, CatalogueWrong, Model

# One to begin with; more can be added on any day without moving anything.
SHARDS = 1

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class SettingsWrong(ValueError):
    """A setting cannot be used; the message names it."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an installation is told. `models` adds to the shipped catalogue, or replaces entries."""

    host: str = "127.0.0.1"
    port: Port = 8000
    model: str = "smollm2:135m"
    workers: Annotated[int, msgspec.Meta(ge=0, le=64)] = 1
    engine: Literal["vllm", "sim"] = "vllm"
    hardware: str = "cpu"
    drain_s: Annotated[int, msgspec.Meta(ge=0, le=3600)] = 0
    replicas: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1
    # Below 64 MiB of room gateways refuse, and before that the archiver makes room.
    log_bytes_max: Annotated[int, msgspec.Meta(ge=1 << 28)] = 4 << 30
    retention_days: Annotated[int, msgspec.Meta(ge=0, le=36_500)] = 7
    archive_content: bool = False
    models: dict[str, Model] = {}

    def catalogue(self) -> Catalogue:
        """Every model that this installation knows, the default first."""
        known = {**catalogue.shipped(), **self.models}
        return {self.model: known[self.model], **known}


def load(file: Path | None, overrides: dict[str, Any]) -> Settings:
    """Return the settings of a file (or none) with what the command line overrides. Raises SettingsWrong."""
    found: dict[str, Any] = {}
    if file is not None:
        try:
            found = msgspec.toml.decode(file.read_bytes())
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SettingsWrong(f"{file}: {error}") from error
    try:
        models = catalogue.load(dict(found.pop("models", {})))
        known = catalogue.checked({**catalogue.shipped(), **models})
        settings = msgspec.convert({**found, **overrides}, Settings)
    except (msgspec.ValidationError, CatalogueWrong) as error:
        raise SettingsWrong(f"{file or 'settings'}: {error}") from error
    settings = msgspec.structs.replace(settings, models=models)
    if settings.model not in known:
        raise SettingsWrong(f"model {settings.model!r} is not in the catalogue; known: {', '.join(known)}")
    return settings
