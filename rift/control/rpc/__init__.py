"""Control's answers to questions over the broker's request-reply.

server     receives questions and replies
replies    encodes an answer or an error
handlers   answers each kind of question
operators  answers operators' questions: SQL, status, digests
"""
