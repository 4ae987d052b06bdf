"""The gateway: HTTP in front, the log behind. It knows no engine, no worker and no database.

server.py    hypercorn
app.py       routes, and one request's way through the gateway
http.py      what of HTTP the routes need
parse.py     bodies to what is accepted
relay.py     the lane's reader: events to the streams that wait for them
answer.py    one request's counted events, and the object that the API shows of it
native.py    its frames on the native route
openai.py    its frames and objects on OpenAI's routes
"""
