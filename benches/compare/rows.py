# SPDX-License-Identifier: Apache-2.0
"""What is measured: loads, and what each of them has to reach.

The figures to reach are ratios to a server measured in the same run wherever that is possible:
machines differ, and the same machine differs from hour to hour.
"""

from collections.abc import Callable
from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20

REQUESTS = "requests_per_second"
CPU = "cpu_us_per_request"
P50 = "latency_us_p50"
P99 = "latency_us_p99"
IDLE = "idle_cpu_percent"


@dataclass(frozen=True)
class Target:
    """One figure of `server` that has to be reached. With `base` it is the ratio to that server's."""

    field: str
    least: float | None = None
    most: float | None = None
    base: str | None = None
    server: str = "ours"

    def value(self, median: Callable[[str, str], float]) -> float:
        """The figure; `median(server, field)` is what was measured."""
        value = median(self.server, self.field)
        return value / median(self.base, self.field) if self.base else value

    def is_met(self, value):
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )

    def text(self, value):
        bound = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        unit = {REQUESTS: "req/s", CPU: "us CPU", P50: "us p50", P99: "us p99", IDLE: "% idle CPU"}
        what = f"x {self.base}'s {unit[self.field].split()[-1]}" if self.base else unit[self.field]
        verdict = "met" if self.is_met(value) else "MISSED"
        return f"{bound} {what}: {value:.2f}, {verdict}"


def faster(least, than="peer"):
    """At least so many times the requests a second."""
    return Target(REQUESTS, least=least, base=than)


def cpu(most_us):
    """At most so much processor time for a request."""
    return Target(CPU, most=most_us)


@dataclass(frozen=True)
class Row:
    """One load on one kind of storage. `peer_aio` is the peer's best for it, found with
    `--peer-only --peer-aio`."""

    name: str
    storage: str
    mix: str
    block_bytes: int
    depth: int
    peer_aio: str
    targets: tuple[Target, ...] = ()
    # Beside "ours".
    servers: tuple[str, ...] = ("peer",)
    # Server and front-end on a processor of their own each, and a look at the idle server.
    alone: bool = False
    # A run takes at least so long, where a single request does.
    seconds_min: float = 0.0


LIMITED = ("peer", "limit")

ROWS = (
    Row("4k randread qd32, page cache", "cached", "read", 4 * KIB, 32, "io_uring",
        (faster(2.0), cpu(4.6)), LIMITED),
    Row("4k randwrite qd32, page cache", "cached", "write", 4 * KIB, 32, "io_uring",
        (faster(1.5), faster(0.95, "no record")), ("peer", "limit", "no record")),
    Row("4k mix qd32, page cache", "cached", "half", 4 * KIB, 32, "io_uring",
        (faster(1.6),), LIMITED),
    Row("128k randread qd8, page cache", "cached", "read", 128 * KIB, 8, "io_uring",
        (faster(1.5),), LIMITED),
    Row("1m randread qd4, page cache", "cached", "read", MIB, 4, "io_uring",
        (faster(1.3),), LIMITED),
    Row("128k randwrite qd8, page cache", "cached", "write", 128 * KIB, 8, "io_uring",
        (faster(1.4),), LIMITED),
    Row("4k-256k mix qd16, page cache", "cached", "sizes", 4 * KIB, 16, "io_uring"),
    Row("4k randread qd32, direct", "direct", "read", 4 * KIB, 32, "native",
        (cpu(10.0),), LIMITED),
    Row("4k randwrite qd32, direct", "direct", "write", 4 * KIB, 32, "native",
        (cpu(14.0),), LIMITED),
    Row("4k randread qd1, direct, pinned", "direct", "read", 4 * KIB, 1, "native",
        (Target(P50, most=60.0), Target(IDLE, most=1.0)), LIMITED, alone=True),
    Row("4k write+flush qd1, direct", "direct", "write-flush", 4 * KIB, 1, "native"),
    Row("4 x 4k write+flush qd4, direct", "direct", "database", 4 * KIB, 4, "native"),
    Row("4k mix qd8, one replica 500 ms late", "slow", "half", 4 * KIB, 8, "threads",
        (Target(P99, most=1.2, base="healthy"),), ("peer", "healthy"), seconds_min=3.0),
    Row("4k write+flush qd1, flushes of 300 ms", "flush", "write-flush", 4 * KIB, 1, "threads",
        (Target(P50, most=330_000.0),), ("peer",), seconds_min=3.0),
)
