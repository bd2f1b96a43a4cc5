"""The commands of experiments, as train.py and eval.py read them."""

import eval as evaluation
from rmt.config.config import parse


def understood(jobs):
    """Read the commands of all jobs; return name -> config of train.py, and -> modes of eval.py.

    A job comes after those it needs, and its evaluations are written into its folder.
    """
    configs, before, asked = {}, set(), {}
    for job in jobs:
        assert set(job.needs) <= before, "a job comes after those it needs"
        before.add(job.out)
        for script, *flags in job.commands():
            if script == "train.py":
                configs[job.out.name] = parse(flags, "", "")
            else:
                _, options = evaluation.read_arguments(flags)
                assert options.json.startswith(str(job.out))
                asked.setdefault(job.out.name, []).append(options.mode)
    assert len(before) == len(jobs), "a folder of its own to each"
    return configs, asked
