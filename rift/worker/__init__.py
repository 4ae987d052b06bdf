"""The worker: takes requests of one model from the log and answers them through it.

process        the process: engine, replica, signals
worker         takes jobs, runs attempts, releases them
claims         the jobs that this worker holds
attempt        one attempt: prompt to tokens to events
isolation      runs suspects alone
shutdown       how far a worker's end has come
detokenizer    token ids to text, and stop strings
output_parser  text to content, reasoning and tool calls
lane_writer    appends the events of a lane in order
"""
