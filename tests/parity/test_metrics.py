"""Our metrics against scikit-learn, scipy, sacrebleu and rouge-score on random answers."""

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn import metrics as theirs

from luthier.metrics import classification, regression
from luthier.metrics.scorers import SCORERS

LABELS = ["a", "b", "c", "never"]


@pytest.fixture(params=range(3))
def answers(request):
    random = np.random.default_rng(request.param)
    meant = random.choice(LABELS[:3], 200, p=[0.7, 0.2, 0.1]).tolist()
    said = [one if random.random() < 0.7 else str(random.choice(LABELS[:3])) for one in meant]
    return said, meant


@pytest.mark.parametrize("average", ["micro", "macro", "weighted"])
def test_classification(answers, average):
    said, meant = answers
    said_NC, meant_NC = classification.indicators(said, LABELS), classification.indicators(meant, LABELS)
    for ours, name in (
        (classification.precision, "precision"),
        (classification.recall, "recall"),
        (classification.f1, "f1"),
    ):
        value = getattr(theirs, f"{name}_score")(meant, said, average=average, zero_division=0)
        found = ours(said_NC, meant_NC, average)
        assert found.value == pytest.approx(value) and found.low <= found.value <= found.high
    assert classification.accuracy(said, meant).value == pytest.approx(theirs.accuracy_score(meant, said))
    table = theirs.confusion_matrix(meant, said, labels=LABELS)
    assert classification.confusion(said, meant, LABELS) == table.tolist()


def test_several_labels():
    random = np.random.default_rng(0)
    said_NC, meant_NC = random.random((80, 4)) > 0.6, random.random((80, 4)) > 0.5
    for average in ("micro", "macro", "weighted"):
        value = theirs.f1_score(meant_NC, said_NC, average=average, zero_division=0)
        assert classification.f1(said_NC, meant_NC, average).value == pytest.approx(value)


def test_roc_auc_with_ties():
    random = np.random.default_rng(0)
    positive = random.random(150) > 0.6
    scores = np.round(random.random(150) + 0.3 * positive, 1)
    found = classification.roc_auc(scores, positive)
    assert found.value == pytest.approx(theirs.roc_auc_score(positive, scores)) and found.low < found.value < found.high


def test_regression():
    random = np.random.default_rng(0)
    meant = random.normal(size=100)
    said = meant + random.normal(size=100)
    assert regression.mse(said, meant).value == pytest.approx(theirs.mean_squared_error(meant, said))
    assert regression.mae(said, meant).value == pytest.approx(theirs.mean_absolute_error(meant, said))
    found = stats.pearsonr(said, meant)
    ours = regression.pearson(said, meant)
    assert ours.value == pytest.approx(found.statistic)
    assert (ours.low, ours.high) == pytest.approx(tuple(found.confidence_interval(0.95)))
    assert regression.spearman(said, meant).value == pytest.approx(stats.spearmanr(said, meant).statistic)


SAID = [
    "the cat sat on the mat today",
    "a man is riding a red bicycle",
    "two dogs run",
    "the house is old and very big",
]
MEANT = ["the cat sat on the mat", "a man rides a red bicycle", "two dogs are running fast", "the house is old and big"]
CHINESE = (["今天天气很好，我们去公园吧。", "他不喜欢吃苹果。"], ["今天天气很好，我们去公园玩。", "他很喜欢吃苹果。"])


@pytest.mark.parametrize(("said", "meant", "tokenize"), [(SAID, MEANT, "13a"), (*CHINESE, "zh")])
def test_bleu_and_chrf(said, meant, tokenize):
    value = sacrebleu.corpus_bleu(said, [meant], tokenize=tokenize).score
    found = SCORERS.parse("bleu").estimate(said, meant)["bleu"]
    assert found.value == pytest.approx(value, rel=1e-9) and tokenize in found.method
    assert SCORERS.parse("chrf").estimate(said, meant)["chrf"].value == pytest.approx(
        sacrebleu.corpus_chrf(said, [meant]).score
    )


def test_rouge():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    found = SCORERS.parse("rouge").estimate(SAID, MEANT)
    for name, ours in found.items():
        value = np.mean([scorer.score(gold, said)[name].fmeasure for said, gold in zip(SAID, MEANT)])
        assert ours.value == pytest.approx(value, rel=1e-12)
    assert SCORERS.parse("rouge").estimate(*CHINESE)["rouge1"].value > 0.5
