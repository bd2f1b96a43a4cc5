"""The cost model: operations, units and limits, what binds where, and this CPU's measurements."""

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from toy_forests import CONFIG, toy_trees

from benchmarks import cost_check, cost_model, cost_rates, plots
from benchmarks.cost_machines import GPUS, H100, H200, World, together
from benchmarks.cost_run import Text, binding, fitted, step, whole_run
from benchmarks.cost_terms import Flops, communication, decode_parts, update, weights, widths
from models.config import ASSETS, ModelConfig
from models.shapes import published
from models.transformer import Transformer
from rmt.config.config import Config
from rmt.engine.flops import forward_flops
from rmt.memory.autofit import described, fit
from rmt.memory.estimate import Case
from rmt.prompt import PromptIds

RESULTS = sorted((ASSETS.parent / "benchmarks" / "results").glob("cpu-*.json"))
TOY = ModelConfig.from_dict(CONFIG)
QWEN = published("qwen3-14b")
SMALL = published("qwen3-0.6b")
EVEN = Text(imbalance=1.0)
PARTS = ("weights", "cache", "logits", "arithmetic", "latency")


def test_operations_are_those_of_rmt_flops():
    trees = toy_trees()
    flops = Flops.of(TOY, trees)
    assert flops.products + flops.attention + flops.head == forward_flops(TOY, trees)
    targets = sum(t.trunk_targets + sum(len(b.response) for b in t.branches) for t in trees)
    assert flops.head == 2 * TOY.vocab_size * TOY.hidden_size * targets
    assert Flops.of(TOY, 3 * trees) == flops.times(3)
    layers, _, _ = weights(TOY)
    assert flops.products == 2 * layers * sum(map(len, trees)) and flops.attention > 0


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-0.6b", "qwen3-14b", "tiny"])
def test_weights_are_the_matrices_of_the_model(name):
    shape = published(name)
    with torch.device("meta"):
        model = Transformer(shape)
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.dim() == 2}
    layers, head, total = weights(shape)
    assert total == sum(matrices.values())
    assert layers == sum(count for n, count in matrices.items() if ".layers." in n)
    assert head == model.head.numel()


def test_twice_the_gpus_halve_the_arithmetic_and_prefill():
    few, many = (step(World(H200, n), QWEN, Config(), EVEN, 357)[0] for n in (8, 16))
    for term in ("prefill", "forward", "recompute", "head"):
        assert many[term] == pytest.approx(few[term] / 2, rel=1e-12)
    assert few["decode"] / 2 < many["decode"] < few["decode"]  # the longest response stays
    assert many["optimizer"] == few["optimizer"]  # replicas do not divide the shard


def test_one_gpu_sends_nothing_and_two_nodes_send_between_them():
    world, two = World(H200, 1), World(H200, 16)
    assert communication(world, SMALL) == 0 == world.gather_or_scatter(1e9, 10)
    assert step(world, SMALL, Config(), Text(), 100)[0]["communication"] == 0
    assert World(H200, 8).reduce_across(1e9, 10) == 0
    between = communication(two, SMALL) - communication(World(H200, 8), SMALL)
    assert between == pytest.approx(two.reduce_across(4 * weights(SMALL)[2] / 8, 29))


def test_links_have_the_units_of_a_ring():
    m = replace(H100, link=100e9, link_latency=1e-6, network=50e9, network_latency=1e-3)
    # 7/8 of 8 GB at 100 GB/s, and 7 hops a call; there and back of 3/4 of 1 GB at 50 GB/s.
    assert World(m, 8).gather_or_scatter(8e9, calls=5) == pytest.approx(0.07 + 35e-6)
    assert World(m, 32).reduce_across(1e9, calls=5) == pytest.approx(2 * 0.75 / 50 + 5 * 4e-3)


def test_what_hides_behind_what_is_between_longest_and_sum():
    assert together([3.0, 1.0, 2.0], 1.0) == 3
    assert together([3.0, 1.0, 2.0], 0.0) == 6
    assert together([3.0, 1.0, 2.0], 0.5) == 4.5


def brute_force(lengths, slots):
    """Active branches, and tokens said so far by them, step by step."""
    waiting, active = list(lengths), []
    while waiting or active:
        while waiting and len(active) < slots:
            active.append([waiting.pop(0), 0])
        yield len(active), sum(said + 0.5 for _, said in active)
        active = [[left - 1, said + 1] for left, said in active if left > 1]


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_slots_are_filled_as_they_fall_free(slots):
    lengths = [5, 1, 9, 2, 2, 7]
    expected, found = list(brute_force(lengths, slots)), list(widths(lengths, slots))
    assert [n for steps, n, _ in found for _ in range(steps)] == [n for n, _ in expected]
    own = sum(steps * said for steps, _, said in found)
    assert own == pytest.approx(sum(said for _, said in expected))


def test_decoding_reads_weights_in_every_step_and_computes_for_every_branch():
    m = replace(H100, flops=1e12, bandwidth=1e12, thin=1.0, attention=1.0, streaming=1.0)
    layers, head, _ = weights(QWEN)
    parts = decode_parts(m, QWEN, [10] * 6, 3, fork=0, prompt=0, shared=3)
    assert parts["weights"] == pytest.approx(20 * 2 * (layers + head) / 1e12)
    products = 60 * 2 * (layers + head) / 1e12
    own = 2 * 3 * sum(i + 0.5 for i in range(10))  # two waves of three branches
    pairs = own * 4 * QWEN.num_attention_heads * QWEN.head_dim * QWEN.num_hidden_layers / 1e12
    assert parts["arithmetic"] == pytest.approx(products + pairs)
    assert parts["cache"] == pytest.approx(own * 163840 / 1e12)  # 160 KiB a token
    assert parts["latency"] == pytest.approx(20 * 40 * H100.layer_seconds)
    # A trunk is read once for the three branches that share it.
    shared = decode_parts(m, QWEN, [10] * 6, 3, fork=100, prompt=0, shared=3)
    assert shared["cache"] - parts["cache"] == pytest.approx(20 * 100 * 163840 / 1e12)


def test_decoding_is_no_shorter_than_its_parts_and_no_longer_than_their_sum():
    for overlap in (0.0, 1.0):
        m = replace(H100, overlap=overlap)
        parts = decode_parts(m, QWEN, [50] * 64, 32, fork=300, prompt=20, shared=8)
        every = sum(parts[name] for name in PARTS)
        if overlap:
            assert max(parts[name] for name in PARTS) < parts["decode"] < every
        else:
            assert parts["decode"] == pytest.approx(every)


def test_a_micro_batch_more_sends_all_weights_once_more_and_recomputing_is_a_forward_pass():
    m, flops = replace(H100, hidden=0.0, layer_seconds=0.0), Flops.of(QWEN, toy_trees())
    one, two = (update(World(m, 8), QWEN, flops, n, recompute=True) for n in (1, 2))
    assert one["communication"] == pytest.approx(communication(World(m, 8), QWEN))
    for term in ("communication", "copies"):
        assert two[term] == pytest.approx(2 * one[term])
    assert one["recompute"] == pytest.approx(one["forward"] / 3)
    assert update(World(m, 8), QWEN, flops, 1, recompute=False)["recompute"] == 0


def test_communication_hides_behind_arithmetic_as_far_as_there_is_some():
    shorter = Config(tokens_per_micro_batch=1 << 13)
    for c in (Config(), shorter):
        bare, hidden = (
            step(World(replace(H100, hidden=share), 8), QWEN, c, Text(), 357)[0]["communication"]
            for share in (0.0, 1.0)
        )
        assert bare > 0.1 and hidden == 0
    slow = replace(H100, link=1e9, hidden=1.0)
    assert step(World(slow, 8), QWEN, Config(), Text(), 357)[0]["communication"] > 10


BINDING = {
    "weights of 14B, few branches": (H100, 8, QWEN, {}, 357, "decode: weights"),
    "memory is fast": (replace(H100, bandwidth=1e15, layer_seconds=1e-6), 8, QWEN, {}, 357,
                       "forward"),
    "links are slow": (replace(H100, link=1e9), 8, QWEN, {}, 357, "communication"),
    "storage is slow": (replace(H100, storage=1e7), 8, QWEN, {}, 357, "checkpoint"),
    "launches are slow": (replace(H200, layer_seconds=1e-3), 1, SMALL, {}, 357, "decode: latency"),
    "one 0.6B, many long branches": (H200, 1, SMALL, {"group_size": 64}, 800, "decode: cache"),
    "nothing is thought": (H200, 1, SMALL, {"group_size": 2}, 5, "forward"),
}  # fmt: skip


@pytest.mark.parametrize("case", BINDING)
def test_what_binds_changes_where_it_should(case):
    machine, gpus, shape, changes, thinking, expected = BINDING[case]
    found = step(World(machine, gpus), shape, replace(Config(), **changes), Text(), thinking)
    assert binding(*found) == expected


def test_lengths_have_the_mean_that_was_asked_for_and_a_tail_that_ends_at_the_limit():
    text = Text()
    lengths = text.lengths(400, 1000, 10**6, of_all=1000)
    assert sum(lengths) / 1000 == pytest.approx(426, rel=0.01)
    assert max(lengths) > 3 * 426 and max(text.lengths(800, 1000, 2048, 10**6)) == 2048
    assert max(text.lengths(400, 10, 10**6, 10**5)) > max(text.lengths(400, 10, 10**6, 10))
    assert set(replace(text, spread=0.0).lengths(400, 10, 2048, 10)) == {426}


def test_a_run_is_the_integral_of_its_schedule():
    world, steady = World(H200, 8), Config(budget_decay=1.0)
    found = whole_run(world, QWEN, steady, Text())
    assert found["steps"] == 316 and found["thinking"] == 800
    assert found["first"] == found["last"] == pytest.approx(found["seconds"])
    assert 3600 * found["hours"] == pytest.approx(316 * found["seconds"] + found["difficulty"])
    falling = whole_run(world, QWEN, Config(), Text())
    assert falling["thinking"] == pytest.approx(800 * 0.8 / 1.6094, rel=0.01)  # ∫ γ^u du
    assert falling["last"] < falling["seconds"] < falling["first"] == found["first"]
    assert sum(falling["terms"].values()) == pytest.approx(falling["seconds"])


def test_knobs_are_the_planner_s_and_what_does_not_fit_is_refused_with_numbers():
    choose = lambda gpus, **given: fitted(World(H100, gpus), QWEN, Config(**given), Text())
    prompt = PromptIds((0,) * Text().header, (0,) * Text().footer)
    planned = fit(Case(Config(), QWEN, torch.bfloat16, prompt, described(Config())))
    assert choose(8) == planned.config
    assert choose(8, max_branches=5, recompute="full").max_branches == 5
    with pytest.raises(ValueError, match=r"118.1 GB of optimizer state, .* What fits: --gpus 8"):
        choose(1)
    with pytest.raises(ValueError, match="12 devices are not whole nodes of 8; take 8"):
        World(H100, 12)


@pytest.fixture(scope="module")
def results():
    return cost_check.read(RESULTS)


def test_predictions_of_this_cpu_are_within_a_quarter_of_what_was_measured(results):
    found = {p.what.strip(): p for p in cost_check.predictions(results)}
    for what in ("rl_step, bfloat16", "its update", "rollout of 32 sequences, bfloat16",
                 "forest, packed, bfloat16"):  # fmt: skip
        assert found[what].close, found[what]
    assert len(found) == 32
    assert sum(p.close for p in found.values()) >= 26, cost_check.report(results)


def test_no_rate_is_taken_from_what_it_predicts(results):
    machines = [cost_check.machine_of(results, dtype) for dtype in cost_check.ITEMSIZE]
    doubled = copy.deepcopy(results)
    rows = [c["rows"][0] for c in doubled["rl_step"]["contests"]]
    rows += [c["rows"][0] for c in doubled["rollout"]["contests"] if c["sequences"] > 1]
    rows += [c["rows"][0] for c in doubled["forest"]["contests"] if c["dtype"] == "bfloat16"]
    for row in rows:
        for key in {"median", "rollout_seconds"} & row.keys():
            row[key] *= 2
    for point in doubled["scaling"]["points"]:
        for phase in ("rollout", "update"):
            point[phase]["median"] *= 2
    assert [cost_check.machine_of(doubled, dtype) for dtype in cost_check.ITEMSIZE] == machines
    for before, after in zip(*map(cost_check.predictions, (results, doubled))):
        assert after.predicted == before.predicted
        assert after.measured == pytest.approx(2 * before.measured)


def test_products_of_few_rows_are_used_where_they_were_measured(results, tmp_path, monkeypatch):
    file = tmp_path / "rates.json"
    words = ["cost_rates", "--model", "tiny", "--rounds", "1", "--threads", "1", "--rows", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(file)])
    cost_rates.main()
    few = json.loads(file.read_text())["products"]["float32"]
    layers, _, _ = weights(published("tiny"))
    assert (few["operations"], few["bytes"]) == (4 * layers, 4 * layers) and few["median"] > 0
    plain = cost_check.machine_of(results, "float32")
    slow = few | {"median": few["bytes"] / plain.bandwidth + few["operations"] / 50e9}
    measured = results | {"cost_rates": {"products": {"float32": slow}}}
    found = cost_check.machine_of(measured, "float32")
    assert found.thin * found.flops == pytest.approx(50e9)
    assert found.products == pytest.approx(plain.products, rel=0.05)
    assert cost_check.read([*RESULTS, file])["cost_rates"]["products"]["float32"] == few


def main_of(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["cost_model", *words])
    cost_model.main()


def test_tables_are_printed_and_written(tmp_path, monkeypatch, capsys):
    file = tmp_path / "cost.json"
    main_of(monkeypatch, "--model", "qwen3-0.6b", "--machine", "h200", "--gpus", "1",
            "--json", str(file))  # fmt: skip
    said, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "1 x H200, qwen3-0.6b" in said and "decode: cache" in said
    assert [row["value"] for row in found["growing"]["GPUs, 128 documents"]][-1] == 1024
    assert found["machines"].keys() == GPUS.keys() and found["text"]["documents"] == 4051
    assert found["guesses"]["thinking"] > 0.1 and all(v >= 0 for v in found["guesses"].values())
    if plots.drawn(file):
        assert file.with_suffix(".png").stat().st_size > 1000


def test_table_of_the_readme_is_the_model_s():
    page = (ASSETS.parent / "README.md").read_text(encoding="utf-8")
    for machine, gpus, model in cost_model.RUNS[:-1]:
        found = cost_model.paper(machine, gpus, model, Config())
        seconds = " / ".join(f"{found[name]:.0f}" for name in ("first", "seconds", "last"))
        hours = found["hours"]
        assert f"| {seconds} | {hours:.1f} | {hours * gpus:.0f} |" in page


def test_a_model_that_does_not_fit_has_a_reason_in_the_table(monkeypatch, capsys):
    main_of(monkeypatch, "--model", "qwen3-32b", "--machine", "h100", "--gpus", "1")
    assert "262.1 GB of optimizer state" in capsys.readouterr().out


def test_a_cpu_needs_measurements(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="add --measured benchmarks/results/cpu-"):
        main_of(monkeypatch, "--machine", "cpu")
    with pytest.raises(SystemExit, match="come from benchmarks/forest, whose file is missing"):
        main_of(monkeypatch, "--machine", "cpu", "--measured",
                *(str(path) for path in RESULTS if "rollout" in path.name))  # fmt: skip
    main_of(monkeypatch, "--machine", "cpu", "--measured", *map(str, RESULTS))
    assert "are within 25%" in capsys.readouterr().out
