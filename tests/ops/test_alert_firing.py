"""Each alert fires at its fault, alone, and none while all is well: with promtool, where it is installed."""

import json
import re
import shutil
import subprocess
from pathlib import Path

from tests.ops.test_alerts import ALERTS, PROMETHEUS

MINUTES = 70

# Series of an installation that is well, in promtool's notation: a value and how it grows each minute.
WELL = {
    'up{job="rift-gateway"}': "1",
    "rift_gateway_ready": "1",
    'rift_gateway_requests_total{code="200",route="POST /v1/inference"}': "0+60",
    'rift_gateway_requests_total{code="503",route="GET /readyz"}': "0+60",
    'rift_gateway_requests_total{code="503",route="POST /v1/inference"}': "0",
    'rift_gateway_refusals_total{reason="missing_api_key"}': "0+60",
    'rift_gateway_requests_ended_total{model="m",reason="stop"}': "0+60",
    'rift_gateway_requests_ended_total{model="m",reason="expired"}': "0",
    'rift_gateway_time_to_first_token_seconds_bucket{model="m",le="2.0"}': "0+60",
    'rift_gateway_time_to_first_token_seconds_count{model="m"}': "0+60",
    'rift_gateway_queue_time_seconds_count{model="m"}': "0+60",
    'rift_gateway_requests_waiting{model="m"}': "0",
    'rift_gateway_revenue_usd_total{model="m"}': "0+0.01",
    'rift_gateway_used{bound="readers"}': "1",
    'rift_gateway_limit{bound="readers"}': "10",
    'rift_gateway_used{bound="log_bytes"}': "10",
    'rift_gateway_limit{bound="log_bytes"}': "10",
    "rift_gateway_log_silent_seconds": "0",
    "rift_gateway_log_disconnections_total": "0",
    "rift_control_leader": "1",
    'rift_control_failed_starts{model="m"}': "0",
    'rift_control_replicas_wanted{model="m"}': "2",
    'rift_control_replicas{model="m",state="ready"}': "2",
    'rift_control_replicas_lost_total{model="m",cause="host"}': "5",
    "rift_control_projection_stopped": "0",
    "rift_control_projection_blocked": "0",
    'rift_control_projection_lag_seconds{stream="RIFT_0"}': "2",
    "rift_control_sample_age_seconds": "5",
    "rift_control_archive_failures": "0",
    'rift_control_sql_questions_total{outcome="refused"}': "0",
    'rift_control_brokers{server="nats-0",state="current"}': "1",
    'rift_control_log_room_bytes{stream="RIFT_0"}': "4000000000",
    "rift_control_log_disk_free_bytes": "40000000000",
    "rift_control_log_disk_reserve_whole": "1",
    'rift_worker_requests{model="m",state="running"}': "3",
    'rift_worker_engine_steps_total{model="m"}': "0+60",
}

# The alerts that fire, and what differs. A key is the start of one of the series above, or a new series. An
# empty value removes the series.
FAULTS = [
    ("", {}),
    ("RiftFirstTokensLate", {"rift_gateway_time_to_first_token_seconds_bucket": "0+50"}),
    ("RiftAnswersFail", {'rift_gateway_requests_total{code="503",route="POST': "0+10"}),
    ("RiftRequestsFail", {'rift_gateway_requests_ended_total{model="m",reason="expired"': "0+10"}),
    ("RiftQueueOld", {"rift_gateway_requests_waiting": "100"}),
    ("RiftQueueOld", {"rift_gateway_requests_waiting": "2", "rift_gateway_queue_time": "7"}),
    ("RiftQueueOld", {"rift_gateway_requests_waiting": "2", "rift_gateway_queue_time": ""}),
    ("RiftRefusalsRise", {'rift_gateway_refusals_total{reason="new"}': "_x40 0+60x30"}),
    ("RiftRefusalsRise", {"rift_gateway_refusals_total": "0+20x45 900+200x25"}),
    ("RiftBoundNearlyReached", {'rift_gateway_used{bound="readers"': "9"}),
    ("RiftRevenueStopped", {"rift_gateway_revenue_usd_total": "5"}),
    ("RiftRevenueStopped", {"rift_gateway_revenue_usd_total": ""}),
    ("RiftNoGatewayReady", {"rift_gateway_ready": ""}),
    ("RiftNoGatewayReady RiftGatewayNotReady", {"rift_gateway_ready": "0"}),
    ("RiftGatewayNotReady", {'rift_gateway_ready{instance="second"}': "0"}),
    ("RiftLogNotWritable", {"rift_gateway_log_silent_seconds": "8"}),
    ("RiftLogDisconnected", {"rift_gateway_log_disconnections_total": "0x60 1x10"}),
    ("RiftBrokerLost", {'rift_control_brokers{server="nats-1",state="silent"}': "1"}),
    ("RiftLogRoomLow", {"rift_control_log_room_bytes": "100000000"}),
    ("RiftLogDiskReserveUsed", {"rift_control_log_disk_reserve_whole": "0"}),
    ("RiftLogDiskLow", {"rift_control_log_disk_free_bytes": "1000000000"}),
    ("RiftModelDoesNotStart", {"rift_control_failed_starts": "2"}),
    ("", {"rift_control_failed_starts": "2", "rift_control_replicas_wanted": "0"}),
    ("RiftReplicasMissing", {"rift_control_replicas_wanted": "3"}),
    ("RiftReplicaLost", {"rift_control_replicas_lost_total": "5x60 6x10"}),
    ("RiftReplicaLost", {"rift_control_replicas_lost_total": "_x60 1x10"}),
    (
        "RiftModelDoesNotStart",
        {"rift_control_replicas_lost_total": "5x60 6x10", "rift_control_failed_starts": "2"},
    ),
    ("RiftEngineStalled", {"rift_worker_engine_steps_total": "7"}),
    ("RiftNoLeader", {"rift_control_leader": "0"}),
    ("RiftNoLeader", {"rift_control_leader": ""}),
    ("RiftProjectionStopped", {"rift_control_projection_stopped": "1"}),
    ("RiftProjectionBlocked", {"rift_control_projection_blocked": "1"}),
    ("RiftProjectionLate", {"rift_control_projection_lag_seconds": "90"}),
    ("RiftLogNotSampled", {"rift_control_sample_age_seconds": "90"}),
    ("RiftArchiveFails", {"rift_control_archive_failures": "1"}),
    ("RiftSqlRefused", {"rift_control_sql_questions_total": "0+1"}),
    ("RiftTargetDown", {'up{job="rift-worker"}': "0"}),
]


def test_each_alert_has_a_fault() -> None:
    assert {name for names, _ in FAULTS for name in names.split()} == ALERTS.keys()


def test_each_alert_fires_at_its_fault_alone(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        # Prometheus is no part of Rift, so the suite passes without it.
        return
    shutil.copy(PROMETHEUS / "rules.yaml", tmp_path)
    unit = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [_test(names.split(), changes) for names, changes in FAULTS],
    }
    # JSON is YAML.
    (tmp_path / "unit.yaml").write_text(json.dumps(unit))
    done = subprocess.run(
        ["promtool", "test", "rules", "unit.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _test(names: list[str], changes: dict[str, str]) -> dict[str, object]:
    values = dict(WELL)
    for start, value in changes.items():
        same = [name for name in WELL if name.startswith(start)]
        assert len(same) <= 1, start
        values[same[0] if same else start] = value
    return {
        "interval": "1m",
        "input_series": [
            {"series": name, "values": re.sub(r"^([\d.+]+)$", rf"\1x{MINUTES}", value)}
            for name, value in values.items()
            if value
        ],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{MINUTES}m",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names],
            }
        ],
    }
