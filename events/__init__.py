"""The protocol: the events of the log and their meaning. Imports nothing else of Rift.

schema/          every event, and the record that carries them
codec            records to bytes and back
ids              request, attempt and lane ids; ids of traces and spans
subjects         streams and subjects
errors           the root of this package's errors
contracts        times and sizes that two processes must agree on
lifecycle        what counts in a request's life: one pure function
request_states   the life of many requests
request_history  everything the log holds of one request
book             accounts, keys, limits and prices
credit           what an account was granted, holds and has spent
fleet            replicas, elections and scaling decisions; for how many requests a replica asks
money            nano-USD to text and back
pricing          what a request costs
intervals        unions of time spans
encryption       sealed content and its keys
redaction        events without content, and their hashes
merkle           Merkle trees and proofs
log              the log as a protocol
append_health    for how long the log has stored nothing
publisher        appends an event where its type belongs
shards           which shards are open
stream_fold      keeps a fold current with a stream
clock            the event loop's time
broker_clock     the broker's time, from stored times
wakeup           a wake-up that can be used again
jetstream/       the log on NATS JetStream
memory/          the log in memory
"""
