"""A PostgreSQL client that can log in and sit idle: what thousands of idle connections are made of.

Standard library only. Speaks protocol 3.0 in the clear, with SCRAM-SHA-256 or without a password; must never be used for
anything that matters.
"""

import base64
import functools
import hashlib
import hmac
import os
import socket
import struct


class Refused(Exception):
    """The server answered with an error."""


@functools.lru_cache(maxsize=64)
def _salted(password, salt, iterations):
    return hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)


def _exactly(sock, count):
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise Refused("connection closed")
        data += piece
    return data


def _message(sock):
    head = _exactly(sock, 5)
    return head[:1], _exactly(sock, struct.unpack("!I", head[1:])[0] - 4)


def _send(sock, tag, body):
    sock.sendall(tag + struct.pack("!I", len(body) + 4) + body)


def _scram(sock, password):
    """RFC 5802 without channel binding, after AuthenticationSASL."""
    nonce = base64.b64encode(os.urandom(18)).decode()
    first_bare = f"n=,r={nonce}"
    first = ("n,," + first_bare).encode()
    _send(sock, b"p", b"SCRAM-SHA-256\0" + struct.pack("!I", len(first)) + first)
    tag, body = _message(sock)
    if tag != b"R":
        raise Refused(body.decode(errors="replace"))
    server_first = body[4:].decode()
    fields = dict(part.split("=", 1) for part in server_first.split(","))
    salted = _salted(password, base64.b64decode(fields["s"]), int(fields["i"]))
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    bare = f"c=biws,r={fields['r']}"
    signature = hmac.digest(hashlib.sha256(client_key).digest(), f"{first_bare},{server_first},{bare}".encode(), "sha256")
    proof = bytes(a ^ b for a, b in zip(client_key, signature))
    _send(sock, b"p", f"{bare},p={base64.b64encode(proof).decode()}".encode())


def connect(port, user, password, database):
    """Logs in at 127.0.0.1 and returns the socket once the server is ready for a query."""
    sock = socket.create_connection(("127.0.0.1", port), 60)
    parameters = f"user\0{user}\0database\0{database}\0\0".encode()
    sock.sendall(struct.pack("!II", len(parameters) + 8, 196608) + parameters)
    while True:
        tag, body = _message(sock)
        if tag == b"E":
            raise Refused(body.decode(errors="replace"))
        if tag == b"R" and struct.unpack("!I", body[:4])[0] == 10:
            _scram(sock, password)
        if tag == b"Z":
            return sock


def query(sock, text):
    """Runs one statement and waits until it is answered."""
    rows(sock, text)


def rows(sock, text):
    """Runs one statement and returns its rows: tuples of text, None for NULL."""
    _send(sock, b"Q", text.encode() + b"\0")
    found = []
    while True:
        tag, body = _message(sock)
        if tag == b"E":
            raise Refused(body.decode(errors="replace"))
        if tag == b"D":
            found.append(_values(body))
        if tag == b"Z":
            return found


def _values(body):
    values, at = [], 2
    for _ in range(struct.unpack("!H", body[:2])[0]):
        length = struct.unpack("!i", body[at:at + 4])[0]
        at += 4
        values.append(None if length < 0 else body[at:at + length].decode())
        at += max(length, 0)
    return tuple(values)
