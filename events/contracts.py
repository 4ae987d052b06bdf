"""Times and sizes that two processes must agree on, each with its argument.

The relations between them are asserted at import: a value that breaks one cannot be deployed. A number that
only one process depends on stays where it is used.
"""

SECOND_NS = 1_000_000_000

# --- sizes ------------------------------------------------------------------------------------------------

# The broker's `max_payload`: no message of the log or of a request-reply is larger.
MESSAGE_BYTES_MAX = 8 * 1024 * 1024

# A prompt is stored as one record, so no body is larger than a message. The record of a body that just fits
# may still be too large; its append answers that.
BODY_BYTES_MAX = MESSAGE_BYTES_MAX

# A worker splits the records of an answer that grew while the log was slow.
TOKEN_RECORD_BYTES_MAX = 2 * 1024 * 1024

# Control's replies, with room for their envelope.
REPLY_BYTES_MAX = 8_000_000

assert 4 * TOKEN_RECORD_BYTES_MAX <= MESSAGE_BYTES_MAX, "one event past the limit must still fit"
assert REPLY_BYTES_MAX < MESSAGE_BYTES_MAX, "a reply must fit into a message"

# The text of a question in SQL, so that nobody sends a program.
SQL_BYTES_MAX = 256 * 1024

# --- the room of the log ----------------------------------------------------------------------------------

# Records stay this long even if the log is short of room, because a reader that lost its connection finds
# the ends of its requests only there. Within LOG_TRIM_S more, control has archived and trimmed them.
LOG_KEPT_S = 900.0
LOG_TRIM_S = 120.0

# --- a gateway's lane -------------------------------------------------------------------------------------

# A gateway reports its lane this often. After three missing reports, every reader takes the gateway for lost:
# the janitor declares it, and other gateways no longer count it when they divide the limits.
LANE_REPORT_S = 3.0
LANE_LOST_S = 10.0

# From this silence on, `rift status` marks a lane: all three reports are due.
LANE_SILENT_S = 3 * LANE_REPORT_S

assert LANE_REPORT_S * 3 < LANE_LOST_S, "three reports may be late or lost before a lane counts as lost"

# A gateway reports the requests that it refused this often, with a count for at most this many pairs of an
# account and a reason: at most 30 KB. A record a minute of each gateway is nothing beside the lane's reports.
REFUSALS_REPORT_S = 60.0
REFUSAL_COUNTS_MAX = 256

# --- credit that a lane holds -----------------------------------------------------------------------------

# A gateway reserves credit only this long after it began its last stored report.
RESERVE_AFTER_REPORT_S = 10.0

# It then repeats the append of an acceptance for at most this long,
ACCEPT_S = 10.0

# and a record that was sent may still be stored after its sender stopped waiting, for as long as a connection
# takes to come back. A gateway repeats the cancellation of such a request after each of these waits.
LATE_LANDING_S = (0.0, 5.0, 30.0)

# A reservation whose acceptance has an unknown outcome is kept until no read can find the acceptance later.
RESERVATION_KEPT_S = 45.0

# Only after this silence does control settle what a lane still holds.
CREDIT_LANE_SILENT_S = 60.0

assert ACCEPT_S + LATE_LANDING_S[-1] < RESERVATION_KEPT_S, "a late acceptance must find its reservation"
assert RESERVE_AFTER_REPORT_S + ACCEPT_S + sum(LATE_LANDING_S) < CREDIT_LANE_SILENT_S, (
    "everything that a lane reserved is stored, or never will be, before control settles the lane's credit"
)

# --- a client that is gone --------------------------------------------------------------------------------

# A native stream's client may come back this long after it went, to any gateway. Meanwhile a client that did
# come back is reported three times as often.
CLIENT_GRACE_S = 15.0
CLIENT_ATTACHED_S = CLIENT_GRACE_S / 3

# A gateway ends its clients' streams once the log has stored nothing for this long. No stream ends for a
# restart of the broker (3 s), the election of a cluster's leader (5 s), or a full disk whose reserve is
# released before the broker is restarted (10 s).
LOG_OUTAGE_S = 15.0

assert LOG_OUTAGE_S > ACCEPT_S, "a stream waits for the log at least as long as a new request"

# The key of sealed content is kept this long after the end: a client that polls is slower than one that
# resumes.
CONTENT_KEY_GRACE_S = 60.0

assert CONTENT_KEY_GRACE_S > CLIENT_GRACE_S, "a client that resumes must still be able to read its answer"

# --- deliveries and attempts ------------------------------------------------------------------------------

# The broker delivers a job again after this silence: long enough for a slow fsync, short enough that the job
# of a frozen worker is soon taken over. A worker answers `in progress` three times within it.
ACK_WAIT_S = 5.0
IN_PROGRESS_S = 1.5

# An attempt that wrote this recently is alive, so a second delivery of its job is a mistake. A dead worker
# was silent for at least ACK_WAIT_S less one IN_PROGRESS_S before its job is delivered again.
ATTEMPT_ALIVE_S = 3.0

assert 3 * IN_PROGRESS_S < ACK_WAIT_S, "two answers may be lost before a job is delivered again"
assert ATTEMPT_ALIVE_S < ACK_WAIT_S - IN_PROGRESS_S, "a dead worker's attempt must not look alive"

# A worker declares its engine hung after this silence. Prompt tokens that are being read are silent work: the
# slowest machine measured reads 200 a second, and this allows for a quarter of that.
HANG_S = 30.0
HANG_PER_PROMPT_TOKEN_S = 0.02

# Control releases an attempt after this silence, for workers that notice nothing.
STALLED_S = 60.0
STALLED_PER_PROMPT_TOKEN_S = HANG_PER_PROMPT_TOKEN_S

assert STALLED_S > HANG_S + ACK_WAIT_S, "a worker that notices a hang must be the first to act"

# --- the end of a request ---------------------------------------------------------------------------------

# Queue, cold start and answer together. The slowest known start takes 150 s, which leaves 7 minutes.
DEADLINE_S = 600.0

# A worker ends a request at its deadline, and control ends it this much later, without a charge. So no
# attempt can cost more than it does by OVERDUE_S after the deadline.
EXPIRED_S = 5.0
OVERDUE_S = 10.0

assert OVERDUE_S > EXPIRED_S, "the highest cost must cover every second that can be charged"

# A client can repeat a POST under its idempotency key this long.
IDEMPOTENCY_S = 24 * 3600.0

# An idempotency entry names a content key for IDEMPOTENCY_S, and its reader accepts within a minute. If no
# acceptance names the key by then, none ever will.
UNUSED_CONTENT_KEY_S = IDEMPOTENCY_S + 15 * 60.0

assert IDEMPOTENCY_S + ACCEPT_S + sum(LATE_LANDING_S) < UNUSED_CONTENT_KEY_S, (
    "no content key may be erased while an acceptance can still name it"
)

assert LOG_KEPT_S > DEADLINE_S, "the end of a request must stay in the log for its readers"

# --- operators' SQL ---------------------------------------------------------------------------------------

# A question waits at most this long for the questions before it,
SQL_QUEUE_S = 15.0

# then for its process to start, and to apply every record that was stored before the question,
SQL_START_S = 10.0
SQL_CATCH_UP_S = 20.0

# then for its answer. DuckDB is interrupted after this time, and the process killed if it still works.
SQL_ANSWER_S = 10.0
SQL_KILL_S = 10.5

# A client waits longer than all of it, so that it learns which limit it met.
SQL_TIMEOUT_S = 60.0

assert SQL_ANSWER_S < SQL_KILL_S, "an interrupted question must have time to say so"
assert SQL_QUEUE_S + SQL_START_S + SQL_CATCH_UP_S + SQL_KILL_S < SQL_TIMEOUT_S, (
    "a client must not stop waiting before it can be told what happened"
)

# --- replicas ---------------------------------------------------------------------------------------------

# A replica reports this often, and is declared lost after three missing reports and the time of an append.
REPLICA_REPORT_S = 10.0
REPLICA_LOST_S = 35.0

assert REPLICA_LOST_S > 3 * REPLICA_REPORT_S, "three reports may be late or lost before a replica is lost"
