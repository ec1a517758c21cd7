"""Pains of tuning that are about the text: templates, masks, the end of an answer, the beginning of a row."""

import io
import json
import shutil

import pytest
import torch
from torch import nn

from luthier.core.config import resolve
from luthier.core.errors import DataError, ModelError, RenderingError
from luthier.core.types import Chat, Message
from luthier.faces.cli.main import main
from luthier.models.load import load_model
from luthier.models.save import save_model
from luthier.text.golden import GOLDEN_FILE
from luthier.text.render import Renderer
from luthier.text.template import Template, choose_template
from luthier.verbs.evaluate import evaluate
from luthier.verbs.generate import generate
from luthier.verbs.prepare import show
from luthier.verbs.tune import Tune, encode_for, tune
from tiny import CHATML, tiny_model, tiny_tokenizer

ROWS = [{"prompt": "say a", "completion": "the quick fox"}, {"prompt": "say b", "completion": "the lazy dog"}]
ALL = {"split": {"validation": 0.0}}


def learn(model, rows=ROWS, **settings):
    values = {"model": str(model), "data": {"train": rows, **ALL}, "baselines": False, "name": "one", "seed": 1}
    quick = {"steps": 50, "learning_rate": 5e-3, "schedule": "constant", "batch_size": 2}
    return tune(resolve(Tune, values=values | quick | settings))


def with_files(family, path, **changes):
    """A copy of a tiny model with settings of its tokenizer changed."""
    shutil.copytree(tiny_model(family), path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | changes))
    return path


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_pain_03_a_tuned_model_stops(family, tmp_path):
    """Even where padding is the token that ends an answer: the mask goes by places, and the files say where to stop."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    end = tiny_tokenizer(family).eos_token
    data = {"train": ROWS[:1] * 2, "test": ROWS[:1]}
    record = learn(with_files(family, tmp_path / "model", pad_token=end), data=data)
    answer = generate(model="run:one", prompt="say a")[0]
    assert answer["output"] == "the quick fox" and answer["finish"] == "stop"
    assert not any("max_tokens" in text for text in record.warnings)
    # Other programs stop too: what ends a turn stands in generation_config.json.
    place = tmp_path / "runs" / "one" / "artefacts" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    ids = torch.tensor([load_model("run:one").renderer.prompt("say a")])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)[
        0, ids.shape[1] :
    ]
    assert len(made) < 40 and tokenizer.decode(made, skip_special_tokens=True) == "the quick fox"


def test_pain_03_a_template_that_ends_no_turn_is_refused_before_the_first_step(tmp_path, runs):
    path = tmp_path / "endless.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(ModelError, match="is no special token: the model could not learn to stop"):
        learn(tiny_model("qwen2"), template=str(path))
    assert not (runs / "one").exists()


def test_pain_03_rows_that_are_cut_teach_no_end(runs):
    """All of them cut: refused before the first step. Some: counted."""
    long = [{"prompt": "say c", "completion": "the quick brown fox " * 9}] * 2
    with pytest.raises(DataError, match="every row is cut before its answer ends, so the model would never stop"):
        learn(tiny_model("llama"), long, max_length=40, truncate=True)
    assert not (runs / "one").exists()
    record = learn(tiny_model("llama"), ROWS + long, max_length=40, truncate=True, steps=1)
    assert record.warnings["rows are cut before their answer ends, and do not teach the model to stop"] == 2


def test_pain_03_answers_that_do_not_end_are_counted():
    record = learn(tiny_model("llama"), data={"train": ROWS, "test": ROWS}, steps=1, learning_rate=1e-4)
    assert any("of 2 answers reached max_tokens without an end of their own" in text for text in record.warnings)


# What stock templates do: trim, rename roles, fold the system message into the user's, cut thinking out of earlier turns,
# write a date. None marks what the assistant says.
OPEN, CLOSE = "'<|im_start|>' + role + '\\n'", "'<|im_end|>\\n'"
LOOP = "{% for m in messages %}{% set role = ROLE %}{{ OPEN + CONTENT + CLOSE }}{% endfor %}"
TAIL = "{% if add_generation_prompt %}{{ '<|im_start|>' + NAME + '\\n' }}{% endif %}"


def stock(role="m.role", content="m.content", name="'assistant'"):
    loop = LOOP.replace("ROLE", role).replace("OPEN", OPEN).replace("CLOSE", CLOSE).replace("CONTENT", content)
    return loop + TAIL.replace("NAME", name)


STOCK = {
    "trims": stock(content="(m.content | trim)"),
    "renames": stock(role="'model' if m.role == 'assistant' else m.role", content="(m.content | trim)", name="'model'"),
    "cuts thinking": stock(content="(m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1])"),
    "dates": "{{ '<|im_start|>system\\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + stock(),
}
TURNS = [("user", " hi there "), ("assistant", "Hello, you"), ("user", "more"), ("assistant", "no")]


@pytest.mark.parametrize("template", STOCK)
@pytest.mark.parametrize("first", [0, 1])
def test_pain_04_exactly_what_the_assistant_says_is_learned(template, first, tmp_path):
    """Under templates that mark nothing, from the first turn on, with the end of each turn and nothing of the template."""
    path = tmp_path / "stock.jinja"
    path.write_text(STOCK[template])
    rows = [{"messages": [{"role": role, "content": text} for role, text in TURNS[first:]]}]
    row = show(model=str(tiny_model("qwen2")), data={"train": rows, **ALL}, template=str(path))[0]
    assert "".join(text for text, weight in row["tokens"] if weight) == "Hello, you<|im_end|>no<|im_end|>"


def test_pain_04_a_row_of_which_nothing_is_learned_is_an_error(runs):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    with pytest.raises(DataError, match="1 of 3 rows cannot be learned from: row 3: there is nothing to learn"):
        learn(tiny_model("llama"), [*[{"messages": [{**one, "weight": 1} for one in turns]}] * 2, {"messages": turns}])
    assert not (runs / "one").exists()


def test_pain_04_rows_are_shown_as_they_are_learned(tmp_path, capsys):
    """On the terminal, and in every run."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert main(["prepare", "show", str(path), "--model", str(tiny_model("qwen2"))]) == 0
    assert "⟦the quick fox<|im_end|>⟧" in capsys.readouterr().out
    learn(tiny_model("qwen2"), steps=1)
    sample = json.loads((tmp_path / "runs/one/artefacts/samples.jsonl").read_text().split("\n")[0])
    assert "".join(text for text, weight in sample["tokens"] if weight) == "the quick fox<|im_end|>"


@pytest.fixture
def read(monkeypatch):
    """The ids of every first look of a language model at a text, whoever asks it."""
    seen: list[tuple[int, ...]] = []

    def hook(module, args):
        if isinstance(module, nn.Embedding) and args[0].shape[-1] > 1:
            seen.append(tuple(args[0].flatten().tolist()))

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    yield seen
    handle.remove()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_pain_06_what_was_trained_is_what_every_verb_reads(family, read, monkeypatch, capsys):
    """The prompt of generate, evaluate and chat is the beginning of the training row, token for token."""
    learn(tiny_model(family), steps=1, template="auto")
    asked = resolve(Tune, values={"model": str(tiny_model(family)), "data": {"train": ROWS, **ALL}})
    from luthier.core.events import Events

    row = encode_for(asked, Events(), limit=1)[0][0]
    prompt = row.ids[: next(at for at, weight in enumerate(row.weights) if weight)]
    for ask in (
        lambda: generate(model="run:one", prompt="say a"),
        lambda: evaluate(model="run:one", data={"train": ROWS[:1]}),
        lambda: main(["chat", "run:one", "--max-tokens", "2"]),
    ):
        read.clear()
        monkeypatch.setattr("sys.stdin", io.StringIO("say a\n"))
        ask()
        # What comes after it may be guessed, and read with its end.
        assert any(ids[: len(prompt)] == prompt for ids in read)


def changes(path):
    spec, tokens = path / "luthier.json", path / "tokenizer_config.json"
    held = json.loads(spec.read_text())

    def template(text):
        (path / "chat_template.jinja").write_text(text)
        spec.write_text(json.dumps({**held, "template": {"name": "own", "source": text}}))

    def end():
        settings = json.loads(tokens.read_text())
        tokens.write_text(json.dumps({**settings, "eos_token": "<|endoftext|>"}))

    def merge():
        core = json.loads((path / "tokenizer.json").read_text())
        core["model"]["merges"] = core["model"]["merges"][:-40]
        (path / "tokenizer.json").write_text(json.dumps(core))

    return {
        "the template beside the tokenizer": lambda: (path / "chat_template.jinja").write_text(CHATML + "\n"),
        "both templates": lambda: template(CHATML.replace("'\\n' +", "'\\n\\n' +")),
        "the end": end,
        "the merges": merge,
    }


SAID = {
    "the template beside the tokenizer": "the chat template beside the tokenizer is not the one in luthier.json",
    "both templates": r"its chat template is another one: it writes '\\nAnswer briefly.* where it wrote 'Answer briefly",
    "the end": r"eos_token is '<\|endoftext\|>' and was '<\|im_end\|>'",
    "the merges": r"from token \d+ of a fixed text on it reads \[.*\] instead of \[",
}


@pytest.mark.parametrize("change", SAID)
def test_pain_06_a_model_that_reads_text_otherwise_is_refused(change, tmp_path):
    path = tmp_path / "model"
    save_model(load_model(str(tiny_model("qwen2"))), path)
    load_model(str(path))
    changes(path)[change]()
    with pytest.raises(RenderingError, match=SAID[change]) as caught:
        load_model(str(path), **({"task": "classify", "labels": ("a", "b")} if change == "the end" else {}))
    assert "\n" not in str(caught.value) and f"remove its {GOLDEN_FILE}" in str(caught.value)
    (path / GOLDEN_FILE).unlink()
    load_model(str(path))


@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
@pytest.mark.parametrize("template", ["plain", "{{ bos_token }}"])
def test_pain_07_a_row_begins_with_bos_once(family, template, tmp_path, read):
    """Whether the tokenizer puts it there, or the template, or both; in training and after it."""
    if template != "plain":
        path = tmp_path / "own.jinja"
        path.write_text(template + choose_template(tiny_tokenizer(family), "plain")[0].source)
        template = str(path)
    begin = tiny_tokenizer(family)("")["input_ids"]
    learn(tiny_model(family), steps=1, template=template)
    generate(model="run:one", prompt="say a")
    generate(model="run:one", prompt="say a", raw=True)
    texts = {"train": [{"text": "say a"}], **ALL}
    evaluate(model="run:one", data={"train": texts["train"]})
    learn("run:one", steps=1, objective="pretrain", data=texts, name="two")
    assert len(begin) == 1 and len(read) > 5
    starts = [ids for ids in read if ids[0] == begin[0]]  # others: what models are tried on when they are loaded
    assert len(starts) >= 5 and all(ids[1] != begin[0] for ids in starts)


def test_pain_07_two_beginnings_are_an_error():
    tokenizer = tiny_tokenizer("llama")
    template = Template("doubled", "{{ '<s><s>' }}" + choose_template(tokenizer)[0].source)
    with pytest.raises(DataError, match="begins with <s> twice"):
        Renderer(tokenizer, kind="decoder", template=template, max_length=500).chat(
            Chat("t:1", (Message("user", "a"), Message("assistant", "b")))
        )
