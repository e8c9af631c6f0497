"""Our own metrics, in Prometheus' text format, made when somebody asks. The rows are in metric_rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllmd.instance.metric_gpus import gpu_samples
from vllmd.instance.metric_rows import METRICS
from vllmd.instance.metric_samples import Facts, Sample, samples
from vllmd.system.control import Route

TYPE = "text/plain; version=0.0.4; charset=utf-8"


def route(facts: Facts) -> Route:
    return lambda: (TYPE, exposition(facts))


def exposition(facts: Facts) -> bytes:
    """prometheus_client is imported by the first question: an instance that nobody scrapes does not pay for it (3 MiB)."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import Metric

    class Collector:
        def collect(self) -> Iterable[Metric]:
            families: dict[str, Metric] = {}
            for name, labels, value in _all(facts):
                if name not in families:
                    row = METRICS[name]
                    families[name] = Metric(name.removesuffix("_total") if row.kind == "counter" else name, row.text, row.kind)
                families[name].add_sample(name, {"name": facts.board.document["instance"], **labels}, value)
            return [families[name] for name in METRICS if name in families]

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return bytes(generate_latest(registry))


def _all(facts: Facts) -> Iterator[Sample]:
    yield from samples(facts)
    yield from gpu_samples(facts.vitals.gpus, facts.board.document["gpus"])
