"""Two hosts on one machine, out of Linux network namespaces, joined by a link of known speed.

    with TwoHosts(Link.parse("1gbit,0.2ms")) as hosts:
        subprocess.run(hosts.command(0, ["curl", f"http://{hosts.addresses[1]}:8000/"]))

Each host has its own `lo` and one interface to the other host, and no way to anywhere else. The
machine's cores, memory and files are common to both.

The link is a veth pair. Its bandwidth is limited by tc's token bucket; after a pause, 0.1 ms' worth
or two packets, whichever is more, pass at once. Latency is tc's netem where the kernel has it.
Where it has not, a relay, a process with a TUN device in each host, holds every packet back for as
long as a serial link of that bandwidth and latency would. It never delivers too early; measured on
two cores of a virtual machine, a round trip took 0.1 ms too long at a latency of 0.2 ms, 0.25 to
0.5 ms at 3 ms (a core wakes slower from a longer sleep), and 2 to 7 Gbit/s passed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import math
import os
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

_PREFIX = "depthpar"
_INTERFACE = "net0"
_ADDRESSES = ("10.83.71.1", "10.83.71.2")
_NEEDED = (
    "two hosts need Linux with iproute2 (ip, tc), root with CAP_SYS_ADMIN and CAP_NET_ADMIN, and a "
    "kernel with network namespaces, veth, sch_tbf for bandwidth, sch_netem or tun for latency"
)
_MTU = 1500
_RELAY_MTU = 65535  # the largest there is: bulk transfers then cost the relay few packets
_BURST_SECONDS = 1e-4
# More than TCP has on its way at a time: nothing is dropped, senders wait.
_QUEUE_BYTES = 16 << 20
_QUEUE_PACKETS = 100_000
_PATIENCE_SECONDS = 5.0
_READY = "ready"
_serial = itertools.count()


class NotPossible(Exception):
    """This machine cannot make such hosts; one line says why and what is needed."""


@dataclass(frozen=True)
class Link:
    """What lies between the hosts.

    Args:
        mbit: bandwidth each way in Mbit/s, headers included; None: as fast as the machine can.
        latency_ms: one way, in milliseconds, added to what the machine itself takes.

    Raises:
        ValueError: the bandwidth is not above 0, or the latency is below 0.
    """

    mbit: float | None = None
    latency_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.mbit is not None and not 0 < self.mbit < math.inf:
            raise ValueError(f"bandwidth {self.mbit:g} Mbit/s is not allowed; allowed: above 0")
        if not 0 <= self.latency_ms < math.inf:
            raise ValueError(f"latency {self.latency_ms:g} ms is not allowed; allowed: 0 or more")

    def __str__(self) -> str:
        parts = []
        if self.mbit is not None:
            fast = self.mbit >= 1000
            parts.append(f"{self.mbit / 1000:g} Gbit/s" if fast else f"{self.mbit:g} Mbit/s")
        if self.latency_ms:
            parts.append(f"{self.latency_ms:g} ms")
        return ", ".join(parts) or "plain veth"

    @classmethod
    def parse(cls, text: str) -> Link:
        """A link from "plain", "1gbit", "100mbit", "0.2ms" or "1gbit,0.2ms".

        Raises:
            ValueError: it is none of these; the message says what is allowed.
        """
        number = r"(\d+(?:\.\d+)?)"
        form = rf"plain|(?!$)(?:{number}([mg])bit(?:$|,(?=\d)))?(?:{number}ms)?"
        found = re.fullmatch(form, text.replace(" ", "").lower())
        if not found:
            raise ValueError(
                f"link {text!r} is unknown; allowed: 'plain', a bandwidth ('100mbit', '1gbit'), "
                "a one-way latency ('0.2ms'), or both ('1gbit,0.2ms')"
            )
        rate, unit, latency = found.groups()
        mbit = float(rate) * {"m": 1, "g": 1000}[unit] if rate else None
        return cls(mbit, float(latency or 0))


class TwoHosts:
    """Host 0 and host 1, from entering the context to leaving it, however it is left.

    What still runs in a host then gets SIGTERM, and SIGKILL if it takes more than 5 s. An owner
    that was killed itself cleans nothing up; the next one does.

    Raises:
        NotPossible: on entering; nothing is left of the attempt.
        RuntimeError: on leaving, or from `command`: the relay ended, so the link is cut.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.addresses = _ADDRESSES
        owned = f"{_PREFIX}-{os.getpid()}-{next(_serial)}"
        self._names = (f"{owned}-0", f"{owned}-1")
        self._relay: subprocess.Popen[str] | None = None
        self._undo = ExitStack()

    def interface(self, host: int) -> str:
        """The interface that has the host's address."""
        assert host in (0, 1)
        return _INTERFACE

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """What to run for `argv` to run in a host; its process is the one that is started."""
        self._check_relay()
        return ["ip", "netns", "exec", self._names[host], *argv]

    def __enter__(self) -> TwoHosts:
        missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
        if sys.platform != "linux" or missing or os.geteuid() != 0:
            why = f"no {missing[0]} in PATH" if missing else "not Linux, or not root"
            raise NotPossible(f"{_NEEDED}; here: {why}")
        _remove_leftovers()
        with ExitStack() as undo:
            undo.callback(_delete, self._names)
            self._make(undo)
            undo.callback(_end_processes, self._names)  # first, so that they still have the link
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with self._undo:
            try:
                self._check_relay()
            except RuntimeError as cut:
                if error is None:
                    raise
                error.add_note(str(cut))  # most likely why there is an error at all

    def _make(self, undo: ExitStack) -> None:
        for name in self._names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        relayed = self.link.latency_ms > 0 and not _has_netem(self._names[0])
        if relayed:
            self._relay = _start_relay(self._names, self.link, undo)
        else:
            ends = [["name", _INTERFACE, "netns", name] for name in self._names]
            _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(self._names, self.addresses, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/30", "dev", _INTERFACE)
            mtu = str(_RELAY_MTU if relayed else _MTU)
            _run("ip", "-n", name, "link", "set", _INTERFACE, "mtu", mtu, "up")
            discipline = _discipline(self.link)
            if discipline and not relayed:
                _run("tc", "-n", name, "qdisc", "add", "dev", _INTERFACE, "root", *discipline)

    def _check_relay(self) -> None:
        if self._relay and self._relay.poll() is not None:
            code = self._relay.returncode
            raise RuntimeError(f"the link is cut: its relay ended with exit code {code}, see above")


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process by SystemExit (143), which leaves contexts, as Ctrl-C does."""

    def leave(number: int, frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the clean-up
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def _run(*argv: str) -> None:
    # A session of its own: Ctrl-C in a terminal must not end `ip` half-way.
    done = subprocess.run(argv, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise NotPossible(f"{_NEEDED}; here: `{shlex.join(argv)}` says: {said}")


def _discipline(link: Link) -> list[str]:
    """What tc has to do with what an end of the link sends; nothing for a plain link."""
    rate = [] if link.mbit is None else ["rate", f"{round(link.mbit * 1e6)}bit"]
    if link.latency_ms:
        delay = f"{round(link.latency_ms * 1e3)}us"
        return ["netem", "delay", delay, *rate, "limit", str(_QUEUE_PACKETS)]
    if link.mbit is None:
        return []
    # Two packets at least, or a timer that is late loses bandwidth. A larger burst would let the
    # short messages of decoding pass as if there were no limit. The bucket splits larger packets.
    burst = max(2 * (_MTU + 14), round(link.mbit * 1e6 / 8 * _BURST_SECONDS))
    return ["tbf", *rate, "burst", str(burst), "limit", str(_QUEUE_BYTES)]


def _has_netem(name: str) -> bool:
    try:
        _run("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except NotPossible:
        return False
    _run("tc", "-n", name, "qdisc", "del", "dev", "lo", "root")
    return True


def _remove_leftovers() -> None:
    """Remove what owners that are no more have left."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    found = re.findall(rf"^({_PREFIX}-(\d+)-\d+-[01])\b", listed, re.MULTILINE)
    names = [name for name, owner in found if not Path("/proc", owner).exists()]
    _end_processes(names)
    _delete(names)


def _end_processes(names: Sequence[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        signalled: set[int] = set()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while (running := _processes(names)) and time.monotonic() < deadline:
            for process in running - signalled:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
            signalled |= running
            time.sleep(0.02)


def _delete(names: Sequence[str]) -> None:
    """Delete namespaces, of which some may not exist."""
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, start_new_session=True)


def _processes(names: Sequence[str]) -> set[int]:
    commands = [["ip", "netns", "pids", name] for name in names]
    outputs = [subprocess.run(argv, capture_output=True, text=True).stdout for argv in commands]
    return {int(process) for output in outputs for process in output.split()}


def _start_relay(names: tuple[str, str], link: Link, undo: ExitStack) -> subprocess.Popen[str]:
    numbers = [str(link.latency_ms / 1e3), str(8e-6 / link.mbit if link.mbit else 0)]
    relay = subprocess.Popen(
        [sys.executable, "-I", __file__, *names, *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the owner
    )
    undo.enter_context(relay)  # on leaving: closes stdin, which ends it, as the owner's death does
    assert relay.stdout
    said = relay.stdout.readline().strip()
    if said != _READY:
        raise NotPossible(f"{_NEEDED}; here: a TUN device cannot be made: {said}")
    return relay


def _run_relay(hosts: Sequence[str], latency: float, seconds_per_byte: float) -> None:
    """Pass packets between the hosts, in order, until stdin closes. Times in seconds."""
    try:
        tuns = [_open_tun(host) for host in hosts]
    except OSError as error:
        print(error)
        sys.exit(1)
    # A link does not wait for its turn on a core. All cores may be busy, so this process must not
    # either, or its packets would be late by whole time slices; and its timers are exact this way.
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    queues: tuple[deque[tuple[float, bytes]], ...] = (deque(), deque())  # with times of arrival
    free = [0.0, 0.0]  # when the packets before have left
    owner = sys.stdin.fileno()
    print(_READY, flush=True)
    while True:
        due = min((queue[0][0] for queue in queues if queue), default=None)
        wait = None if due is None else max(0.0, due - time.monotonic())
        readable = select.select([owner, *tuns], [], [], wait)[0]
        if owner in readable:
            return
        for source, tun in enumerate(tuns):
            if tun in readable:
                packet = os.read(tun, _RELAY_MTU)
                free[source] = max(free[source], time.monotonic())
                free[source] += len(packet) * seconds_per_byte
                queues[source].append((free[source] + latency, packet))
            while queues[source] and queues[source][0][0] <= time.monotonic():
                _deliver(tuns[1 - source], queues[source].popleft()[1])


def _deliver(tun: int, packet: bytes) -> None:
    try:
        os.write(tun, packet)
    except OSError as error:
        if error.errno != errno.EIO:  # the interface is not up (yet), so nobody receives it
            raise


def _open_tun(host: str) -> int:
    """Make a TUN device in a host. This process then returns to where it was: it is not in it."""
    set_interface, tun, no_packet_information = 0x400454CA, 0x0001, 0x1000
    request = struct.pack("16sH22x", _INTERFACE.encode(), tun | no_packet_information)
    setns = ctypes.CDLL(None).setns  # os.setns is new in Python 3.12
    with open("/proc/self/ns/net") as home, open(f"/run/netns/{host}") as there:
        if setns(there.fileno(), 0):
            raise OSError(f"{there.name} cannot be entered")
        device = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(device, set_interface, request)
        setns(home.fileno(), 0)
    return device


if __name__ == "__main__":
    _run_relay(sys.argv[1:3], float(sys.argv[3]), float(sys.argv[4]))
