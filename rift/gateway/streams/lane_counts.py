"""What became of the requests of a gateway's own lane, in plain numbers for metrics.

All times are those that the log stored, so they are those of relation `latency`: a request counts whether or
not it is streamed, and whether or not its client stays.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from events.contracts import SECOND_NS
from events.lifecycle import Life
from events.money import NANOUSD_PER_USD
from events.pricing import charge_nanousd, is_chargeable
from events.schema import AttemptStarted, RequestAccepted, TokensGenerated
from rift.gateway.choices import prompt_id
from rift.gateway.completion import Completion
from rift.metrics.families import Buckets, Collector, Counts, Figure, Histogram

# The target for first tokens is 2 s by default, and 10 s is late for any; further targets are added.
TTFT_S = (0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 600)
# A gap is due within 50 ms: 20 tokens per second.
GAP_S = (0.002, 0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.05, 0.064, 0.1, 0.15, 0.25, 0.5, 1, 2, 4, 8)
QUEUE_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
WHOLE_S = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600)

_GAP_NS = tuple(round(bound * SECOND_NS) for bound in GAP_S)


class _Model:
    """The series of one model, and its output tokens."""

    __slots__ = ("duration", "gaps", "output_tokens", "queue", "ttft")

    def __init__(self, series: Sequence[Buckets]) -> None:
        self.queue, self.ttft, self.gaps, self.duration = series
        self.output_tokens = 0


class _Running:
    """A request whose first attempt has started.

    `last_ns` is when its last token was stored, 0 before the first. `gap_counts` are those of its model.
    What is settled was added to the model.
    """

    __slots__ = (
        "accepted_ns",
        "cached_tokens",
        "gap_counts",
        "last_ns",
        "model",
        "output_tokens",
        "settled_ns",
        "settled_tokens",
    )

    def __init__(self, accepted_ns: int, model: _Model) -> None:
        self.accepted_ns = accepted_ns
        self.model = model
        self.gap_counts = model.gaps.counts
        self.last_ns = 0
        self.settled_ns = 0
        self.output_tokens = 0
        self.settled_tokens = 0
        self.cached_tokens = 0

    def first(self, event: TokensGenerated, stored_at_ns: int) -> None:
        self.settled_ns = stored_at_ns
        self.cached_tokens = event.cached_tokens
        self.model.ttft.observe(stored_at_ns - self.accepted_ns)

    def settle(self) -> None:
        """Add to the model what it does not have yet."""
        # All gaps together are the time from the first token to the last.
        self.model.gaps.sum_ns += self.last_ns - self.settled_ns
        self.settled_ns = self.last_ns
        self.model.output_tokens += self.output_tokens - self.settled_tokens
        self.settled_tokens = self.output_tokens


class LaneCounts:
    """With `by_account`, also counts the tokens of each account. `ttft_ms` are targets for first tokens."""

    def __init__(self, *, ttft_ms: Collection[int] = (), by_account: bool = False) -> None:
        self._by_account = by_account
        self._running: dict[str, _Running] = {}
        self._models: dict[str, _Model] = {}
        # Prompts of several choices that one of them has paid for.
        self._paid: set[str] = set()
        label = ("model",)
        ttft_s = sorted({*TTFT_S, *(ms / 1000 for ms in ttft_ms)})
        # In the order of `_Model`.
        self._times = [
            Histogram(f"rift_gateway_{name}_seconds", help, bounds_s, label)
            for name, help, bounds_s in (
                ("queue_time", "From acceptance to the start of the first attempt.", QUEUE_S),
                ("time_to_first_token", "From acceptance to the first token, streamed or not.", ttft_s),
                ("inter_token_latency", "Between two token events of a request.", GAP_S),
                ("request_duration", "From acceptance to the end.", WHOLE_S),
            )
        ]
        self._prompts = Counts(
            "rift_gateway_prompt_tokens_total", "Tokens of prompts that have started.", label
        )
        self._outputs = Figure(
            "rift_gateway_output_tokens_total",
            "Output tokens that count, as they are stored.",
            lambda: {(name,): model.output_tokens for name, model in self._models.items()},
            label,
            kind="counter",
        )
        self._ends = Counts(
            "rift_gateway_requests_ended_total", "Accepted requests by how they ended.", ("model", "reason")
        )
        self._revenue = Counts(
            "rift_gateway_revenue_usd_total",
            "Charges of ended requests; none for those of plan per_second.",
            label,
        )
        self._accounts = Counts(
            "rift_gateway_account_tokens_total",
            "Tokens of prompts that have started, and of answers that have ended.",
            ("account", "kind"),
        )

    def collect(self) -> Iterable[Any]:
        for running in self._running.values():
            running.settle()
        families: list[Collector] = [*self._times, self._prompts, self._outputs, self._ends, self._revenue]
        if self._by_account:
            families.append(self._accounts)
        return [metric for family in families for metric in family.collect()]

    def note(
        self, request: str, event: Any, life: Life, stored_at_ns: int, answers: Mapping[str, Completion]
    ) -> None:
        """Take an event of the lane that counted, and the life after it. `answers` are those of its body."""
        if type(event) is TokensGenerated:
            # Called for each token: everything else waits for the end, or for a scrape.
            if (running := self._running.get(request)) is not None:
                if last_ns := running.last_ns:
                    running.gap_counts[bisect_left(_GAP_NS, stored_at_ns - last_ns)] += 1
                else:
                    running.first(event, stored_at_ns)
                running.last_ns = stored_at_ns
                running.output_tokens = life.next_index
            return
        if type(event) is AttemptStarted and life.attempts == 1:
            self._start(event, stored_at_ns, answers[request].accepted)
        if life.phase == "ended":
            self._end(life, stored_at_ns, answers, answers[request])

    def forget(self, request: str) -> None:
        """Count nothing more of a request that is no longer followed."""
        if (running := self._running.pop(request, None)) is not None:
            running.settle()

    def _start(self, event: AttemptStarted, stored_at_ns: int, accepted: RequestAccepted) -> None:
        model = self._model(accepted.model)
        self._running[accepted.request] = _Running(event.accepted_at_ns, model)
        model.queue.observe(stored_at_ns - event.accepted_at_ns)
        # The choices of one prompt are charged for it once.
        if prompt_id(accepted) == accepted.request:
            self._prompts.add(accepted.model, n=event.prompt_tokens)
            self._accounts.add(accepted.account, "prompt", n=event.prompt_tokens)

    def _end(
        self, life: Life, stored_at_ns: int, answers: Mapping[str, Completion], answer: Completion
    ) -> None:
        accepted = answer.accepted
        self._ends.add(accepted.model, str(life.reason))
        self._accounts.add(accepted.account, "output", n=life.next_index)
        running = self._running.pop(answer.id, None)
        if running is None:
            # Its acceptance is known by an estimate.
            took_ns = int((answer.timing()["total_ms"] or 0) * 1_000_000)
        else:
            took_ns = stored_at_ns - running.accepted_ns
            running.settle()
        self._model(accepted.model).duration.observe(took_ns)
        prompt = prompt_id(accepted)
        if running is not None and accepted.plan != "per_second":
            with_prompt = prompt not in self._paid
            cached = running.cached_tokens
            nanousd = charge_nanousd(life, answer.price, cached_tokens=cached, with_prompt=with_prompt)
            self._revenue.add(accepted.model, n=nanousd / NANOUSD_PER_USD)
        if accepted.group is not None:
            if is_chargeable(life):
                self._paid.add(prompt)
            if all(each.life.phase == "ended" for each in answers.values()):
                self._paid.difference_update(prompt_id(each.accepted) for each in answers.values())

    def _model(self, name: str) -> _Model:
        if (model := self._models.get(name)) is None:
            model = self._models[name] = _Model([each.series(name) for each in self._times])
        return model
