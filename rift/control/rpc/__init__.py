"""Control's answers to questions over the broker's request-reply.

server    receives questions and replies
handlers  answers each kind of question
"""
