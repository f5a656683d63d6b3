"""Load for an OpenAI server: streams of completions, and the times at which their tokens arrive.

Run as a program it reads one JSON job a line on stdin and answers each with one JSON line. Standard
library only: it starts at once, and takes little of the cores that it shares with what it measures.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from typing import Any

TIMEOUT_SECONDS = 600


def stream(host: str, port: int, model: str, prompt: list[int], tokens: int) -> list[float]:
    """Ask for exactly `tokens` tokens; returns when each came, on `time.perf_counter`.

    Raises:
        RuntimeError: the server refused, or sent another number of tokens.
    """
    connection = HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    reply = connection.getresponse()
    if reply.status != 200:
        raise RuntimeError(f"{reply.status}: {reply.read(500).decode(errors='replace')}")
    times: list[float] = []
    for line in reply:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices") or [{}]
            times += [time.perf_counter()] * len(choices[0].get("token_ids") or [])
    connection.close()
    if len(times) != tokens:
        raise RuntimeError(f"{tokens} tokens asked for, {len(times)} came")
    return times


def measure(
    host: str,
    port: int,
    model: str,
    batch: int,
    prompt_tokens: int,
    tokens: int,
    vocab: int,
    seed: int,
) -> dict[str, float]:
    """Run `batch` streams at a time, with random prompts.

    Returns:
        prefill: prompt tokens per second, from the start to the last of the first tokens.
        decode: tokens per second of all streams, from there to the end (0 for one token each).
    """
    numbers = random.Random(seed)
    prompts = [numbers.choices(range(vocab), k=prompt_tokens) for _ in range(batch)]
    start = time.perf_counter()
    with ThreadPoolExecutor(batch) as pool:
        streams = list(pool.map(lambda prompt: stream(host, port, model, prompt, tokens), prompts))
    all_started = max(times[0] for times in streams)
    end = max(times[-1] for times in streams)
    later = sum(at > all_started for times in streams for at in times)
    return {
        "prefill": batch * prompt_tokens / (all_started - start),
        "decode": later / (end - all_started) if later else 0.0,
    }


def healthy(host: str, port: int) -> bool:
    """Whether the server answers."""
    try:
        connection = HTTPConnection(host, port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False


def echo(host: str, port: int) -> None:
    """Send back what one connection sends, until it closes."""
    with socket.create_server((host, port)) as server:
        connection, _ = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := connection.recv(1 << 16):
            connection.sendall(data)


def round_trip(host: str, port: int, size: int = 64, count: int = 200) -> float:
    """Median time of a message of `size` bytes there and back over TCP, in seconds."""
    deadline = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        connection.sendall(bytes(size))
        left = size
        while left:
            left -= len(connection.recv(left))
        times.append(time.perf_counter() - start)
    connection.close()
    return sorted(times)[count // 2]


ACTIONS: dict[str, Any] = {
    "measure": measure,
    "healthy": healthy,
    "round_trip": round_trip,
    "echo": echo,
}


def main() -> None:
    """Answer jobs: {"do": name of a function here, ...its arguments} -> {"result"} or {"error"}."""
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = {"result": ACTIONS[job.pop("do")](**job)}
        except (OSError, HTTPException, RuntimeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
