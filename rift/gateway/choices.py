"""The requests of a body with several prompts or `n` > 1, each accepted and answered as a request of its own.

The choices of one prompt are a group. The ids of all follow from the first, so any gateway can name them.
Frames and objects of several choices belong to `dialects/chat_response.py`, their cost to
`admission/credit_hold.py`.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from msgspec.structs import replace

from events import ids
from events.schema import Problem, RequestAccepted
from rift.gateway.completion import Completion

# All requests of one body. They are reserved, accepted, followed and answered together.
Choices = tuple[RequestAccepted, ...]

SEED_MAX = 2**63 - 1


def of(first: RequestAccepted, more: Sequence[str] = (), *, choices: int, secret: bytes) -> Choices:
    """Return the acceptances for the prompt of `first` and `more` prompts, each with a number of choices.

    They are in the order of their index in the answer.
    """
    requests = request_ids(first, choices * (1 + len(more)), secret=secret)
    return tuple(
        replace(
            first,
            request=request,
            input=more[at // choices - 1] if at >= choices else first.input,
            group=requests[at - at % choices] if choices > 1 else None,
            choice=at,
            parameters=replace(first.parameters, seed=_seed(first.parameters.seed, at % choices)),
        )
        for at, request in enumerate(requests)
    )


def request_ids(first: RequestAccepted, count: int, *, secret: bytes) -> list[str]:
    """Return the ids of all requests of a body; the first is known."""
    return [first.request, *(_sibling(first, at, secret) for at in range(1, count))]


def _sibling(first: RequestAccepted, choice: int, secret: bytes) -> str:
    parsed = ids.parsed(first.request)
    digest = hmac.new(secret, f"choice\0{first.request}\0{choice}".encode(), hashlib.sha256).digest()
    return ids.new_request_id(
        secret=secret,
        account=first.account,
        at=parsed.at,
        floor=parsed.floor,
        entropy=digest[: ids.RANDOM_BYTES],
    )


def _seed(seed: int | None, choice: int) -> int | None:
    """Return a different seed for each choice of a prompt, or all would be the same. The first has the
    client's."""
    if seed is None:
        return None
    if seed < -1 <= seed + choice:
        # -1 is no seed.
        choice += 1
    return seed + choice if seed <= SEED_MAX - choice else seed - choice


def prompt_id(accepted: RequestAccepted) -> str:
    """Return what the choices of one prompt have in common."""
    return accepted.group or accepted.request


def by_prompt(choices: Choices) -> list[Choices]:
    """Return the choices of each prompt."""
    return [tuple(group) for _, group in groupby(choices, prompt_id)]


def sum_over_prompts(answers: Iterable[Completion], count: Callable[[Completion], int]) -> int:
    """Return the sum over the prompts of a count that the choices of one prompt share."""
    counts: dict[str, int] = {}
    for answer in answers:
        prompt = prompt_id(answer.accepted)
        counts[prompt] = max(counts.get(prompt, 0), count(answer))
    return sum(counts.values())


def failure(answer: Completion, answers: Iterable[Completion]) -> tuple[int, Problem] | None:
    """Return the status and the problem of an answer that has failed, else None.

    If `answers`, to which it belongs, have several prompts, the problem names its prompt.
    """
    if (found := answer.failure()) is None:
        return None
    prompts = list(dict.fromkeys(prompt_id(each.accepted) for each in answers))
    if len(prompts) == 1:
        return found
    status, problem = found
    return status, at_prompt(problem, prompts.index(prompt_id(answer.accepted)))


def at_prompt(problem: Problem, at: int) -> Problem:
    """Return a problem that names the prompt at this index of several."""
    place = f"prompt[{at}]"
    param = place if problem.param == "prompt" else problem.param
    return replace(problem, message=f"{place}: {problem.message}", param=param)
