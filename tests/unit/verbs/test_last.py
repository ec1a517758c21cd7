"""run:last is the newest run that has what is asked for, whatever was done since."""

import luthier
from luthier.core.run import find_run

ROWS = [{"text": f"{word} {at}", "label": word} for at in range(12) for word in ("good", "bad")]


def test_a_model_is_judged_used_and_tuned_on_as_the_last_run(runs):
    settings = {"model": "mini", "data": ROWS, "objective": "classify", "epochs": 1}
    first = luthier.tune(name="first", **settings)
    judged = luthier.evaluate(model="run:last", data=ROWS, name="judged")
    assert first.id == "first" and judged.id == "judged" and find_run("run:last") == runs / "judged"
    again = luthier.evaluate(model="run:last", data=ROWS)
    assert again.metrics == judged.metrics
    luthier.tune(name="second", **{**settings, "model": "run:last"})
    assert "model: run:first" in (runs / "second" / "config.yaml").read_text()
