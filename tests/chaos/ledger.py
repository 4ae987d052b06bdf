"""A second, independent fold of the raw log.

It reads plain JSON and repeats the rules of `events/lifecycle.py` in its own words, to find mistakes in
Rift's fold. `ignored` counts the events that did not count: they show that there was something to fence.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import anyio

from events.jetstream import JetStream
from events.log import OutcomeUnknown
from tests.chaos.checks import LoggedRequest

SHARD = re.compile(r"RIFT_(\d+)")

# A cluster whose leader was killed does not answer until it has elected another.
ELECTION_S = 60.0


@dataclass
class Story:
    accepted: int = 0
    attempts: int = 0
    attempt: str | None = None
    worker: str = ""
    live: bool = False
    seen: set[str] = field(default_factory=set)
    next_index: int = 0
    prompt_tokens: int = 0
    tokens: list[tuple[int, int, str]] = field(default_factory=list)
    wanted: str | None = None
    reason: str | None = None
    ender: str | None = None

    def logged(self) -> LoggedRequest:
        facts = (self.accepted, self.tokens, self.prompt_tokens, self.attempts)
        return LoggedRequest(*facts, self.reason, self.ender)

    def end(self, reason: str, ender: str) -> None:
        self.reason, self.ender, self.live = reason, ender, False


@dataclass
class Ignored:
    """Stored events that did not count. `last_ns` is when the last one was stored."""

    acceptances: int = 0
    starts: int = 0
    tokens: int = 0
    ends: int = 0
    last_ns: int = 0


async def shard_streams(log: JetStream) -> list[tuple[str, str]]:
    """Return the stream of each shard and its subjects, as the broker has them. Raises LogError."""
    found = [match for name in await log.streams() if (match := SHARD.fullmatch(name))]
    return sorted((match[0], f"rift.{match[1]}.>") for match in found)


class Ledger:
    def __init__(self) -> None:
        self.positions: dict[str, int] = {}
        self.stories: dict[str, Story] = {}
        self.ignored = Ignored()
        self.requests_by_shard: dict[str, int] = {}
        self._request_of: dict[str, str] = {}

    async def read_on(self, log: JetStream) -> None:
        """Fold all records of every shard after `positions`. Raises LogError."""
        with anyio.fail_after(ELECTION_S):
            while True:
                try:
                    await self._read_on(log)
                    return
                except OutcomeUnknown:
                    await anyio.sleep(1)

    async def _read_on(self, log: JetStream) -> None:
        for stream, everything in await shard_streams(log):
            first = self.positions.get(stream, 0) + 1
            target = await log.last_sequence(stream)
            async for batch in log.scan(stream, [everything], first=first, target=target):
                for stored in batch:
                    self.positions[stream] = stored.sequence
                    events = json.loads(stored.data)["events"]
                    accepted = sum(event["type"] == "RequestAccepted" for event in events)
                    if accepted:
                        self.requests_by_shard[stream] = self.requests_by_shard.get(stream, 0) + accepted
                    for event in events:
                        self.fold(event, stored.stored_at_ns)

    def forget(self, request: str) -> None:
        """Drop an ended request; its later events are ignored anyway."""
        for attempt in self.stories.pop(request).seen:
            self._request_of.pop(attempt, None)

    def fold(self, event: dict[str, Any], at_ns: int) -> None:
        rule = getattr(self, f"_{event['type']}", None)
        if rule is None:
            return
        request = event.get("request") or self._request_of.get(event.get("attempt", ""), "")
        if event["type"] == "RequestAccepted":
            self.stories.setdefault(request, Story())
        story = self.stories.get(request)
        if story is None or not rule(story, event):
            self._ignore(event, at_ns)

    def _ignore(self, event: dict[str, Any], at_ns: int) -> None:
        match event["type"]:
            case "RequestAccepted":
                self.ignored.acceptances += 1
            case "AttemptStarted":
                self.ignored.starts += 1
            case "TokensGenerated":
                self.ignored.tokens += len(event["token_ids"])
            case "RequestFinished":
                self.ignored.ends += 1
        self.ignored.last_ns = max(self.ignored.last_ns, at_ns)

    # --- each returns whether the event counts -------------------------------------------------------

    def _RequestAccepted(self, story: Story, event: dict[str, Any]) -> bool:
        story.accepted += 1
        return story.accepted == 1

    def _AttemptStarted(self, story: Story, event: dict[str, Any]) -> bool:
        self._request_of[event["attempt"]] = event["request"]
        new = event["attempt"] not in story.seen
        story.seen.add(event["attempt"])
        follows = event["after"] == story.attempt and event["resume_index"] == story.next_index
        if story.reason is not None or not new or not follows:
            return False
        if story.attempts == 0:
            story.prompt_tokens = event["prompt_tokens"]
        story.attempt, story.live, story.worker = event["attempt"], True, event["worker"]
        story.attempts += 1
        return True

    def _TokensGenerated(self, story: Story, event: dict[str, Any]) -> bool:
        if not self._is_current(story, event) or event["index"] != story.next_index:
            return False
        story.tokens.append((event["index"], len(event["token_ids"]), event["text"]))
        story.next_index += len(event["token_ids"])
        return True

    def _AttemptReleased(self, story: Story, event: dict[str, Any]) -> bool:
        if not self._is_current(story, event):
            return False
        story.live = False
        if story.wanted is not None:
            story.end("revoked" if story.wanted == "revoked" else "cancelled", "fold")
        return True

    def _CancelRequested(self, story: Story, event: dict[str, Any]) -> bool:
        if event.get("attempt") or story.reason is not None or story.wanted is not None:
            return False
        story.wanted = event["why"]
        if not story.live:
            story.end("revoked" if story.wanted == "revoked" else "cancelled", "fold")
        return True

    def _RequestFinished(self, story: Story, event: dict[str, Any]) -> bool:
        if story.reason is not None:
            return False
        fits = self._is_current(story, event) and event["output_tokens"] == story.next_index
        if event["attempt"] is not None and not fits:
            return False
        story.end(event["reason"], "worker" if event["attempt"] else "control")
        return True

    @staticmethod
    def _is_current(story: Story, event: dict[str, Any]) -> bool:
        return story.reason is None and story.live and event["attempt"] == story.attempt
