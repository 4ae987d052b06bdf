"""Events of a lane to the clients that wait for them.

queue_depth    how much waits, by model and account
lane_reader    reads a lane and folds each event once
lane_registry  the lanes that this gateway reads
end_watcher    follows requests to their end without a client
queue_status   what a waiting client is told
delivery       frames to a client, and what follows when it goes
"""
