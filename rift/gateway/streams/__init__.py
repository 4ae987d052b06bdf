"""Pass the events of a lane to the subscriptions of its requests, and to their clients.

subscription   follows requests to their end, with or without a client
client_buffer  frames of one client, its wake-up and its bytes
queue_status   length of the queue, and the status of waiting requests
lane_reader    reads a lane and folds each event once
lane_registry  the lanes that this gateway reads
live_gateways  the gateways whose lanes report: they share the limits
shard_choice   which shard a gateway uses
own_lane       this gateway's own lane: opened, reported, lost
refusals       counts the requests that were refused, and reports them
lane_counts    times, tokens and revenue of the own lane's requests, for metrics
log_health     whether the log stores records, and its room
cancellation   cancels requests, and repeats that until it is stored
delivery       sends an answer, and decides what follows when the client goes
"""
