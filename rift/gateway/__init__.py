"""The gateway: HTTP in front, the log behind. It knows no engine, no worker and no database.

server.py       hypercorn
main.py         the process: its lane, and what it follows
app.py          routes, and one request's way through the gateway
http.py         what of HTTP the routes need
parse.py        bodies to what is accepted
admission.py    who may ask for what, and whether there is room
allowances.py   what may be spent for an account that has credit or a budget
worst.py        the most that a request can cost
metered.py      what it cost
idempotency.py  one request for each key
relay.py        a lane's reader: events to the streams that wait for them
relays.py       the relays of one gateway
delivery.py     frames to a client, and what is said when it goes
answer.py       one request's counted events, and the object that the API shows of it
native.py       its frames on the native route
openai.py       its frames and objects on OpenAI's routes
"""
