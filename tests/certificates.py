"""A certificate authority and a certificate for servers on loopback, made with openssl."""

import subprocess
from pathlib import Path

# As ops/README.md has them.
COMMANDS = (
    "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=rift-ca -keyout ca.key -out ca.pem",
    "req -newkey rsa:2048 -nodes -subj /CN=rift-nats -addext subjectAltName=IP:127.0.0.1,DNS:localhost "
    "-keyout key.pem -out request.pem",
    "x509 -req -in request.pem -CA ca.pem -CAkey ca.key -copy_extensions copy -days 2 -out cert.pem",
)


def make(folder: Path) -> Path:
    """Write `ca.pem`, `cert.pem` and `key.pem`, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for command in COMMANDS:
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder
