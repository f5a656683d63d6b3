"""Small messages between the ranks of a group, straight over TCP, without a thread in between.

Gloo hands every message to a thread of its own. Where a rank has one core, as a rank of vLLM's has
for its main thread, each message then costs two context switches and, with anything else running on
that core, milliseconds. Here the thread that computes sends by itself and receives by itself: it
gives the bytes to the kernel when a message starts and looks for the answer when it has to wait.
In between the kernel does the work.
"""

from __future__ import annotations

import secrets
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

# A message between two hosts takes tens to hundreds of microseconds. Polling so long is cheaper
# than giving the core away, which takes a scheduler's time slice to get back.
SPIN_SECONDS = 1e-3
CONNECT_SECONDS = 30.0
TOKEN_BYTES = 16

# Gives every rank's value to all ranks, in the order of ranks.
Gather = Callable[[object], list[Any]]


class Peer:
    """The connection to one other rank. Messages arrive in the order they were sent."""

    def __init__(self, rank: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rank = rank
        self.connection = connection
        self.outgoing: deque[memoryview] = deque()
        self.incoming: deque[memoryview] = deque()
        # Messages completed so far.
        self.sent = self.received = 0

    def send(self) -> None:
        """Give the kernel what it takes now.

        Raises:
            RuntimeError: the connection broke.
        """
        try:
            while self.outgoing:
                count = self.connection.send(self.outgoing[0])
                self.sent += _completed(self.outgoing, count)
        except BlockingIOError:
            pass
        except OSError as error:
            raise self._broken(error.strerror) from error

    def receive(self) -> None:
        """Take what the kernel has now; raises as `send` does."""
        try:
            while self.incoming:
                count = self.connection.recv_into(self.incoming[0])
                if count == 0:
                    raise self._broken("it was closed")
                self.received += _completed(self.incoming, count)
        except BlockingIOError:
            pass
        except OSError as error:
            raise self._broken(error.strerror) from error

    def _broken(self, why: str | None) -> RuntimeError:
        return RuntimeError(f"connection to tensor-parallel rank {self.rank} broke: {why}")


def _completed(messages: deque[memoryview], count: int) -> int:
    """Take `count` bytes off the first message; 1 if that was the rest of it, else 0."""
    if count < len(messages[0]):
        messages[0] = messages[0][count:]
        return 0
    messages.popleft()
    return 1


class Exchange:
    """Connections to all other ranks.

    Args:
        peers: one for every other rank.
        timeout: seconds that a wait may take.
    """

    def __init__(self, peers: Sequence[Peer], timeout: float) -> None:
        self.peers = {peer.rank: peer for peer in peers}
        self.timeout = timeout
        self._started = 0

    def start(self, message: memoryview, answers: dict[int, memoryview]) -> int:
        """Send a message to all others, and expect one from each.

        Args:
            message: bytes; not to be changed until the wait is over.
            answers: for every other rank, where its message is to be put; of the same size.

        Returns:
            A ticket for `wait`.
        """
        for rank, peer in self.peers.items():
            peer.outgoing.append(message)
            peer.incoming.append(answers[rank])
            peer.send()
        self._started += 1
        return self._started

    def wait(self, ticket: int) -> None:
        """Wait until that message is on its way and its answers are there.

        Raises:
            RuntimeError: a connection broke, or the time is over.
        """
        start = time.monotonic()
        while waiting := [
            peer for peer in self.peers.values() if min(peer.sent, peer.received) < ticket
        ]:
            for peer in waiting:
                peer.send()
                peer.receive()
            waited = time.monotonic() - start
            if waited > self.timeout:
                raise RuntimeError(
                    f"tensor-parallel rank {waiting[0].rank} sent nothing for {waited:.0f} s"
                )
            if waited > SPIN_SECONDS:
                _sleep_until_ready([p for p in waiting if min(p.sent, p.received) < ticket])


def _sleep_until_ready(peers: Sequence[Peer]) -> None:
    poll = select.poll()
    for peer in peers:
        poll.register(peer.connection, select.POLLIN | (select.POLLOUT if peer.outgoing else 0))
    if peers:
        poll.poll(1000)


def connect(rank: int, ranks: int, address: str, gather: Gather, timeout: float) -> Exchange | None:
    """Connect every rank with every other.

    Args:
        rank: this rank, of `ranks`.
        address: this host's, as the others reach it.
        gather: called by all ranks, the same number of times.
        timeout: of the exchange, in seconds.

    Returns:
        None, on all ranks alike, if any of the connections can't be made.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    token = secrets.token_bytes(TOKEN_BYTES)
    try:
        listener = socket.create_server((address, 0), family=family, backlog=ranks)
        port = listener.getsockname()[1]
    except OSError:
        listener, port = None, 0
    places = gather((address, port, token))
    peers: list[Peer] | None = None
    try:
        if listener is not None:
            peers = _connect_all(rank, places, listener)
    except OSError:
        pass
    finally:
        if listener is not None:
            listener.close()
    if all(gather(peers is not None)) and peers is not None:
        return Exchange(peers, timeout)
    for peer in peers or []:
        peer.connection.close()
    return None


def _connect_all(
    rank: int, places: list[tuple[str, int, bytes]], listener: socket.socket
) -> list[Peer]:
    """Call the ranks before this one, and name it with their token; be called by the others."""
    peers = []
    for other, (address, port, token) in enumerate(places[:rank]):
        connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        connection.sendall(token + rank.to_bytes(4, "little"))
        peers.append(Peer(other, connection))
    token = places[rank][2]
    expected = set(range(rank + 1, len(places)))
    listener.settimeout(CONNECT_SECONDS)
    while expected:
        connection, _ = listener.accept()
        connection.settimeout(CONNECT_SECONDS)
        hello = connection.recv(TOKEN_BYTES + 4, socket.MSG_WAITALL)
        other = int.from_bytes(hello[TOKEN_BYTES:], "little")
        if secrets.compare_digest(hello[:TOKEN_BYTES], token) and other in expected:
            expected.remove(other)
            peers.append(Peer(other, connection))
        else:  # somebody else's
            connection.close()
    return sorted(peers, key=lambda peer: peer.rank)
