"""Sentences say what their tables carry."""

import pandas as pd
import pytest
from test_recall import rows_of

import findings
import recall


def test_a_word_is_what_an_interval_carries():
    word = lambda low, high, seeds=5: findings.word(low, high, seeds, "more", "less", least=5)  # noqa: E731
    assert (word(1, 2), word(-2, -1), word(-1, 1), word(0, 0)) == ("more", "less", *["no difference shown"] * 2)
    assert word(1, 2, seeds=4) == "no verdict from 4 of 5 seeds" and "without an interval" in word(1, 1)
    assert findings.over_seeds([2.0]) == "2.00, one seed"
    assert findings.over_seeds([1.0, 2.0, 3.0], ".1f") == "2.0 [-0.5, 4.5] over 3 seeds"


def trained(arm, losses, right, **more):
    """Rows of `language`: one of its text and one of needles for each seed."""
    rows = []
    for seed, (loss, accuracy) in enumerate(zip(losses, right, strict=True)):
        common = dict(parameters=10, last_loss=3.0, beta=0.2, log_decay=0.0, shut=0.5, **more)
        rows.append(dict(common, arm=arm, seed=seed, test="language", loss=loss))
        for test in ("near", "far"):
            found = rows_of(arm, [accuracy if test == "near" else accuracy / 2], test=test)[0]
            rows.append(found | common | dict(seed=seed))
    return rows


ROWS = pd.DataFrame(
    trained("soft, language alone", [4.0, 5.0, 6.0], [0, 0, 0])
    + trained("soft, weight 0.05", [4.04, 5.05, 6.07], [1.0, 1.0, 0.995])
    + trained("soft, weight 1", [5.0, 6.2, 7.5], [1.0, 1.0, 1.0])
    + trained("hard, language alone", [4.0, 5.0, 6.0], [0, 0, 0])
    + trained("hard, weight 1", [4.0, 5.0, 6.0], [0.9, 0.9, 0.9])
    + trained("no memory, language alone", [4.4, 5.5, 6.7], [0, 0, 0])
)


def test_the_price_of_needles():
    gates = ROWS[~ROWS["arm"].str.startswith("no memory")]
    curves = {test: recall.trade_off(gates, test) for test in ("near", "far")}
    said = findings.price({"near": curves["near"]}, least=3)
    assert "3 of 3 arms with needles have 3 seeds" in said and "higher than alone in 2 of them, lower in 0" in said
    assert "99% of the needles, near, in 2; in 1 of those the loss is at most 2% higher" in said
    assert "Soft, weight 0.05: loss 5.053 against 5.000 nats (+1.06%" in said
    assert "Soft, weight 0.05" in said and "(99.5% in the worst of 3 seeds)" in said
    assert "near and far, in 0; in 0 of those" in findings.price(curves, least=3)
    assert "claimed" in findings.price({}, least=3)


def test_what_is_left_further_away():
    distant = recall.lost(ROWS[ROWS["arm"].str.contains("weight")], "far", near="near")
    rivals = recall.differences(ROWS, {"hard, weight 1": "soft, weight 1"})
    said = findings.distance(distant, rivals, least=3)
    assert "of 3 arms with 3 seeds 0 still give back 99%" in said and said.count("without an interval") == 2
    assert "Soft, weight 0.05: 49.9% [" in said and "needles are lost on the way" in said
    assert "Hard, weight 1, beside soft, weight 1: -5.0 points" in said and "beside soft, weight 1: -10" not in said
    assert "claimed" in findings.distance(pd.DataFrame(), pd.DataFrame(), least=3)


def test_gates_that_are_shut():
    rows = ROWS.copy()
    rows.loc[rows["arm"] == "hard, weight 1", "shut"] = [0.7, 0.7, 0.7, 0.8, 0.8, 0.8, 0.75, 0.75, 0.75]
    said = findings.shut(rows, "hard", weight=1, least=3)
    assert "50.00% [50.00%, 50.00%] over 3 seeds" in said and "+25.00 points" in said
    assert said.endswith("**needles keep them shut more often**.")
    assert "claimed" in findings.shut(rows, "none", weight=1, least=3)
    assert "claimed" in findings.shut(rows[:0], "hard", weight=1, least=3)


def test_orders_and_the_worth_of_a_memory():
    losses = recall.losses(ROWS, than="soft, language alone")
    right = recall.summary(ROWS[ROWS["test"] == "near"])
    said = findings.orders(losses, right, than="soft, language alone", least=3)
    assert "soft, language alone: 5.000 nats, 0.0% [" in said and "soft, weight 1: 6.233 nats" in said
    assert said.count("worse for text") == 3 and said.count("no difference shown") == 2
    assert "claimed" in findings.orders(losses[:0], right, than="soft, language alone", least=3)
    alone = ROWS[ROWS["arm"].str.endswith("alone")].copy()
    alone.loc[alone["arm"].str.startswith("no memory"), "parameters"] = 9
    said = findings.worth(
        recall.losses(alone, than="no memory, language alone"), than="no memory, language alone", least=3
    )
    assert "(10.0% fewer parameters) stands at 5.533 nats" in said and said.count("**better than without**") == 2
    assert "claimed" in findings.worth(pd.DataFrame(), than="no memory, language alone", least=3)


def test_a_line_without_a_verdict_stays_without():
    two = ROWS[ROWS["seed"] < 2]
    said = findings.worth(
        recall.losses(two, than="no memory, language alone"), than="no memory, language alone", least=3
    )
    assert "no verdict from 2 of 3 seeds" in said
    assert pytest.approx(0.5) == recall.lost(ROWS, "far", near="near")["accuracy"].max()
