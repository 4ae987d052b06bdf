"""What the autoscaler is told of each served model: the operator's settings, and what one replica is."""

import msgspec

from events import subjects
from events.contracts import SECOND_NS
from events.money import usd
from replay.scaling.hardware import Hardware, profiles
from replay.scaling.policy import Policy, bounds
from rift.catalogue import Profile
from rift.control.duties.autoscaler import UNKNOWN, ModelScaling
from rift.settings import InvalidSettings, Scale, Settings

# The simulated engine reads prompts at once where it is not told how fast, and has no memory to fill.
UNBOUNDED = 1_000_000_000


def served(settings: Settings) -> dict[str, ModelScaling]:
    """Raises InvalidSettings."""
    found = {
        model: ModelScaling(_policy(scale), hardware_of(settings, model))
        for model, scale in settings.scales().items()
    }
    for model, one in found.items():
        if one.policy.replicas_max and not bounds(one.policy, one.hardware)[1]:
            raise InvalidSettings(
                f'scale."{model}".hour_usd_max pays for no replica: one costs '
                f"{usd(one.hardware.hour_nanousd)} USD an hour"
            )
    return found


def hardware_of(settings: Settings, model: str) -> Hardware:
    """Return what one replica of the model is: as `rift.toml` says, or the shipped profiles; or a guess."""
    profile = settings.catalogue()[model].profiles.get(settings.hardware, Profile())
    name = f"{settings.hardware}-{subjects.slug(model)}"
    found = settings.profiles.get(name) or profiles().get(name) or UNKNOWN
    if settings.engine == "sim":
        found = _simulated(profile)
    if not profile.hour_nanousd:
        return found
    return msgspec.structs.replace(
        found, gpus=profile.gpus, gpu_hour_nanousd=profile.hour_nanousd // profile.gpus
    )


def _policy(scale: Scale) -> Policy:
    return Policy(
        replicas_min=scale.min,
        replicas_max=scale.max,
        idle_ns=scale.idle_s * SECOND_NS,
        ttft_ms=scale.ttft_ms,
        hour_nanousd_max=scale.hour_nanousd_max or 0,
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
