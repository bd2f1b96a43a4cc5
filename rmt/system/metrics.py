"""Metrics of a step as (sum, count) pairs, reduced over ranks once."""

from rmt.system.dist import World, reduce_max, reduce_sums


class Metrics:
    """Means over all ranks. Every rank must add the same names, if need be with count 0."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.maxima: dict[str, float] = {}

    def add(self, name: str, total, count) -> None:
        for suffix, value in (("sum", total), ("count", count)):
            key = f"{name}|{suffix}"
            self.sums[key] = self.sums.get(key, 0.0) + float(value)

    def add_max(self, name: str, value) -> None:
        self.maxima[name] = max(self.maxima.get(name, 0.0), float(value))

    def reduce(self, world: World) -> dict[str, float | None]:
        """Name -> mean, None where nothing was counted. All ranks."""
        sums = reduce_sums(self.sums, world)
        maxima = dict(zip(self.maxima, reduce_max(list(self.maxima.values()), world)))
        names = [key.removesuffix("|sum") for key in sums if key.endswith("|sum")]
        means = {
            name: sums[f"{name}|sum"] / sums[f"{name}|count"] if sums[f"{name}|count"] else None
            for name in names
        }
        return means | maxima
