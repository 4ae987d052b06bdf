"""Settings: one frozen struct, read once from `rift.toml` and the command line.

A wrong setting stops the start and names its key, its value and what is wanted.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from replay.scaling.hardware import Hardware
from rift import catalogue
from rift.catalogue import Catalogue, InvalidCatalogue, Model, Natural, Positive
from rift.errors import RiftError

# One to begin with; more can be added on any day without moving anything.
SHARDS = 1

# Of one model. Each follows the log: past this the readers of one stream are more work than the requests.
REPLICAS_MAX = 64

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Replicas = Annotated[int, msgspec.Meta(ge=0, le=REPLICAS_MAX)]
# `N`, or `MIN..MAX`.
Workers = Replicas | Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,2}(\.\.[0-9]{1,2})?$")]


class InvalidSettings(RiftError):
    """A setting cannot be used; the message names it."""


class Scale(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many replicas a model that is served may have, and what decides between: after `idle_s` without a
    request it has `min`; first tokens are due within `ttft_ms`; all of them cost at most `hour_usd_max`."""

    min: Replicas = 0
    max: Replicas = 1
    idle_s: Natural = 300
    ttft_ms: Positive = 2000
    hour_usd_max: str = ""

    @property
    def hour_nanousd_max(self) -> int | None:
        """None: no ceiling."""
        return (
            catalogue.nanousd_an_hour(self.hour_usd_max, where="hour_usd_max") if self.hour_usd_max else None
        )


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an installation is told. `models` adds to the shipped catalogue, or replaces entries; `scale` adds
    models that are served beside the default one, or says more of it; `profiles` says what one replica is, as
    `rift calibrate` prints it."""

    host: str = "127.0.0.1"
    port: Port = 8000
    model: str = "smollm2:135m"
    workers: Workers = 1
    engine: Literal["vllm", "sim"] = "vllm"
    hardware: str = "cpu"
    fleet: Literal["local", "kubernetes", "none"] = "local"
    drain_s: Annotated[int, msgspec.Meta(ge=0, le=3600)] = 0
    replicas: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1
    # Below 64 MiB of room gateways refuse, and before that the archiver makes room.
    log_bytes_max: Annotated[int, msgspec.Meta(ge=1 << 28)] = 4 << 30
    retention_days: Annotated[int, msgspec.Meta(ge=0, le=36_500)] = 7
    archive_content: bool = False
    seal_content: bool = False
    scale: dict[str, Scale] = {}
    profiles: dict[str, Hardware] = {}
    models: dict[str, Model] = {}

    def catalogue(self) -> Catalogue:
        """Every model that this installation knows, the default first."""
        known = {**catalogue.shipped(), **self.models}
        return {self.model: known[self.model], **known}

    def scales(self) -> dict[str, Scale]:
        """Every model that this installation serves, the default first. Where workers are started by hand
        that is none: what runs is served."""
        if self.fleet == "none":
            return {}
        served = {self.model: self.scale.get(self.model) or _scaled(Scale(), self.workers), **self.scale}
        return {model: scale for model, scale in served.items() if scale.max}


def load(file: Path | None, overrides: dict[str, Any]) -> Settings:
    """Return the settings of a file (or none), overridden by the command line. Raises InvalidSettings."""
    try:
        data = b"" if file is None else file.read_bytes()
    except OSError as error:
        raise InvalidSettings(f"{file}: {error}") from error
    return parsed(data, overrides, where=str(file or "settings"))


def parsed(data: bytes, overrides: dict[str, Any], *, where: str) -> Settings:
    """As `load`, of a file's content."""
    try:
        found = msgspec.toml.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{where}: {error}") from error
    try:
        models = catalogue.load(dict(found.pop("models", {})))
        known = catalogue.checked({**catalogue.shipped(), **models})
        settings = msgspec.convert({**found, **overrides}, Settings)
        settings = msgspec.structs.replace(settings, models=models)
        if settings.model not in known:
            raise InvalidSettings(
                f"model {settings.model!r} is not in the catalogue; known: {', '.join(known)}"
            )
        scale = _checked(settings, found.get("scale", {}), is_told="workers" in overrides)
    except (msgspec.ValidationError, InvalidCatalogue) as error:
        raise InvalidSettings(f"{where}: {error}") from error
    return msgspec.structs.replace(settings, scale=scale)


def _checked(settings: Settings, tables: Mapping[str, Any], *, is_told: bool) -> dict[str, Scale]:
    """Return the scale of each model that is named, the default model among them: its numbers are those of
    its table, or else `workers`. Raises InvalidSettings, InvalidCatalogue."""
    default = settings.model
    scales = {default: Scale(), **settings.scale}
    if not tables.get(default, {}).keys() & {"min", "max"}:
        scales[default] = _scaled(scales[default], settings.workers)
    elif is_told:
        raise InvalidSettings(f'--workers: scale."{default}" says min and max already; leave one of them out')
    known = settings.catalogue()
    for model, scale in scales.items():
        where = f'scale."{model}"'
        if model not in known:
            raise InvalidSettings(f"{where}: no such model in the catalogue; known: {', '.join(known)}")
        if scale.min > scale.max:
            raise InvalidSettings(f"{where}: min is {scale.min} and max {scale.max}; write min <= max")
        catalogue.nanousd_an_hour(scale.hour_usd_max, where=f"{where}.hour_usd_max")
    return scales


def _scaled(scale: Scale, workers: int | str) -> Scale:
    """Raises InvalidSettings."""
    least, _, most = str(workers).partition("..")
    bounds = int(least), int(most or least)
    if not bounds[0] <= bounds[1] <= REPLICAS_MAX:
        wanted = f'write N or MIN..MAX with MIN <= MAX <= {REPLICAS_MAX}, like 2 or "0..4"'
        raise InvalidSettings(f"workers: {workers!r}: {wanted}")
    return msgspec.structs.replace(scale, min=bounds[0], max=bounds[1])
