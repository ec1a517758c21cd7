"""Scores of continuations are those of reading each prompt with each continuation by itself, however much is shared."""

import math
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.core.errors import ConfigError, DataError, ModelError
from luthier.core.events import Events
from luthier.core.types import Chat, Message
from luthier.engine import scoring
from luthier.engine.engine import Engine
from luthier.engine.labelling import Labelling
from luthier.engine.labels import Labeller, ask_for
from luthier.engine.sampling import Sampling
from luthier.engine.scoring import Scorer
from luthier.models import trees
from luthier.models.adapters import ADAPTERS
from luthier.models.load import load_model
from luthier.models.pages import writes_by_pages
from luthier.text.labels import Ask, LabelRenderer
from tiny import CONTEXT, FAMILIES, tiny_loaded, tiny_model, tiny_tokenizer

TEXTS = ("Win a free prize now!", "Ok, see you at seven.", "房间很干净", "x")
# Labels that begin alike, one that is the beginning of another, and one of several tokens.
ANSWERS = ((7, 8, 1), (7, 1), (7, 8, 9, 1), (30,), (7, 8))
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": CONTEXT,
}  # fmt: skip
# What narrows or bends the attention: windows, soft-caps, sinks.
BENT = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "bloom": {"n_layer": 2, "n_head": 4},
}  # fmt: skip


def prompts(start=40, sizes=(3, 1, 20, 33), seed=0):
    """Prompts that begin alike."""
    draw = random.Random(seed)
    one = lambda size: [draw.randrange(5, 390) for _ in range(size)]  # noqa: E731
    head = one(start)
    return [head + one(size) for size in sizes]


@torch.no_grad()
def score_naively(model, prompt, answer):
    """Sum of log p of an answer: one whole forward of the family's own."""
    model.module.eval()
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logs = model.module(input_ids=ids).logits[0].float().log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(answer))


def assert_right(model, asked, found, tolerance=2e-4):
    for (prompt, answers), scores in zip(asked, found, strict=True):
        for answer, one in zip(answers, scores, strict=True):
            assert one.tokens == len(answer)
            assert one.log_prob == pytest.approx(score_naively(model, prompt, answer), abs=tolerance * len(answer))
            assert one.per_token == one.log_prob / len(answer)


def ask_all(given, answers=ANSWERS):
    return [(prompt, answers) for prompt in given]


@pytest.mark.parametrize("family", FAMILIES["decoder"])
def test_scores_are_those_of_whole_sequences(family):
    model = tiny_loaded(family)
    asked = ask_all(prompts())
    assert_right(model, asked, Scorer(model).score(asked))
    assert_right(model, asked, Scorer(model).score(asked, tokens=30))


@pytest.mark.parametrize("family", BENT)
def test_windows_caps_and_sinks_are_those_of_the_family(family, tmp_path):
    tokenizer = tiny_tokenizer("llama")
    settings = {
        **SIZES,
        "vocab_size": 400,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        **BENT[family],
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, one in module.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                one.mul_(12)  # else all scores are near zero, where a cap changes nothing
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert writes_by_pages(model) == (family != "bloom")
    asked = ask_all(prompts())
    assert_right(model, asked, Scorer(model).score(asked))


def test_a_family_that_shares_no_prompts_reads_each_by_itself_and_says_so():
    model, events = load_model(str(tiny_model("gpt_neo"))), Events()
    asked = ask_all(prompts())
    assert_right(model, asked, Scorer(model).score(asked, events=events))
    assert "read again" in events.choices["shared prompts"]


def test_an_adapter_and_bfloat16_score_alike():
    model = tiny_loaded("llama")
    ADAPTERS.parse({"kind": "lora", "rank": 4}).apply(model)
    with torch.no_grad():
        for name, one in model.module.named_parameters():
            if name.endswith("lora_b"):
                one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    asked = ask_all(prompts())
    assert_right(model, asked, Scorer(model).score(asked))
    half = tiny_loaded("qwen3", dtype="bfloat16")
    assert_right(half, asked, Scorer(half).score(asked), tolerance=5e-2)


def count_tokens(monkeypatch):
    """The tokens of each pass of a scorer from now on."""
    read, seen = trees.read_trees, []

    def tell(model, some, trunk, **options):
        seen.append(sum(len(one.ids) for one in some))
        return read(model, some, trunk, **options)

    monkeypatch.setattr(trees, "read_trees", tell)
    monkeypatch.setattr(scoring, "read_trees", tell)
    return seen


def test_what_prompts_and_answers_begin_with_is_read_once(monkeypatch):
    model, seen = tiny_loaded("llama"), count_tokens(monkeypatch)
    scorer = Scorer(model)
    asked = ask_all(prompts())
    scorer.score(asked)
    # 7 and 7 8 and 7 8 9 lead to a last token, which itself is not read.
    assert seen == [40, 3 + 1 + 20 + 33 + 3 * len(asked)]
    seen.clear()
    (other,) = prompts(sizes=(5,), seed=0)
    assert other[:40] == asked[0][0][:40]
    assert_right(model, ask_all([other, asked[1][0]]), scorer.score(ask_all([other, asked[1][0]])))
    assert seen == [other_left(other, asked[1][0]) + 2 * 3], "the beginning was kept"
    seen.clear()
    strange = ask_all(prompts(seed=9))
    assert_right(model, strange, scorer.score(strange))
    assert seen[0] == 40, "another beginning takes its place"


def other_left(*some):
    return sum(len(one) - 40 for one in some)


def test_long_trunks_and_many_scores_are_read_in_pieces(monkeypatch):
    model = tiny_loaded("llama")
    asked = ask_all(prompts())
    monkeypatch.setattr(trees, "PIECE", 7)
    monkeypatch.setattr(trees, "SCORES", 3000)
    monkeypatch.setattr(scoring, "ROWS", 2)
    assert_right(model, asked, Scorer(model).score(asked))


def test_equal_prompts_one_prompt_and_prompts_that_share_nothing():
    model = tiny_loaded("qwen3")
    scorer = Scorer(model)
    same, alone, apart = prompts(sizes=(0, 0)), prompts(sizes=(9,)), prompts(start=0)
    for given in (same, alone, apart, alone):
        assert_right(model, ask_all(given), scorer.score(ask_all(given)))
    assert scorer.score([]) == [] and scorer.score([(same[0], ())]) == [[]]


def test_an_engine_scores_between_its_steps():
    model = tiny_loaded("llama")
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    engine, other = Engine(model, 1024), Engine(model, 1024)
    request, right = (one.add(prompts()[0], Sampling(max_tokens=12)) for one in (engine, other))
    other.run()
    engine.step()
    assert_right(model, ask_all(prompts()[:1]), [engine.score(prompts()[0], ANSWERS)])
    engine.run()
    assert request.written == right.written
    assert_right(model, ask_all(prompts()), engine.score_all(ask_all(prompts())))


def test_what_cannot_be_scored_is_refused():
    model = tiny_loaded("llama")
    scorer = Scorer(model)
    with pytest.raises(DataError, match="one token at least"):
        scorer.score([([], [[5]])])
    with pytest.raises(DataError, match="one token at least"):
        scorer.score([([5], [[5], []])])
    with pytest.raises(DataError, match=f"have {CONTEXT + 1} tokens, and the context is {CONTEXT}"):
        scorer.score([([5] * CONTEXT, [[5]])])
    with pytest.raises(ModelError, match="made to seq2seq"):
        Scorer(tiny_loaded("t5"))


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_a_label_is_the_answer_as_it_would_be_learned(family):
    model = tiny_loaded(family)
    ask = Ask(("good", "go", "bad one"), "What is it?", [("fine", "good")])
    for text in TEXTS:
        prompt, labels = LabelRenderer(model.renderer, ask).render(text, "a")
        turns = (
            Message("user", "What is it?\n\nfine"),
            Message("assistant", "good", weight=0.0),
            Message("user", text),
        )
        for label, ids in zip(ask.labels, labels):
            learned = model.renderer.chat(Chat("a", (*turns, Message("assistant", label))))
            end = max(at for at, weight in enumerate(learned.weights) if weight)
            assert (*prompt, *ids) == learned.ids[: end + 1]
            assert ids[-1] in model.spec.stop_ids
        assert len({ids[0] for ids in labels}) > 1


def test_a_token_across_the_seam_belongs_to_the_label(tmp_path):
    path = tmp_path / "tight.jinja"
    path.write_text(
        "{%- for turn in messages -%}{{- 'Q:' ~ turn.content ~ ' ' if turn.role == 'user' else 'A: ' ~ turn.content ~ eos_token "
        "-}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'A: ' -}}{%- endif -%}"
    )
    model = load_model(str(tiny_model("gpt2")), template=str(path))
    ids = lambda text: tuple(model.tokenizer(text)["input_ids"])  # noqa: E731
    prompt, labels = LabelRenderer(model.renderer, Ask(("the", "quick"), "")).render("x", "a")
    assert ids("Q:x A: ") + ids("the") != ids("Q:x A: the"), "the tokenizer joins the space and the label"
    assert prompt == ids("Q:x A:")
    assert [(*prompt, *one) for one in labels] == [ids(f"Q:x A: {one}<|endoftext|>") for one in ("the", "quick")]


def shares_naively(model, text, labels, instruction, *, prior=None, per_token=False):
    found = []
    for label in labels:
        turns = [Message("user", f"{instruction}\n\n{text}"), Message("assistant", label)]
        prompt = model.renderer.prompt(turns[:1])
        ids = model.renderer.render(turns)[1]
        end = max(at for at, token in enumerate(ids) if token in model.spec.stop_ids)
        answer = ids[len(prompt) : end + 1]
        assert ids[: len(prompt)] == prompt
        value = score_naively(model, prompt, answer)
        found.append(value / len(answer) if per_token else value)
    weights = [math.exp(one) / (1 if prior is None else prior[at]) for at, one in enumerate(found)]
    return [one / sum(weights) for one in weights]


@pytest.mark.parametrize("settings", [{}, {"per_token": True}, {"calibrate": True}], ids=str)
def test_probabilities_are_shares_of_whole_answers(settings):
    model, labels = tiny_loaded("qwen3"), ("spam", "ham", "something else")
    naive = lambda text, **more: shares_naively(  # noqa: E731
        model, text, labels, ask_for(labels), per_token=settings.get("per_token", False), **more
    )
    prior = None
    if "calibrate" in settings:
        empty = [naive(text) for text in ("N/A", "[MASK]", "")]
        prior = [sum(column) / 3 for column in zip(*empty)]
    found = Labeller(model, labels, Labelling(**settings)).predict(list(zip("abcd", TEXTS)))
    for text, one in zip(TEXTS, found):
        right = naive(text, prior=prior)
        assert list(one.probabilities.values()) == pytest.approx(right, rel=1e-3)
        assert one.output == labels[max(range(3), key=lambda at: right[at])]
    assert [one.id for one in found] == list("abcd")


def test_shots_and_conversations_are_turns_before_the_label():
    ask = Ask(("a", "b"), "Which?", [("one", "a")])
    turns = ask.about([Message("system", "Be brief."), Message("user", "two")])
    assert [(one.role, one.content) for one in turns] == [
        ("system", "Be brief."),
        ("user", "Which?\n\none"),
        ("assistant", "a"),
        ("user", "two"),
    ]
    assert Ask(("a", "b"), "Which?", [("one", "a")], raw=True).about("two") == "Which?\n\none\na\n\ntwo\n"


def test_texts_that_are_too_long_are_refused_or_cut_and_counted():
    model = tiny_loaded("qwen3")
    long = "the lazy dog " * 60
    with pytest.raises(DataError, match=r"^a: \d+ tokens do not fit in 128"):
        Labeller(model, ("good", "bad")).predict([("a", long)])
    model, events = load_model(str(tiny_model("qwen3")), truncate=True), Events()
    found = Labeller(model, ("good", "bad"), Labelling(instruction="Say."), events=events).predict(
        [("a", long), ("b", "short")]
    )
    assert len(found) == 2 and events.warnings == {"texts were cut at their end to fit the context": 1}
    with pytest.raises(DataError, match="leave no room"):
        Labeller(model, ("good", "bad"), Labelling(instruction=long)).predict([("a", long)])


def test_a_shot_with_another_label_is_refused():
    with pytest.raises(ConfigError, match="the label 'so-so' of 'fine' is not among the labels good, bad"):
        Labeller(tiny_loaded("qwen3"), ("good", "bad"), shots=[("fine", "so-so")])
