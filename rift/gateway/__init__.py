"""The gateway: HTTP in front, the log behind. It knows no engine, no worker and no database.

server.py       hypercorn
main.py         the process: its lane, and what it follows
app.py          routes
accepting.py    a new request's way through the gateway
retrieving.py   a request that is there: its answer, its stream again, its end
http.py         what of HTTP the routes need
parse.py        bodies to what is accepted: what all routes share, and the native one
parse_openai.py, parse_responses.py   bodies of OpenAI's routes; README.md says what becomes of each field
tools.py        what those share: tools, schemas, metadata
group.py        the choices of one request with n > 1
admission.py    who may ask for what, and whether there is room
allowances.py   what may be spent for an account that has credit or a budget
worst.py        the most that a request can cost
hold.py         one allowance of this lane
metered.py      what a request cost
idempotency.py  one request for each key
relay.py        a lane's reader: events to the streams that wait for them
relays.py       the relays of one gateway
delivery.py     frames to a client, and what is said when it goes
answer.py       one request's counted events, and the object that the API shows of it
native.py       its frames on the native route
openai.py       its chunks and objects on OpenAI's chat and completion routes
responses.py    its events and object on `/v1/responses`
openapi.py, shown.py   the published document, and the types of what is shown
"""
