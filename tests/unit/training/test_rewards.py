"""Rewards: what they give, how they are written in settings, and what a mistake in a user's file says."""

import pytest
import torch

from luthier.core.config import resolve
from luthier.core.errors import ConfigError, TrainingError
from luthier.training.objectives.grpo import GRPO
from luthier.training.rewards.parse import parse_reward
from luthier.training.rewards.part import Answer
from luthier.verbs.tune import Tune, tune
from tiny import tiny_model

CPU = torch.device("cpu")


def answer(output: str = "Paris", tokens: int = 4, **other) -> Answer:
    return Answer("The capital of France?", output, "paris", tokens, **other)


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_a_scorer_is_a_reward_by_its_name():
    reward = parse_reward("exact_match")
    assert reward.name == "exact_match" and reward.weight == 1
    assert reward.score([answer(), answer("Rome")]) == [1.0, 0.0]
    heavy = parse_reward({"kind": "token_f1", "weight": 0.5})
    assert heavy.weight == 0.5 and heavy.score([answer("Paris, Paris")]) == [pytest.approx(2 / 3)]
    assert parse_reward(heavy.model_dump()) == heavy


def test_pattern_and_length():
    pattern = parse_reward({"kind": "pattern", "pattern": r"(?s)^<think>.*</think>\d+$"})
    assert pattern.score([answer("<think>a\nb</think>42"), answer("42")]) == [1.0, 0.0]
    length = parse_reward({"kind": "length", "tokens": 10})
    # whole up to 10, half way at 15, nothing from 20 on
    assert length.score([answer(tokens=count) for count in (1, 10, 15, 20, 90)]) == [1, 1, 0.5, 0, 0]


def test_one_reward_needs_no_list():
    assert [one.name for one in GRPO(rewards="chrf").rewards] == ["chrf"]
    assert [one.name for one in GRPO(rewards={"kind": "length", "tokens": 3}).rewards] == ["length"]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "rewards"),
        (["exact_mtch"], r"unknown reward 'exact_mtch'"),
        ([{"kind": "pattern", "pattern": "("}], r"'\(' is no regular expression"),
        ([{"kind": "length", "tokens": 0}], r"greater than 0"),
        ([{"kind": "exact_match", "wieght": 2}], r"wieght: no such setting"),
    ],
)
def test_mistakes_in_settings(rewards, message):
    with pytest.raises(ConfigError, match=message):
        GRPO.make({"rewards": rewards})


def test_a_function_takes_what_it_names(file):
    path = file(
        "def one(output):\n    return len(output)\n"
        "def all_of_it(prompt, output, gold, meta, extra=1):\n    return float(meta['level']) + (gold in output.lower())\n"
        "def open(output, **others):\n    return sorted(others) == ['gold', 'meta', 'prompt']\n"
    )
    for name, expected in (("one", 5), ("all_of_it", 3), ("open", 1)):
        reward = parse_reward({"kind": "python", "function": f"{path}:{name}"})
        reward.ready(CPU)
        assert reward.name == name and reward.score([answer(meta={"level": "2"})]) == [expected]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("x = 1", "reward", "holds no function 'reward'; it holds none"),
        ("def rewards(output): ...", "reward", "holds no function 'reward'; did you mean 'rewards'"),
        ("def reward(outputs): ...", "reward", "asks for 'outputs'; .* did you mean 'output'"),
        ("import nothing_of_the_kind", "reward", "cannot be run: ModuleNotFoundError: No module"),
    ],
)
def test_mistakes_in_a_file(file, text, name, message):
    reward = parse_reward({"kind": "python", "function": f"{file(text)}:{name}"})
    with pytest.raises(ConfigError, match=message):
        reward.ready(CPU)


@pytest.mark.parametrize(
    ("where", "message"), [("mine.py", "write FILE.py:NAME"), ("absent.py:reward", "absent.py: no such file")]
)
def test_a_file_that_is_not_there(where, message):
    with pytest.raises(ConfigError, match=message):
        parse_reward({"kind": "python", "function": where}).ready(CPU)


@pytest.mark.parametrize(
    ("body", "message"),
    [("return None", "returned None"), ("return float('nan')", "returned nan"), ("return 1 / 0", "ZeroDivisionError")],
)
def test_mistakes_while_it_runs(file, body, message):
    reward = parse_reward({"kind": "python", "function": f"{file('def reward(output): ' + body)}:reward"})
    reward.ready(CPU)
    with pytest.raises(TrainingError, match=f"{message}.*|failed on the answer 'Paris'.*{message}"):
        reward.score([answer()])


def test_a_tuned_model_is_a_reward():
    rows = [{"sentence1": "say", "sentence2": word * count, "score": float(count)} for word in "ab" for count in (1, 4)]
    values = {
        "model": str(tiny_model("llama")),
        "data": {"train": rows, "split": {"validation": 0.0}, "columns": {"text_pair": "sentence2"}},
        "steps": 60,
        "learning_rate": 5e-3,
        "batch_size": 4,
        "baselines": False,
        "name": "judge",
    }
    tune(resolve(Tune, values=values))
    reward = parse_reward({"kind": "model", "model": "run:judge"})
    reward.ready(CPU)
    short, long = reward.score([Answer("say", "a", "", 1), Answer("say", "aaaa", "", 4)])
    assert long - short > 1.5
    with pytest.raises(ConfigError, match="is made to causal; a reward is a number"):
        parse_reward({"kind": "model", "model": str(tiny_model("llama"))}).ready(CPU)
