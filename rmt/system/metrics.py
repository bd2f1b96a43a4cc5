"""Metrics of a step as (sum, count) pairs, reduced over ranks once."""

from collections import defaultdict

from rmt.system.dist import World, reduce_max, reduce_sums


class Metrics:
    """Means and maxima over all ranks. Every rank must add the same names, with count 0 if idle."""

    def __init__(self):
        self.totals: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)
        self.maxima: dict[str, float] = defaultdict(float)

    def add(self, name: str, total, count) -> None:
        self.totals[name] += float(total)
        self.counts[name] += float(count)

    def add_max(self, name: str, value) -> None:
        self.maxima[name] = max(self.maxima[name], float(value))

    def reduce(self, world: World) -> dict[str, float | None]:
        """Return name -> mean, or None where nothing was counted. All ranks."""
        totals, counts = reduce_sums(self.totals, world), reduce_sums(self.counts, world)
        means = {name: totals[name] / counts[name] if counts[name] else None for name in totals}
        return means | dict(zip(self.maxima, reduce_max(list(self.maxima.values()), world)))
