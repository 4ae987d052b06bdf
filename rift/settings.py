"""Settings: one frozen struct, read once from `rift.toml` and the command line.

An invalid setting prevents the start. The error names its key, its value and the valid values.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from events.contracts import BODY_BYTES_MAX
from replay.scaling.hardware import Hardware
from rift import catalogue
from rift.catalogue import Catalogue, InvalidCatalogue, Model, Natural, Positive, Profile
from rift.errors import RiftError
from rift.logs.formats import Format
from rift.metrics import address
from rift.metrics.address import PORT_MAX, Address, InvalidAddress

# Every shard takes `log_bytes_max` of disk, and control reads all of them.
SHARDS_MAX = 64

# Replicas of one model. Each follows the log, and beyond this number the readers of one stream take more
# work than the requests.
REPLICAS_MAX = 64

Port = Annotated[int, msgspec.Meta(ge=0, le=PORT_MAX)]
# Plain HTTP without a password, which is all that nats-server's monitoring offers by default.
MONITOR = re.compile(
    r"http://(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?(?:/[A-Za-z0-9._/-]*)?"
)
Replicas = Annotated[int, msgspec.Meta(ge=0, le=REPLICAS_MAX)]
Share = Annotated[int, msgspec.Meta(ge=0, le=100)]
# `N`, or a text like `MIN..MAX`.
Workers = Replicas | str
WORKERS = re.compile(r"([0-9]{1,2})(?:\.\.([0-9]{1,2}))?")


class InvalidSettings(RiftError):
    """A setting is invalid; the message names it."""


class Scale(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many replicas a served model may have.

    After `idle_s` without a request it has `min`. First tokens are due within `ttft_ms` for `share` per cent
    of the requests. With `keep_warm`, the replicas that this takes outlive `idle_s`, for an hour at most. All
    replicas together cost at most `hour_usd_max` per hour.
    """

    min: Replicas = 0
    max: Replicas = 1
    idle_s: Natural = 300
    ttft_ms: Positive = 2000
    share: Share = 99
    keep_warm: bool = False
    hour_usd_max: str = ""

    @property
    def hour_nanousd_max(self) -> int | None:
        """None means no limit."""
        return (
            catalogue.nanousd_an_hour(self.hour_usd_max, where="hour_usd_max") if self.hour_usd_max else None
        )


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of an installation.

    `models` adds entries to the shipped catalogue or replaces them. `scale` serves further models, or refines
    the default one. `profiles` describes what one replica can do, as `rift calibrate` prints it.
    """

    host: Annotated[str, msgspec.Meta(min_length=1)] = "127.0.0.1"
    port: Port = 8000
    model: str = "smollm2:135m"
    workers: Workers = 1
    engine: Literal["vllm", "sim"] = "vllm"
    hardware: str = "cpu"
    fleet: Literal["local", "kubernetes", "none"] = "local"
    # A smaller limit would leave too little room for a body's other fields.
    native_prompt_tokens_max: Annotated[int, msgspec.Meta(ge=1024, le=BODY_BYTES_MAX)] = (
        catalogue.NATIVE_PROMPT_TOKENS_MAX
    )
    drain_s: Annotated[int, msgspec.Meta(ge=0, le=3600)] = 0
    nats_monitor: str = ""
    broker_unchecked: bool = False
    metrics: str = "127.0.0.1"
    metrics_accounts: bool = False
    log_format: Format = "text"
    shards: Annotated[int, msgspec.Meta(ge=1, le=SHARDS_MAX)] | None = None
    log_replicas: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1
    # Gateways refuse requests below 64 MiB of room, and the archiver makes room before that.
    log_bytes_max: Annotated[int, msgspec.Meta(ge=1 << 28, le=1 << 60)] = 4 << 30
    retention_days: Annotated[int, msgspec.Meta(ge=0, le=36_500)] = 7
    archive_content: bool = False
    seal_content: bool = False
    scale: dict[str, Scale] = {}
    profiles: dict[str, Hardware] = {}
    models: dict[str, Model] = {}

    def catalogue(self) -> Catalogue:
        """Return every model that this installation knows, the default first."""
        known = {**catalogue.shipped(), **self.models}
        return {self.model: known[self.model], **known}

    def url(self, port: int | None = None) -> str:
        """Return the gateway's URL for clients on this machine, with `port` in place of the setting."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port if port is None else port}"

    def monitors(self) -> list[str]:
        """Return the monitoring URL of each server of a broker that is not embedded."""
        return [url.strip() for url in self.nats_monitor.split(",") if url.strip()]

    def metrics_address(self, role_port: int) -> Address | None:
        """Return where a role serves its metrics, None for nowhere. `role_port` is its own port."""
        return address.parsed(self.metrics, role_port)

    @property
    def control_metrics(self) -> Address | None:
        return self.metrics_address(address.CONTROL_PORT)

    @property
    def worker_metrics(self) -> Address | None:
        return self.metrics_address(address.WORKER_PORT)

    def catalogue_profile(self, model: str) -> Profile:
        """Return how the catalogue serves a model on this installation's hardware."""
        return self.catalogue()[model].profiles.get(self.hardware, Profile())

    def scales(self) -> dict[str, Scale]:
        """Return every model that this installation serves, the default first.

        Empty with `fleet = "none"`: then every model with a running worker is served.
        """
        if self.fleet == "none":
            return {}
        served = {self.model: self.scale.get(self.model) or _scaled(Scale(), self.workers), **self.scale}
        return {model: scale for model, scale in served.items() if scale.max}


def load(file: Path | None, overrides: dict[str, Any]) -> Settings:
    """Return the settings of an optional file, overridden by the command line. Raises InvalidSettings."""
    if file is not None and file.is_fifo():
        raise InvalidSettings(f"{file} is a pipe, but each process reads the settings again: name a file")
    try:
        data = b"" if file is None else file.read_bytes()
    except OSError as error:
        raise InvalidSettings(f"{file} cannot be read: {error.strerror}") from error
    return parsed(data, overrides, where=str(file or "settings"))


def parsed(data: bytes, overrides: dict[str, Any], *, where: str) -> Settings:
    """As `load`, for the content of a file."""
    try:
        tables = msgspec.toml.decode(data.removeprefix(BOM_UTF8))
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidSettings(f"{where}: {error}") from error
    # The processes of an installation do not all get the same options, so the file must be valid by itself.
    settings = _checked(tables, {}, where)
    return _checked(tables, overrides, where) if overrides else settings


def _checked(tables: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Settings:
    """Return the settings of a decoded file and options. Raises InvalidSettings."""
    tables = dict(tables)
    try:
        if "replicas" in tables:
            if "log_replicas" in tables:
                raise InvalidSettings("replicas: the old name of log_replicas, which is set too; remove it")
            tables["log_replicas"] = tables.pop("replicas")
        entries = tables.pop("models", {})
        if not isinstance(entries, dict):
            raise InvalidSettings(f'{where}: models: must be tables, like [models."NAME"], got {entries!r}')
        models = catalogue.load(entries)
        known = catalogue.checked({**catalogue.shipped(), **models})
        settings = msgspec.convert({**tables, **overrides}, Settings)
        _scaled(Scale(), settings.workers)
        settings = msgspec.structs.replace(settings, models=models)
        if settings.model not in known:
            raise InvalidSettings(
                f"model {settings.model!r} is not in the catalogue; known models: {', '.join(known)}"
            )
        _check_hardware(settings)
        for url in settings.monitors():
            _check_monitor(url)
        try:
            settings.metrics_address(0)
        except InvalidAddress as error:
            raise InvalidSettings(f"metrics: {error}") from error
        scale = _checked_scale(settings, tables.get("scale", {}), has_option="workers" in overrides)
    except (msgspec.ValidationError, InvalidCatalogue) as error:
        raise InvalidSettings(f"{where}: {error}") from error
    return msgspec.structs.replace(settings, scale=scale)


def _check_hardware(settings: Settings) -> None:
    """Raise InvalidSettings if no model has a profile of the hardware."""
    name = settings.hardware
    profiles = {profile for model in settings.catalogue().values() for profile in model.profiles}
    # A model without profiles runs on the CPU.
    if name not in (known := sorted({"cpu", *profiles})):
        raise InvalidSettings(
            f"hardware: no model has a profile for {name!r}; known: {', '.join(known)}; to add one, see "
            f"`rift models add --help`, or write models.NAME.profiles.{name} in rift.toml"
        )


def _check_monitor(url: str) -> None:
    """Raises InvalidSettings."""
    match = MONITOR.fullmatch(url)
    if match is None or not 0 < int(match["port"] or 80) <= PORT_MAX:
        raise InvalidSettings(
            "nats_monitor: must be http://HOST:PORT of each nats-server's monitoring, separated by commas, "
            f"got {url!r}"
        )


def _checked_scale(settings: Settings, tables: Mapping[str, Any], *, has_option: bool) -> dict[str, Scale]:
    """Return the scale of each named model and of the default model.

    The default model's numbers come from its table, or else from `workers`. Raises InvalidSettings,
    InvalidCatalogue.
    """
    default = settings.model
    scales = {default: Scale(), **settings.scale}
    if not tables.get(default, {}).keys() & {"min", "max"}:
        scales[default] = _scaled(scales[default], settings.workers)
    elif has_option:
        raise InvalidSettings(f'--workers: scale."{default}" already sets min and max; leave one of them out')
    known = settings.catalogue()
    for model, scale in scales.items():
        where = f'scale."{model}"'
        if model not in known:
            raise InvalidSettings(
                f"{where}: no such model in the catalogue; known models: {', '.join(known)}"
            )
        if scale.min > scale.max:
            raise InvalidSettings(f"{where}: min must not exceed max, got {scale.min} and {scale.max}")
        catalogue.nanousd_an_hour(scale.hour_usd_max, where=f"{where}.hour_usd_max")
    return scales


def _scaled(scale: Scale, workers: int | str) -> Scale:
    """Return the scale with the bounds of `N` or `MIN..MAX`. Raises InvalidSettings."""
    bounds = WORKERS.fullmatch(str(workers))
    least, most = (int(bounds[1]), int(bounds[2] or bounds[1])) if bounds else (1, 0)
    if not least <= most <= REPLICAS_MAX:
        raise InvalidSettings(
            f"workers: must be N or MIN..MAX with MIN <= MAX <= {REPLICAS_MAX}, "
            f'like 2 or "0..4", got {workers!r}'
        )
    return msgspec.structs.replace(scale, min=least, max=most)
