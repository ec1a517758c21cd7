"""`mini` with templates whose calls are marked by special tokens, as Mistral's and Hermes' are."""

from luthier.models.load import load_model
from luthier.text.render import Renderer
from luthier.text.template import Template

HEAD = "{%- for m in messages -%}{{ '[' ~ m.role ~ ']' ~ '\\n' ~ (m.content or '') }}"
TAIL = "{{ eos_token ~ '\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '[assistant]\\n' }}{%- endif -%}"
TEMPLATES = {
    "list": HEAD
    + "{%- if m.tool_calls %}{{ '[TOOL_CALLS] [' }}{%- for c in m.tool_calls -%}"
    + "{%- if not c.id or c.id | length != 9 %}{{ raise_exception('ids of calls have nine letters') }}{% endif -%}"
    + '{{ \'{"name": "\' ~ c.function.name ~ \'", "arguments": \' ~ (c.function.arguments | tojson) '
    + "~ ', \"id\": \"' ~ c.id ~ '\"}' }}{%- if not loop.last %}{{ ', ' }}{% endif -%}{%- endfor -%}{{ ']' }}{%- endif -%}"
    + TAIL,
    "tags": HEAD
    + "{%- for c in m.tool_calls or [] -%}{%- if m.content or not loop.first %}{{ '\\n' }}{% endif -%}"
    + '{{ \'<tool_call>\\n{"name": "\' ~ c.function.name ~ \'", "arguments": \' ~ (c.function.arguments | tojson) '
    + "~ '}\\n</tool_call>' }}{%- endfor -%}"
    + TAIL,
}
MARKS = ("[TOOL_CALLS]", "<tool_call>", "</tool_call>")


def marked_model(name):
    """The model, with the marks as added special tokens and a template of that name."""
    model = load_model("mini")
    model.tokenizer.add_tokens(list(MARKS), special_tokens=True)
    model.network.resize_token_embeddings(len(model.tokenizer))
    template = Template("own", TEMPLATES[name])
    model.tokenizer.chat_template = template.source
    model.spec = model.spec.model_copy(update={"template": {"name": "own", "source": template.source}})
    model.renderer = Renderer(model.tokenizer, kind="decoder", template=template, max_length=512)
    return model
