"""The worker: takes requests of one model from the log and answers them through it.

process         starts the engine and serves until the shutdown
serving         the parts of a replica
replica         the events that a worker process publishes about itself
worker          takes jobs, runs attempts, releases them
claims          the jobs that a worker holds, and other processes' effect on them
prompt          a request as its engine reads it
attempt         one attempt: prompt to tokens to events
attempt_output  engine steps to the events of an answer
detokenizer     token ids to text, and stop strings
output_parser   text to content, reasoning and tool calls
lane_writer     appends the events of a lane in order
counts          what a worker has done, for its metrics
slots           the requests that a replica may run, shared by its shards
isolation       runs suspects alone
shutdown        how much time a worker has left
"""
