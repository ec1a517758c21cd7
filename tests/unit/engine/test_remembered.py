"""A tuned model writes what it learned in fewer passes, through the commands that people use."""

import json

import luthier
from luthier.core.run import find_run


def test_a_run_guesses_from_the_rows_that_it_learned(tmp_path, runs):
    rows = tmp_path / "rows.jsonl"
    answer = "The capital of France is Paris, and it lies on the Seine."
    rows.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"What is it, {at}?"},
                        {"role": "assistant", "content": answer},
                    ]
                }
            )
            + "\n"
            for at in range(12)
        )
    )
    record = luthier.tune(
        model="mini", data={"train": str(rows), "split": {"validation": 0.2}}, steps=30, batch_size=4, learning_rate=1e-3,
        baselines=False, adapter="full",
    )  # fmt: skip
    assert (find_run(f"run:{record.id}") / "artefacts" / "learned.npy").is_file()
    found = luthier.generate(model=f"run:{record.id}", prompt="What is it, 3?", sampling={"max_tokens": 40})[0]
    assert found["output"] == answer
    assert found["guessed"]["accepted"] >= 10
    events, asked = [], tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"text": "What is it, 3?"}) + "\n")
    (row,) = luthier.generate(
        model=f"run:{record.id}", input=str(asked), sampling={"max_tokens": 40}, sinks=[events.append]
    )
    # What follows from the machine's speed stands in no row.
    assert row["output"] == answer and "guessed" not in row
    assert next(one["value"] for one in events if one.get("name") == "guesses").endswith(" right")
    judged = luthier.evaluate(model=f"run:{record.id}", data=str(rows))
    events = (find_run(f"run:{judged.id}") / "events.jsonl").read_text().splitlines()
    assert any("tokens a pass" in json.loads(line).get("why", "") for line in events)
