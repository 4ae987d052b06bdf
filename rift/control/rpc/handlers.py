"""The answers to questions. An answer covers every record that was stored before its question."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import anyio

from events.log import Log
from replay.billing import invoice
from replay.billing.request_list import listing
from replay.errors import ReplayError
from rift.control.duties import period_close
from rift.control.duties.archiver import Archiver
from rift.control.duties.janitor import Janitor
from rift.control.projection.projector import LogTrimmed
from rift.control.projection.warehouse_host import Projection
from rift.control.rpc import server
from rift.control.rpc.operators import Operators
from rift.control.rpc.server import Handler
from rift.rpc import (
    AskInvoice,
    AskInvoices,
    AskLanes,
    AskProblems,
    AskRequests,
    AskShards,
    AskStatus,
    AskUsage,
    ClosePeriod,
    Digests,
    Question,
    QuestionRefused,
    Rebuild,
    SealSegment,
    Sql,
)


class Handlers:
    """`janitors` holds the janitor of each shard."""

    def __init__(
        self,
        log: Log,
        projection: Projection,
        archiver: Archiver,
        janitors: Mapping[int, Janitor],
        operators: Operators,
    ) -> None:
        self._log = log
        self._projection = projection
        self._archiver = archiver
        self._janitors = janitors
        self._operators = operators

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer questions while the context is open."""
        async with anyio.create_task_group() as tasks, server.serving(self._log, self._by_question()):
            tasks.start_soon(self._operators.run)
            yield
            tasks.cancel_scope.cancel()

    def _by_question(self) -> Mapping[type[Question], Handler]:
        return {
            Sql: self._operators.sql,
            AskStatus: self._operators.status,
            AskInvoice: self._invoice,
            AskInvoices: self._invoices,
            AskUsage: self._usage,
            AskRequests: self._requests,
            Digests: self._operators.digests,
            ClosePeriod: self._close,
            SealSegment: self._seal,
            Rebuild: self._rebuild,
            AskLanes: self._lanes,
            AskShards: self._shards,
            AskProblems: self._problems,
        }

    async def _invoice(self, question: AskInvoice) -> object:
        return await self._projection.read(
            lambda warehouse: invoice.invoice(warehouse.read, question.account, question.period), is_bill=True
        )

    async def _invoices(self, question: AskInvoices) -> object:
        page = question.account, question.limit, question.after
        return await self._projection.read(
            lambda warehouse: invoice.invoice_list(warehouse.read, *page), is_bill=True
        )

    async def _usage(self, question: AskUsage) -> object:
        days = question.first_day, question.last_day
        return await self._projection.read(
            lambda warehouse: invoice.usage(warehouse.read, question.account, *days, question.group_by),
            is_bill=True,
        )

    async def _requests(self, question: AskRequests) -> object:
        page = question.account, question.limit, question.after
        return await self._projection.read(lambda warehouse: listing(warehouse.read, *page), is_bill=True)

    async def _close(self, question: ClosePeriod) -> object:
        return await period_close.close(
            self._log, question.period, self._projection, self._archive_now, self._archiver.signing_key
        )

    async def _seal(self, question: SealSegment) -> object:
        await self._projection.catch_up()
        return await self._archive_now()

    async def _archive_now(self) -> period_close.ArchivedEnds:
        """Archive everything that is projected. Raises QuestionRefused, LogError."""
        try:
            manifests = await self._archiver.archive_now()
        except (ReplayError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise QuestionRefused(f"the archive cannot be written: {why}") from error
        return period_close.ArchivedEnds(
            positions={stream: manifest.last for stream, manifest in manifests.items()},
            roots={stream: manifest.sha256 for stream, manifest in manifests.items()},
        )

    async def _rebuild(self, question: Rebuild) -> object:
        try:
            await self._projection.rebuild()
        except (ReplayError, LogTrimmed) as error:
            raise QuestionRefused(f"nothing was changed: {error}") from error
        return self._projection.applied

    async def _problems(self, question: AskProblems) -> object:
        await self._projection.catch_up()
        projection = self._projection.problem
        return [*([] if projection is None else [projection]), *self._archiver.problems]

    async def _lanes(self, question: AskLanes) -> object:
        lanes: dict[str, int] = {}
        for janitor in self._janitors.values():
            lanes |= janitor.lanes()
        return lanes

    async def _shards(self, question: AskShards) -> object:
        supervised = [janitor for janitor in self._janitors.values() if janitor.is_supervising]
        return [
            {"shard": janitor.shard, "gateways": len(janitor.lanes()), "metrics": janitor.metrics()}
            for janitor in supervised
        ]
