"""A few fixed texts beside a model: rendered again when it is loaded, and an error when they come out otherwise."""

import shutil

import pytest

from luthier.core.errors import ModelError
from luthier.core.types import Chat, Message
from luthier.models.load import load_model
from luthier.models.save import save_model
from luthier.text.golden import GOLDEN_FILE, TURNS, find_difference, make_golden, read_golden, render_again
from luthier.text.render import Renderer
from luthier.text.template import Template, choose_template
from tiny import ALL_FAMILIES, CHATML, FAMILIES, kind_of, tiny_model, tiny_tokenizer

DATED = "{{ '<|im_start|>system\\nToday is ' + strftime_now('%d %B %Y') + '.<|im_end|>\\n' }}" + CHATML
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML


def make(template: str | Template = "auto", family: str = "qwen2", **settings) -> Renderer:
    tokenizer = tiny_tokenizer(family)
    chosen = template if isinstance(template, Template) else choose_template(tokenizer, template)[0]
    return Renderer(tokenizer, kind="decoder", template=chosen, max_length=settings.pop("max_length", 500), **settings)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("task", [None, "classify"])
def test_every_family_reads_its_own_files_as_it_was_saved(family, task, tmp_path):
    loaded = load_model(str(tiny_model(family)), task=task, labels=("a", "b") if task else ())
    save_model(loaded, tmp_path / "model")
    golden = read_golden(tmp_path / "model")
    forms = [sample.form for sample in golden.samples]
    written = {"decoder": ["conversation", "prompt"], "encoder": [], "encoder-decoder": ["answer"]}[kind_of(family)]
    if task and kind_of(family) == "decoder":
        written = []
    assert forms == ["text", "pair", *written] and all(sample.ids for sample in golden.samples)
    again = load_model(str(tmp_path / "model"))
    assert find_difference(make_golden(again.renderer), golden) is None


@pytest.mark.parametrize("family", FAMILIES["decoder"])
@pytest.mark.parametrize("template", ["auto", "plain"])
def test_a_conversation_is_kept_as_training_and_inference_render_it(family, template):
    renderer = make(template, family)
    whole, prompt = make_golden(renderer).samples[-2:]
    turns = tuple(Message(role, content) for role, content in TURNS)
    assert whole.ids == renderer.chat(Chat("t:1", turns)).ids
    assert prompt.ids == renderer.prompt(turns[:-1]) == whole.ids[: len(prompt.ids)]
    assert "咖啡馆" in whole.text and "café" in whole.text


def test_roles_that_a_template_refuses_are_left_out():
    golden = make_golden(make(Template("strict", NO_SYSTEM)))
    assert [role for role, _ in golden.samples[2].given] == ["user", "assistant", "user", "assistant"]


def test_the_day_and_the_length_change_nothing():
    short, long = make(Template("dated", DATED), max_length=5, truncate=True), make(Template("dated", DATED))
    golden = make_golden(long)
    assert "Today is 2000-01-01." in golden.samples[2].text
    assert make_golden(short) == golden == render_again(short, golden)
    assert "2000-01-01" not in long.render([Message("user", "hi")])[0]


def test_a_damaged_record_is_one_sentence(tmp_path):
    save_model(load_model(str(tiny_model("bert"))), tmp_path / "model")
    (tmp_path / "model" / GOLDEN_FILE).write_text("{")
    with pytest.raises(ModelError, match="cannot be read as a record of how the model reads text"):
        load_model(str(tmp_path / "model"))


def test_a_model_from_elsewhere_is_not_checked(tmp_path):
    shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    assert read_golden(tmp_path / "model") is None
    load_model(str(tmp_path / "model"))
