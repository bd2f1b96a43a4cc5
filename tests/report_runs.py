"""A tiny run to report on, and what a model might say to break a page."""

from small_run import flags, run_here
from toy_runs import SETTINGS, write_corpus, write_thinker

HOSTILE = "</script><img src=x onerror=\"document.title='markup'\">{{DATA}}<!-- ‘\u2028"


def finished_run(place):
    """What a run of six steps leaves, started as users start it, with evaluations and probes."""
    write_thinker(place / "thinker")
    write_corpus(place / "data.jsonl")
    files = dict(model=place / "thinker", data=place / "data.jsonl", out=place / "out")
    held_out = dict(eval_data=place / "data.jsonl", eval_every=3, eval_positions=4)
    run_here(*flags(**SETTINGS | files | held_out | dict(steps=6, probe_times=3)))
    return place / "out"
