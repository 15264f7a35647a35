"""The messages beside NCCL: frames over TCP between two transports that know the cluster's key.

    dialer                                            listener
       │ HELLO: who I am, whom I want, a nonce ────────> │
       │ <──── HELLO: who I am, whom I heard, a nonce, a MAC over both hellos
       │ PROOF: the dialer's MAC over both hellos ─────> │

The nonces make a recorded meeting worthless. Each end learns the other's incarnation from it, and
refuses all but the one it wanted. Frames are authenticated by the connection, not one by one, and
not encrypted: as with the rest of a cluster's traffic, the network between workers is trusted.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import hmac
import secrets
import socket
import struct
from typing import NamedTuple

from crossdock.proto.errors import TransferFailed

MAX_FRAME_BYTES = 16 << 20

_MAGIC = b"xdkv"
_VERSION = 1
_HELLO = struct.Struct("<4sB16s16s16s")  # magic, version, the sender, the one addressed, nonce
_HEADER = struct.Struct("<BQI")  # kind, request, bytes that follow
_MAC_BYTES = 32
_READ_BYTES = 1 << 20  # at most, in one look
_BYE_BYTES = 400


class Kind(enum.IntEnum):
    """What a frame is; beside each, what its body holds."""

    HELLO = 0
    PROOF = 1
    BYE = 2  # why the sender ends the connection
    MEET = 3  # the id of the communicator to join
    READ = 4  # int64 [runs, 3]: region, first block, blocks
    SENDING = 5  # the blocks of that request are posted now
    FENCE = 6  # length of the notification, notification, int64 [blocks] ids
    GENERATIONS = 7  # int64 [blocks]
    REFUSED = 8  # why that request is not served


class Frame(NamedTuple):
    """One message of a connection: its Kind, the number of the request it belongs to, its body."""

    kind: int
    request: int
    body: bytes


class Channel:
    """One connection, never waiting. What is sent before the other end is known is held back."""

    def __init__(
        self, sock: socket.socket, key: bytes, mine: bytes, peer: bytes | None = None
    ) -> None:
        """peer: whom the dialer wants; the listener hears it."""
        self.socket = sock
        self.peer = peer
        self.established = False
        self._key, self._mine, self._dialer = key, mine, peer is not None
        self._nonce = secrets.token_bytes(16)
        self._hellos = b""  # the dialer's, then the listener's
        self._in, self._out = bytearray(), bytearray()
        self._held = bytearray()
        self._lost: str | None = None
        if peer is not None:
            self._hellos = self._hello(peer)
            self._put(Frame(Kind.HELLO, 0, self._hellos))

    @property
    def wants_to_write(self) -> bool:
        """Whether bytes wait for the socket to take them."""
        return bool(self._out)

    def send(self, kind: Kind, request: int = 0, body: bytes = b"") -> None:
        """Queues a frame; `pump` writes it."""
        if len(body) > MAX_FRAME_BYTES:
            raise TransferFailed(f"a request of {len(body)} bytes is too long")
        frame = Frame(kind, request, body)
        if self.established:
            self._put(frame)
        else:
            self._held += _packed(frame)

    def pump(self) -> list[Frame]:
        """Writes what the socket takes, returns what it had. Raises TransferFailed at the end."""
        if self._lost is not None:
            raise TransferFailed(self._lost)
        self._write()
        if self._lost is None:
            self._read()
        frames = []
        while (frame := self._next()) is not None:
            if frame.kind == Kind.BYE:
                self._lost = f"the peer ended it: {frame.body.decode(errors='replace')}"
                break
            if self.established:
                frames.append(frame)
            else:
                self._introduce(frame)
        if self._lost is not None and not frames:
            raise TransferFailed(self._lost)
        return frames

    def close(self, reason: str) -> None:
        """Tells the peer why, if that goes at once."""
        with contextlib.suppress(OSError):
            if self._lost is None and not self._out:
                body = reason.encode()[:_BYE_BYTES]
                self.socket.send(_packed(Frame(Kind.BYE, 0, body)))
        self.socket.close()

    # The meeting.

    def _introduce(self, frame: Frame) -> None:
        if self._dialer:
            self._meet_listener(frame)
        elif self.peer is None:
            self._meet_dialer(frame)
        else:
            if frame.kind != Kind.PROOF or not self._proves(frame.body, b"dialer"):
                raise TransferFailed(f"{self.peer.hex()} does not know this cluster's key")
            self._establish()

    def _meet_dialer(self, frame: Frame) -> None:
        if frame.kind != Kind.HELLO:
            raise TransferFailed("the caller did not introduce itself")
        self.peer, wanted = _parse_hello(frame.body)
        self._hellos = frame.body + self._hello(self.peer)
        self._put(Frame(Kind.HELLO, 0, self._hellos[_HELLO.size :] + self._mac(b"listener")))
        self._write()
        if wanted != self._mine:
            raise TransferFailed(f"{self.peer.hex()} wants {wanted.hex()}, which is not here")

    def _meet_listener(self, frame: Frame) -> None:
        if frame.kind != Kind.HELLO or len(frame.body) != _HELLO.size + _MAC_BYTES:
            raise TransferFailed("the peer did not introduce itself")
        hello, mac = frame.body[: _HELLO.size], frame.body[_HELLO.size :]
        found, heard = _parse_hello(hello)
        assert self.peer is not None
        if found != self.peer:
            raise TransferFailed(f"its address is now that of {found.hex()}")
        self._hellos += hello
        if heard != self._mine or not self._proves(mac, b"listener"):
            raise TransferFailed("the peer does not know this cluster's key")
        self._put(Frame(Kind.PROOF, 0, self._mac(b"dialer")))
        self._establish()

    def _establish(self) -> None:
        self.established = True
        self._out += self._held
        self._held.clear()
        self._write()

    def _hello(self, peer: bytes) -> bytes:
        return _HELLO.pack(_MAGIC, _VERSION, self._mine, peer, self._nonce)

    def _mac(self, role: bytes) -> bytes:
        return hmac.digest(self._key, b"crossdock.nccl\0" + role + self._hellos, hashlib.sha256)

    def _proves(self, mac: bytes, role: bytes) -> bool:
        return hmac.compare_digest(mac, self._mac(role))

    # Bytes.

    def _put(self, frame: Frame) -> None:
        self._out += _packed(frame)

    def _write(self) -> None:
        try:
            while self._out:
                del self._out[: self.socket.send(self._out)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lost = error.strerror or str(error)

    def _read(self) -> None:
        try:
            piece = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost = error.strerror or str(error)
            return
        self._in += piece
        if not piece:
            self._lost = "the peer is gone"

    def _next(self) -> Frame | None:
        if len(self._in) < _HEADER.size:
            return None
        kind, request, length = _HEADER.unpack_from(self._in)
        if length > (MAX_FRAME_BYTES if self.established else _BYE_BYTES):
            raise TransferFailed(f"the peer announces a message of {length} bytes")
        end = _HEADER.size + length
        if len(self._in) < end:
            return None
        body = bytes(self._in[_HEADER.size : end])
        del self._in[:end]
        return Frame(kind, request, body)


def _packed(frame: Frame) -> bytes:
    return _HEADER.pack(frame.kind, frame.request, len(frame.body)) + frame.body


def _parse_hello(body: bytes) -> tuple[bytes, bytes]:
    """(who speaks, to whom). Raises TransferFailed."""
    if len(body) != _HELLO.size or body[:4] != _MAGIC:
        raise TransferFailed("what came is no hello of a Crossdock worker")
    _, version, speaker, addressed, _ = _HELLO.unpack(body)
    if version != _VERSION:
        raise TransferFailed(f"the peer speaks version {version}, this worker {_VERSION}")
    return speaker, addressed
