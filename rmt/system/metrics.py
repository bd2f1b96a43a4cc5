"""Metrics of a step, reduced over ranks once."""

from collections import defaultdict

from rmt.system.dist import World, reduce_max, reduce_sums


class Metrics:
    """Means, sums and maxima over all ranks. Every rank must add the same names, 0 if idle."""

    def __init__(self):
        self.totals: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)
        self.sums: dict[str, float] = defaultdict(float)
        self.maxima: dict[str, float] = defaultdict(float)

    def add(self, name: str, total, count) -> None:
        self.totals[name] += float(total)
        self.counts[name] += float(count)

    def add_sum(self, name: str, value) -> None:
        self.sums[name] += float(value)

    def add_max(self, name: str, value) -> None:
        self.maxima[name] = max(self.maxima[name], float(value))

    def reduce(self, world: World) -> dict[str, float | None]:
        """Return name -> value; of a mean None where nothing was counted. All ranks."""
        totals, counts, sums = (
            reduce_sums(values, world) for values in (self.totals, self.counts, self.sums)
        )
        means = {name: totals[name] / counts[name] if counts[name] else None for name in totals}
        return means | sums | dict(zip(self.maxima, reduce_max(list(self.maxima.values()), world)))
