"""Messages between ranks over real sockets; the ranks are threads here."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from vllm_depthpar.model import tcp_exchange
from vllm_depthpar.model.tcp_exchange import Exchange, Gather, connect

Result = TypeVar("Result")


def on_ranks(ranks: int, work: Callable[[int, Gather], Result]) -> list[Result]:
    """Run work(rank, gather) for every rank at once."""
    barrier, board = threading.Barrier(ranks, timeout=30), [None] * ranks

    def run(rank: int) -> Result:
        def gather(value: Any) -> list[Any]:
            board[rank] = value
            barrier.wait()
            values = list(board)
            barrier.wait()
            return values

        return work(rank, gather)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def connected(ranks: int, timeout: float = 30) -> list[Exchange]:
    found = on_ranks(ranks, lambda rank, gather: connect(rank, ranks, "127.0.0.1", gather, timeout))
    assert all(found)
    return [one for one in found if one]


def close(exchanges: list[Exchange]) -> None:
    for exchange in exchanges:
        for peer in exchange.peers.values():
            peer.connection.close()


def test_messages_arrive_whole_and_in_order() -> None:
    """Two in flight at a time, of sizes from one byte to more than all socket buffers hold."""
    ranks, sizes = 3, (1, 4096, 32 << 20, 7, 70_000)
    messages = {(rank, size): os.urandom(size) for rank in range(ranks) for size in sizes}
    exchanges = connected(ranks)

    def work(rank: int, _: Gather) -> None:
        flights: list[tuple[int, int, dict[int, bytearray]]] = []

        def finish() -> None:
            ticket, size, answers = flights.pop(0)
            exchanges[rank].wait(ticket)
            for other, answer in answers.items():
                assert answer == messages[other, size]

        for size in sizes:
            answers = {other: bytearray(size) for other in range(ranks) if other != rank}
            views = {other: memoryview(answer) for other, answer in answers.items()}
            ticket = exchanges[rank].start(memoryview(messages[rank, size]), views)
            flights.append((ticket, size, answers))
            if len(flights) == 2:
                finish()
        finish()

    on_ranks(ranks, work)
    close(exchanges)


def test_start_does_not_wait_for_the_others() -> None:
    exchanges = connected(2)
    answer = bytearray(3)
    ticket = exchanges[0].start(memoryview(b"one"), {1: memoryview(answer)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchanges[0], "timeout", 0.2)
        with pytest.raises(RuntimeError, match=r"tensor-parallel rank 1 sent nothing for \d s"):
            exchanges[0].wait(ticket)
    other = bytearray(3)
    exchanges[1].wait(exchanges[1].start(memoryview(b"two"), {0: memoryview(other)}))
    exchanges[0].wait(ticket)
    assert (bytes(answer), bytes(other)) == (b"two", b"one")
    close(exchanges)


def test_a_long_wait_gives_the_core_away() -> None:
    exchanges = connected(2)
    answer = bytearray(1)
    ticket = exchanges[0].start(memoryview(b"x"), {1: memoryview(answer)})
    sent = threading.Timer(
        0.5, lambda: exchanges[1].start(memoryview(b"y"), {0: memoryview(bytearray(1))})
    )
    sent.start()
    start, used = time.monotonic(), time.thread_time()
    exchanges[0].wait(ticket)
    assert time.monotonic() - start > 0.4
    assert time.thread_time() - used < 0.1
    sent.join()
    close(exchanges)


def test_a_closed_connection_is_an_error() -> None:
    exchanges = connected(2)
    close(exchanges[1:])
    with pytest.raises(RuntimeError, match="connection to tensor-parallel rank 1 broke: "):
        exchanges[0].wait(exchanges[0].start(memoryview(b"x"), {1: memoryview(bytearray(1))}))
    close(exchanges[:1])


def test_strangers_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else finds the port first, and says the wrong thing."""
    create = socket.create_server
    strangers = []

    def create_server(*args: Any, **options: Any) -> socket.socket:
        server = create(*args, **options)
        stranger = socket.create_connection(server.getsockname())
        stranger.sendall(bytes(tcp_exchange.TOKEN_BYTES) + (1).to_bytes(4, "little"))
        strangers.append(stranger)
        return server

    monkeypatch.setattr(socket, "create_server", create_server)
    exchanges = connected(2)
    monkeypatch.undo()
    answers = [bytearray(1), bytearray(1)]
    tickets = [
        exchanges[rank].start(memoryview(b"ab"[rank : rank + 1]), {1 - rank: memoryview(answer)})
        for rank, answer in enumerate(answers)
    ]
    for exchange, ticket in zip(exchanges, tickets, strict=True):
        exchange.wait(ticket)
    assert answers == [b"b", b"a"]
    assert len(strangers) == 2
    close(exchanges)
    for stranger in strangers:
        stranger.close()


def test_none_on_all_ranks_if_one_cannot_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_exchange, "CONNECT_SECONDS", 0.5)
    addresses = ["127.0.0.1", "127.0.0.1", "192.0.2.1"]  # the last is nobody's: RFC 5737
    found = on_ranks(3, lambda rank, gather: connect(rank, 3, addresses[rank], gather, 30))
    assert found == [None] * 3
