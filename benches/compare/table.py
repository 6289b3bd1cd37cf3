# SPDX-License-Identifier: Apache-2.0
"""What was measured, for people and for programs."""

import statistics

from rows import CPU, P50, P99, REQUESTS

HEADER = (
    f"{'work':<40}{'':>10}{'req/s':>10}{'CPU us':>9}{'p50 us':>10}{'p99 us':>10}{'p99.9 us':>10}"
    f"{'ratio':>8}{'CPU':>7}  targets"
)


class Result:
    """The reports of all servers on one row."""

    def __init__(self, row):
        self.row = row
        self._reports = {}

    def add(self, server, report):
        self._reports.setdefault(server, []).append(report)

    def servers(self):
        return list(self._reports)

    def median(self, server, field):
        return statistics.median(report[field] for report in self._reports[server])

    def _ratio(self, name, field):
        # Processor time is told in ticks: of a few requests it may be none.
        return self.median(name, field) / (self.median("peer", field) or float("nan"))

    def verdicts(self):
        """For each target: it, its value."""
        measured = [
            target
            for target in self.row.targets
            if {target.server, target.base or target.server} <= set(self._reports)
        ]
        return [(target, target.value(self.median)) for target in measured]

    def is_met(self):
        return all(target.is_met(value) for target, value in self.verdicts())

    def print(self):
        """Prints the medians, ratios to the peer's, and the targets."""
        for name in self._reports:
            line = (
                f"{self.row.name if name == self.servers()[0] else '':<40}{name:>10}"
                f"{self.median(name, REQUESTS):>10.0f}{self.median(name, CPU):>9.2f}"
                f"{self.median(name, P50):>10.0f}{self.median(name, P99):>10.0f}"
                f"{self.median(name, 'latency_us_p999'):>10.0f}"
            )
            if name != "peer" and "peer" in self._reports:
                line += "".join(
                    f"{self._ratio(name, field):>{width}.2f}x"
                    for field, width in ((REQUESTS, 7), (CPU, 6))
                )
            if name == "ours":
                texts = [target.text(value) for target, value in self.verdicts()]
                line += "  " + "; ".join(texts)
            print(line, flush=True)

    def to_json(self):
        return {
            "work": self.row.name,
            "storage": self.row.storage,
            "mix": self.row.mix,
            "block_bytes": self.row.block_bytes,
            "depth": self.row.depth,
            "medians": {
                name: {field: self.median(name, field) for field in reports[0]}
                for name, reports in self._reports.items()
            },
            "runs": self._reports,
            "targets": [
                {"text": target.text(value), "value": value, "met": target.is_met(value)}
                for target, value in self.verdicts()
            ],
        }
