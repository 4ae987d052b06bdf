-- No rows, unless an interval is negative.
select 'interval runs backwards' as wrong, request_id as which
from latency
where queue_ns < 0 or ttft_ns < queue_ns or e2e_ns < ttft_ns or tpot_ns < 0;
