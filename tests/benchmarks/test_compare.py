"""The comparison's lines, tables, curves and shards: known values in, known text out. No JVM."""

from __future__ import annotations

import itertools
import types

import algorithms as compare
import numpy as np
import pytest
import torch
from algorithm_parts import contenders, fits, mixed, plots, results, tables, text, text_data, text_loop, text_model

from sparkdeep.algorithms import ALGORITHMS
from sparkdeep.spark.fit.settings import FitSettings


def run(name="averaging", seed=0, losses=(2.0, 1.0), accuracy=0.5, part="digits"):
    curve = [
        results.Point(rows=100 * i, megabytes=1.5 * i, seconds=2.0 * i, loss=loss, accuracy=accuracy)
        for i, loss in enumerate(losses, 1)
    ]
    return results.Run(part=part, name=name, seed=seed, rounds=4, settings="inner 0.1", curve=curve)


def test_runs_are_read_back_and_the_newest_of_a_seed_counts(tmp_path):
    assert results.read(tmp_path, "digits") == []
    first, other, again = run(), run(seed=1), run(losses=(2.0, 0.5))
    for one in (first, other, again):
        results.append(one, tmp_path)
    assert results.read(tmp_path, "digits") == [again, other]
    assert results.by_name([first, run("bmuf"), other]) == {"averaging": [first, other], "bmuf": [run("bmuf")]}


def test_a_part_becomes_a_table_in_the_order_that_is_asked_for():
    runs = [run("b"), run("a", 0, accuracy=0.4), run("a", 1, (2.0, 2.0), accuracy=0.6)]
    assert tables.part_table("digits", runs, ["a", "absent", "b"]).splitlines() == [
        "## Digits",
        "",
        "| algorithm | accuracy | loss | rounds | rows | MB | s | seeds | settings |",
        "|---|---|---|---|---|---|---|---|---|",
        "| a | 0.5000 ± 0.1414 | 1.500 ± 0.707 | 4 | 200 | 3 | 4 | 2 | inner 0.1 |",
        "| b | 0.5000 | 1.000 | 4 | 200 | 3 | 4 | 1 | inner 0.1 |",
    ]
    unscored = tables.part_table("text", [run(accuracy=None, part="text")])
    assert "accuracy" not in unscored
    assert "| averaging | 1.000 |" in unscored


def test_the_loss_is_told_against_another_by_seeds_that_both_have():
    runs = [run("a", 0, (1.0,)), run("a", 1, (3.0,)), run("b", 0, (2.0,)), run("b", 1, (2.0,)), run("a", 2)]
    assert tables.against(runs, "a", "b") == [-0.5, 0.5]
    assert tables.reached(runs[-1], 1.0, lambda one, place: one.curve[place].seconds) == 4.0
    assert tables.reached(runs[-1], 0.9, lambda one, place: one.curve[place].seconds) is None


def test_curves_are_means_over_seeds_as_far_as_all_go():
    places, losses = plots.mean_curve([run(losses=(2.0, 1.0, 0.5)), run(losses=(4.0, 3.0))], "megabytes")
    assert places == [1.5, 3.0]
    assert losses == [3.0, 2.0]


def test_the_curve_counts_bytes_both_ways_and_neither_scoring_nor_opening():
    def record(**more):
        values = {"rows": 10, "sent_bytes": 1_000_000, "received_bytes": 500_000, "seconds": 3.0}
        values |= {"validation_seconds": 0.5, "stage_seconds": 1.5, "metrics": {}}
        return types.SimpleNamespace(**values | more)

    curve = fits.curve_of([record(), record(metrics={"loss": 0.25, "accuracy": 0.75}, stage_seconds=0.0)])
    assert curve == [results.Point(rows=20, megabytes=3.0, seconds=3.5, loss=0.25, accuracy=0.75)]


def test_every_preset_is_a_contender_whose_settings_can_be_meant():
    made = {name: contenders.settings_of(one, contenders.grid(one)[0]) for name, one in contenders.CONTENDERS.items()}
    assert {settings["algorithm"].name for settings in made.values()} >= set(ALGORITHMS)
    for settings in made.values():
        preset = settings["algorithm"].settings
        FitSettings.of({"model": torch.nn.Linear(1, 1), "loss": torch.nn.MSELoss(), "feature_cols": ["x"],
                        "label_cols": "y",
                        "num_workers": settings["num_workers"], **preset})  # fmt: skip
    for rates in contenders.TUNED.values():
        assert list(rates) == list(contenders.CONTENDERS)
        assert all(pair in contenders.grid(contenders.CONTENDERS[name]) for name, pair in rates.items())


def test_shards_of_mixed_data_hold_every_row_once():
    labels = np.repeat(np.arange(10), 40)[np.random.default_rng(0).permutation(400)]
    for deal in (mixed.shards_by_label, mixed.shards_of_unlike_sizes):
        shards = deal(labels, 1)
        assert len(shards) == fits.REPLICAS
        assert sorted(np.concatenate(shards)) == list(range(400))
    assert [sorted(set(labels[shard])) for shard in mixed.shards_by_label(labels, 1)] == [
        [0, 1, 2], [2, 3, 4], [5, 6, 7], [7, 8, 9],
    ]  # fmt: skip
    assert [len(shard) for shard in mixed.shards_of_unlike_sizes(labels, 1)] == [240, 100, 40, 20]


def test_text_is_encoded_without_loss_but_for_foreign_characters():
    codes = text_data.encoded("def f():\n    return 'é'\t")
    assert codes.dtype == np.uint8
    assert codes[-2] == text_data.encoded("'")[0]
    assert codes[-1] == codes.max() == text_data.VOCABULARY - 1
    assert len(set(text_data.encoded(text_data._KNOWN))) == text_data.VOCABULARY - 1


def test_windows_overlap_in_one_character_and_files_are_not_shared():
    found = text_data.load_text(32, 16)
    assert found.train.shape[1] == 33
    assert found.held_out.shape == (16, 33)
    assert (found.train[1:100, 0] == found.train[:99, -1]).all()
    # As many windows as a run of the job trains on.
    assert len(found.train) > 4 * text_loop.Size().steps * text_loop.Size().batch_size


def test_the_gpt_has_a_million_parameters_and_does_not_look_ahead():
    torch.manual_seed(0)
    model = text_model.GPT(**text_loop.Size().model())
    assert 1_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 4_000_000
    tokens = torch.randint(0, text_data.VOCABULARY, (2, 32))
    changed = tokens.clone()
    changed[:, 20:] = 0
    with torch.no_grad():
        scores, others = model(tokens), model(changed)
        loss = text_model.next_token_loss(scores, tokens)
    torch.testing.assert_close(scores[:, :20], others[:, :20])
    assert not torch.allclose(scores[:, 20:], others[:, 20:])
    assert float(loss) == pytest.approx(np.log(text_data.VOCABULARY), abs=0.1)


def test_the_rate_rises_and_falls():
    rates = [text_loop.rate_after(step, steps=100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert [text_loop.rate_after(step, steps=100, begun=40) for step in range(61)] == rates[40:]
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_notes_tell_the_loss_beside_synchronous_training_and_the_way_to_equal_loss():
    runs = [run(text.SYNCHRONOUS, losses=(2.0,), part="text"), run("DiLoCo", losses=(2.02,), part="text")]
    assert compare.notes("text", runs) == "\nDiLoCo: loss against synchronous AdamW, seed by seed: +1.0%.\n"
    runs = [run("x", 0, (0.5, 0.2), part="speeds"), run("x", 1, (0.5, 0.4), part="speeds")]
    assert compare.notes("speeds", runs) == "\nx: to a held-out loss of 0.3, seed by seed: 4.0 s, not reached.\n"
