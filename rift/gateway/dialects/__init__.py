"""Each API's bodies and frames.

sampling             fields that all APIs share
native               the native API: body, object and stream
openai_fields        fields that OpenAI's APIs share
openai_errors        problems as OpenAI's APIs name them
support              fields that OpenAI's APIs and vLLM have and Rift refuses or ignores
answer_format        the format of an answer, in all the ways to ask for one
completions_request  bodies of `/v1/completions`, and fields they share with chat
chat_request         bodies of `/v1/chat/completions`
chat_response        objects and chunks of these two
responses_request    bodies of `/v1/responses`
responses_response   objects and events of `/v1/responses`
dialect              the four APIs side by side, and the stream format they share
"""
