"""Random histories over months, and their archive, which is sealed along the way.

They have groups, both plans, several accounts and price lists, corrections, and months that are closed late
or not at all.
"""

import random
from typing import Any

from msgspec.structs import replace

from events.schema import (
    LimitsSet,
    PeriodClosed,
    Price,
    PricePublished,
    RequestAccepted,
    RequestFinished,
    UsageCorrected,
)
from events.subjects import BOOK
from tests.replay import reckoning
from tests.replay.conftest import Chaos
from tests.replay.sealed import SealedLists

ACCOUNTS = ("acme", "beta", "dev")
MODELS = ("tiny:1", "wide:2")
DAY_NS = 86_400 * 10**9
STEPS_NS = (1, 1_000, 5_000_000, -3_000_000, 300_000_000, 2_700_000_000, DAY_NS, 9 * DAY_NS)


class Months(Chaos):
    def __init__(self, dice: random.Random) -> None:
        super().__init__(dice)
        self.archive = SealedLists()
        self.listed = 0  # sequence of the first price list

    def write(self, steps: int) -> dict[str, list[Any]]:
        self.publish()
        self.limit(*ACCOUNTS)
        for _ in range(steps):
            if events := self.some_events():
                kind = self.dice.choice(("request", "work", "cancel"))
                # Mostly short steps: requests end in the month they began in, but not all.
                step_ns = self.dice.choices(STEPS_NS, (8, 8, 8, 4, 8, 8, 1, 1))[0]
                self.scribe.tell(*events, kind=kind, step_ns=step_ns)
            if self.dice.random() < 0.04:
                self.archive.seal(self.scribe.streams)
            if self.dice.random() < 0.1:
                self.note()
        self.archive.seal(self.scribe.streams)
        return self.scribe.streams

    def note(self) -> None:
        """Append a correction, limits, or the close of a month to the book."""
        streams, account = self.scribe.streams, self.dice.choice(ACCOUNTS)
        match self.dice.choice(("correction", "again", "limits", "close", "close", "close")):
            case "correction":
                model = self.dice.choice((None, "", *MODELS))
                amount = self.dice.choice((-700, 0, 12, 10**12))
                entry = self.scribe.unique()
                correction = UsageCorrected(
                    id=entry, account=account, nanousd=amount, reason="r", model=model
                )
                self.scribe.book(correction)
            case "again":
                self.scribe.book(
                    UsageCorrected(id=f"again-{account}", account=account, nanousd=5, reason="r")
                )
            case "limits":
                self.limit(account)
            case "close":
                self.close(streams)

    def limit(self, *accounts: str) -> None:
        for account in accounts:
            plan = self.dice.choice(("per_token", "per_second"))
            self.scribe.book(LimitsSet(id=self.scribe.unique(), account=account, plan=plan))

    def close(self, streams: dict[str, list[Any]]) -> None:
        """Close the oldest past month at the archived positions; later records go to a later month."""
        closed = reckoning.closes(streams)
        logged = [t for stream, messages in streams.items() for t in reckoning.log(stream, messages)]
        months = sorted({reckoning.month(t.place, t.at_ns, {}) for t in logged} - {*closed})
        if len(months) < 2:
            return
        if self.dice.random() < 0.2:
            self.archive.seal(streams)
        self.scribe.book(
            PeriodClosed(
                id=self.scribe.unique(),
                period=months[0],
                positions=self.archive.positions(),
                roots=self.archive.heads(),
                digest="0" * 64,
                rules=self.dice.choice((1, 2)),
            )
        )

    def publish(self) -> None:
        self.versions += 1
        self.listed = self.listed or len(self.scribe.streams.get(BOOK, ())) + 1
        listed = []
        for model in MODELS:
            prompt, output = self.dice.choice((0, 1, 150)), self.dice.choice((0, 3, 400))
            cached = self.dice.choice((None, 0, 1, 50))
            second = self.dice.choice((None, 0, 7, 10**9))
            listed.append(
                Price(
                    model=model,
                    prompt_nanousd=prompt,
                    output_nanousd=output,
                    cached_prompt_nanousd=cached,
                    second_nanousd=second,
                )
            )
        # A model that is listed twice, a version that is published twice, and an id that is reused.
        listed.append(Price(model=MODELS[0], prompt_nanousd=11, output_nanousd=11))
        entry = self.scribe.unique()
        self.scribe.book(PricePublished(id=entry, version=self.versions, prices=tuple(listed)))
        late = Price(model=MODELS[0], prompt_nanousd=9, output_nanousd=9)
        self.scribe.book(PricePublished(id=self.scribe.unique(), version=self.versions, prices=(late,)))
        self.scribe.book(PricePublished(id=entry, version=self.versions + 1, prices=(late,)))

    def event(self) -> Any:
        return self.acceptance() if self.dice.random() < 0.06 else super().event()

    def finish(self, request: str, attempt: str) -> RequestFinished:
        finished = super().finish(request, attempt)
        return replace(finished, reason="stop", error=None) if self.dice.random() < 0.6 else finished

    def acceptance(self) -> RequestAccepted:
        account = self.dice.choice(ACCOUNTS)
        siblings = [other for other in self.acceptances.values() if other.account == account]
        group = self.dice.choice((None, *3 * (f"grp-{account}-{len(siblings) // 4}",)))
        request = self.scribe.request_id(account=account)
        self.attempts[request] = []
        # The gateway may not have read the whole book yet.
        streams = self.scribe.streams
        book = max(len(streams[BOOK]) - self.dice.randint(0, 12), self.listed)
        version, plan = reckoning.terms(streams, account, book)
        accepted = self.acceptances[request] = self.scribe.accepted(
            request,
            account=account,
            key=f"key-of-{account}",
            model=self.dice.choice((*MODELS, MODELS[0])),
            price_version=version,
            plan=plan,
            book=book,
            group=group,
        )
        return accepted

    def months(self) -> set[str]:
        logged = [
            t for stream, messages in self.scribe.streams.items() for t in reckoning.log(stream, messages)
        ]
        return {reckoning.month(t.place, t.at_ns, {}) for t in logged}
