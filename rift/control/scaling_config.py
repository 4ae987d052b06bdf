"""How each served model scales: the operator's policy, and the profile of one replica."""

from collections.abc import Mapping

import msgspec

from events import fleet, subjects
from events.contracts import SECOND_NS
from events.money import usd
from replay.scaling.hardware import Hardware, profiles
from replay.scaling.policy import Policy, bounds
from rift.catalogue import Profile
from rift.settings import InvalidSettings, Scale, Settings

# A simulated engine without a prefill pace reads prompts in no time, and has no memory to fill.
UNBOUNDED = 1_000_000_000

# How long a model that is kept warm keeps its floor without a request.
KEEP_WARM_NS = 3600 * SECOND_NS

# For a model without a measured profile: as slow as a large one. The starts of its replicas correct it.
UNKNOWN = Hardware(
    gpus=0,
    running_max=64,
    kv_tokens=1_000_000,
    prefill_tokens_per_s=5_000,
    step_us=20_000,
    step_us_per_running=1_000,
    start_ms=60_000,
    gpu_hour_nanousd=0,
    source="not measured: `rift calibrate` fits one",
)


class ModelScaling(msgspec.Struct, frozen=True):
    """One model of this installation."""

    policy: Policy
    hardware: Hardware

    @property
    def most(self) -> int:
        """The most replicas that the settings allow."""
        return bounds(self.policy, self.hardware)[1]


# For a model with replicas that `rift.toml` does not serve: it goes to zero.
NOT_SERVED = ModelScaling(Policy(replicas_min=0, replicas_max=0), UNKNOWN)


def model_scaling(settings: Settings) -> Mapping[str, ModelScaling]:
    """Return the scaling of each served model. Raises InvalidSettings if a budget pays for no replica."""
    scaling = {
        model: ModelScaling(_policy(scale), _hardware(settings, model))
        for model, scale in settings.scales().items()
    }
    for model, one in scaling.items():
        if one.policy.replicas_max and not bounds(one.policy, one.hardware)[1]:
            raise InvalidSettings(
                f'scale."{model}".hour_usd_max is too low for a single replica, which costs '
                f"{usd(one.hardware.hour_nanousd)} USD an hour"
            )
    return scaling


def unfilled_max(settings: Settings, model: str) -> int:
    """Return for how many prompt tokens a replica of the model holds back: none without a measured profile,
    because an engine that is faster than assumed would idle."""
    ttft_ms = settings.scales().get(model, Scale()).ttft_ms
    hardware = _hardware(settings, model)
    is_known = hardware.source != UNKNOWN.source
    return fleet.unfilled_max(ttft_ms, hardware.prefill_tokens_per_s if is_known else UNBOUNDED)


def _hardware(settings: Settings, model: str) -> Hardware:
    """Return one replica's profile: from `rift.toml`, else from the shipped profiles, else UNKNOWN."""
    profile = settings.catalogue_profile(model)
    name = f"{settings.hardware}-{subjects.slug(model)}"
    hardware = settings.profiles.get(name) or profiles().get(name) or UNKNOWN
    if settings.engine == "sim":
        hardware = _simulated(profile)
    if not profile.hour_nanousd:
        return hardware
    return msgspec.structs.replace(
        hardware, gpus=profile.gpus, gpu_hour_nanousd=profile.hour_nanousd // profile.gpus
    )


def _policy(scale: Scale) -> Policy:
    return Policy(
        replicas_min=scale.min,
        replicas_max=scale.max,
        idle_ns=scale.idle_s * SECOND_NS,
        ttft_ms=scale.ttft_ms,
        hour_nanousd_max=scale.hour_nanousd_max or 0,
        share=scale.share,
        warm_ns=KEEP_WARM_NS if scale.keep_warm else 0,
    )


def _simulated(profile: Profile) -> Hardware:
    pace = profile.sim
    return Hardware(
        gpus=profile.gpus,
        running_max=pace.running_max or int(profile.args.get("max_num_seqs", UNKNOWN.running_max)),
        kv_tokens=UNBOUNDED,
        prefill_tokens_per_s=pace.prefill_tokens_per_s or UNBOUNDED,
        step_us=pace.step_us,
        step_us_per_running=pace.step_us_per_running,
        start_ms=pace.start_ms,
        gpu_hour_nanousd=0,
        source="the simulated engine's pace",
    )
