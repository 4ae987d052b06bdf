"""Follow the requests of one body through the lane's events until they end."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from events.encryption import Cipher
from events.lifecycle import Life
from events.schema import Problem
from events.wakeup import Wakeup
from rift.gateway import choices as groups
from rift.gateway.asgi.request import WriteChunk
from rift.gateway.completion import Completion
from rift.gateway.exchange import Exchange
from rift.gateway.streams.client_buffer import ClientBuffer

# waiting   no attempt has started
# running   an attempt has started, or one choice has ended
# ended     all requests have ended; with a client, also once one has failed
# broken    the client's stream was broken off; its requests continue
State = Literal["waiting", "running", "ended", "broken"]


class Subscription:
    """Follows requests to their end, with or without a client.

    `answers` holds one completion for each request, in the order of their choices, `answer` is the first, and
    `finished` are those that have ended, in log order. `has_begun` says whether a token was generated or a
    request has ended: an attempt that has only started may still be refused by its engine. `on_end` is for
    subscriptions without a client: it is called once, at the end, and must not close the subscription.
    """

    def __init__(
        self,
        answers: Sequence[Completion],
        client: ClientBuffer | None = None,
        *,
        on_end: Callable[["Subscription"], None] | None = None,
    ) -> None:
        self.answers = {answer.id: answer for answer in answers}
        self.answer = answers[0]
        self.client = client
        self.state: State = "waiting"
        self.has_begun = False
        self.finished: list[Completion] = []
        # Why the client's stream was broken off.
        self.problem: Problem | None = None
        self._on_end = on_end
        self._ciphers: dict[str, Cipher] = {}
        self._attachments = 0
        self._on_attachment: Callable[[], object] | None = None
        self._changed = Wakeup()

    @property
    def is_over(self) -> bool:
        """Whether no further event matters."""
        return self.state in ("ended", "broken")

    @property
    def has_news(self) -> bool:
        """Whether the client can be sent frames, or the end."""
        return self.is_over or (self.client is not None and self.client.has_frames)

    def note_output(self, exchange: Exchange) -> None:
        """Note in an exchange what its answer has so far."""
        answers = self.answers.values()
        firsts = [answer.first_token_ns for answer in answers if answer.first_token_ns is not None]
        exchange.first_token_ns = min(firsts, default=0)
        exchange.prompt_tokens = groups.sum_over_prompts(answers, lambda answer: answer.life.prompt_tokens)
        exchange.output_tokens = sum(answer.life.next_index for answer in answers)

    def open_requests(self) -> list[Completion]:
        return [answer for answer in self.answers.values() if answer.life.phase != "ended"]

    def failure(self) -> tuple[int, Problem] | None:
        """Return the status and the problem of the request that failed first, if one has."""
        failures = (groups.failure(answer, self.answers.values()) for answer in self.finished)
        return next((failure for failure in failures if failure), None)

    # --- the lane's events -------------------------------------------------------------------------------

    def decrypt_with(self, request: str, cipher: Cipher | None) -> None:
        """Decrypt the events of a request from here on; None if they are not encrypted."""
        if cipher is not None:
            self._ciphers[request] = cipher

    def push(self, request: str, event: Any, life: Life, stored_at_ns: int) -> None:
        """Take an event that counted, and the life after it. Repeats are ignored."""
        answer = self.answers[request]
        if life.counted <= answer.life.counted:
            return
        if self._ciphers and (cipher := self._ciphers.get(request)) is not None:
            event = cipher.opened(event)
        answer.add(event, life, stored_at_ns)
        has_ended = life.phase == "ended"
        if has_ended:
            self.finished.append(answer)
        if self.is_over:
            return
        if self.client is not None:
            self.client.push(event, answer)
        if has_ended and self._is_complete():
            self._close("ended")
            if self._on_end is not None:
                self._on_end(self)
        elif self.state == "waiting" and (has_ended or life.attempt is not None):
            self.state = "running"
        if not self.has_begun and (has_ended or life.next_index):
            self.has_begun = True
            self._changed.set()

    def _is_complete(self) -> bool:
        return not self.open_requests() or (self.client is not None and self.failure() is not None)

    def _close(self, state: Literal["ended", "broken"]) -> None:
        self.state = state
        self._changed.set()
        if self.client is not None:
            self.client.wake()

    def note_attachment(self) -> None:
        """Note that another client has attached to a request, at this or another gateway."""
        self._attachments += 1
        self._changed.set()
        self.at_attachment(self._on_attachment)

    # --- the client ------------------------------------------------------------------------------------

    def break_off(self, problem: Problem) -> None:
        """End the client's stream, not the request. Frames that were not taken are dropped.

        Without a client there is no stream to end, and this does nothing.
        """
        if self.client is not None and not self.is_over:
            self.problem = problem
            self.client.break_off(problem)
            self._close("broken")

    def release_client(self) -> None:
        """Drop the client and its frames. From here on only the end of all requests counts, so a subscription
        that was over for its client may be open again."""
        if self.client is None:
            return
        self.client.discard()
        self.client = None
        if not self.open_requests():
            self.state = "ended"
        elif self.state != "waiting":
            self.state = "running"

    async def wait_for_output(self) -> None:
        """Return once the answer has begun, or its stream was broken off."""
        while not (self.has_begun or self.is_over):
            await self._changed.wait()

    async def wait_for_news(self, write: WriteChunk | None) -> None:
        """Return once the client can be sent frames or the end, or the status of its queue has changed.

        Meanwhile the lane's reader may write frames itself, with `write`.
        """
        if self.client is not None and not self.is_over:
            await self.client.wait(write)

    async def wait_for_end(self, *, or_attachment: bool = False) -> None:
        """Return at the end, or with `or_attachment` also when another client attaches after this call."""
        seen = self._attachments
        while not (self.is_over or (or_attachment and self._attachments > seen)):
            await self._changed.wait()

    def at_attachment(self, call: Callable[[], object] | None) -> None:
        """Call a function once, when another client attaches, at this or another gateway; at once if one has.

        None: call no function any more.
        """
        is_due = call is not None and self._attachments > 0
        self._on_attachment = None if is_due else call
        if call is not None and is_due:
            call()
