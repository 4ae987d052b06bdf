"""What the control process is asked, and does. An answer holds what was stored before its question."""

from collections.abc import Mapping
from typing import Any

from events.log import Log
from replay.archive.manifest import ArchiveError
from replay.billing import invoice
from replay.billing.request_list import listing
from replay.warehouse.result import QueryResult
from replay.warehouse.warehouse import ProjectionStopped, WarehouseError
from rift.control.duties import period_close
from rift.control.duties.archiver import Archiver
from rift.control.duties.period_close import SealedMonth
from rift.control.projection.projector import LogTrimmed
from rift.control.projection.warehouse_host import Projection
from rift.control.rpc.server import Answering
from rift.rpc import (
    AskInvoice,
    AskRequests,
    AskUsage,
    ClosePeriod,
    Digests,
    Question,
    QuestionRefused,
    Rebuild,
    SealSegment,
    Sql,
)

# What of single invoice lines an answer holds, to name those that differ: a quarter of a kilobyte each. Where
# there are more, only their digest is compared.
LINES_MAX = 10_000


class Handlers:
    def __init__(self, log: Log, projection: Projection, archiver: Archiver) -> None:
        self._log = log
        self._projection = projection
        self._archiver = archiver

    def answers(self) -> Mapping[type[Question], Answering]:
        return {
            Sql: self._sql,
            AskInvoice: self._invoice,
            AskUsage: self._usage,
            AskRequests: self._requests,
            Digests: self._digests,
            ClosePeriod: self._close,
            SealSegment: self._seal,
            Rebuild: self._rebuild,
        }

    async def _sql(self, question: Sql) -> object:
        return await self._projection.read(lambda warehouse: warehouse.query(question.sql))

    async def _invoice(self, question: AskInvoice) -> object:
        return await self._projection.read(
            lambda warehouse: invoice.invoice(warehouse.read, question.account, question.period)
        )

    async def _usage(self, question: AskUsage) -> object:
        days = question.first_day, question.last_day
        return await self._projection.read(
            lambda warehouse: invoice.usage(warehouse.read, question.account, *days, question.group_by)
        )

    async def _requests(self, question: AskRequests) -> object:
        page = question.account, question.limit, question.after
        return await self._projection.read(lambda warehouse: listing(warehouse.read, *page))

    async def _digests(self, question: Digests) -> dict[str, Any]:
        digests, answers = await self._projection.read(
            lambda warehouse: warehouse.digests(
                ("select stream, sequence from lag", []), ("from invoice_lines", [])
            )
        )
        positions, lines = answers
        if len(lines.rows) > LINES_MAX:
            lines = QueryResult(lines.columns, [])
        return {"positions": dict(positions.rows), "digests": digests, "invoice_lines": lines}

    async def _close(self, question: ClosePeriod) -> object:
        return await period_close.close(
            self._log,
            question.period,
            streams=self._projection.streams,
            warehouse=lambda: self._projection.warehouse,
            catch_up=self._projection.catch_up,
            seal=self._seal_now,
        )

    async def _seal(self, question: SealSegment) -> object:
        await self._projection.catch_up()
        return await self._seal_now()

    async def _seal_now(self) -> SealedMonth:
        """Archive all that is projected. Raises QuestionRefused."""
        try:
            manifests = await self._archiver.seal_now()
        except (ArchiveError, OSError) as error:
            raise QuestionRefused(f"the archive takes nothing: {error}") from error
        return SealedMonth(
            positions={stream: manifest.last for stream, manifest in manifests.items()},
            roots={stream: manifest.sha256 for stream, manifest in manifests.items()},
        )

    async def _rebuild(self, question: Rebuild) -> object:
        try:
            await self._projection.rebuild()
        except (ArchiveError, LogTrimmed, ProjectionStopped, WarehouseError) as error:
            raise QuestionRefused(f"nothing was changed: {error}") from error
        return self._projection.applied
