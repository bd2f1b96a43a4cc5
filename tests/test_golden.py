"""A seeded run of three steps. A change of these numbers is a change of the method: say why."""

import pytest
from toy_runs import prepared, stepped

NAMES = ("loss/rl", "loss/ntp", "reward/mean", "update/grad_norm")
GOLDEN = [
    (-0.411942, 3.583636, 0.202604, 1.324872),
    (-0.449912, 3.557173, 0.286111, 1.194666),
    (-0.422099, 3.466152, 0.465, 0.841377),
]  # one line per step


def test_the_first_losses_of_a_seeded_run_stay_what_they_are(tmp_path):
    run, rows = prepared(tmp_path), []
    for step in range(3):
        rows.append(stepped(run, step)[0])
        run.step += 1
    given = [tuple(row[name] for name in NAMES) for row in rows]
    assert given == [pytest.approx(row, abs=1e-5) for row in GOLDEN]
