"""Each API's bodies and frames.

sampling            fields that all APIs share, and the native body
native              frames of the native route
openai_fields       fields that OpenAI's routes share
chat_request        bodies of chat and completions
chat_response       chunks and objects of chat and completions
responses_request   bodies of `/v1/responses`
responses_response  events and objects of `/v1/responses`
"""
