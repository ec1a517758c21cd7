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
    # Mistral's from Small 3.2 on, without and with the ids of its calls.
    "named": HEAD
    + "{%- for c in m.tool_calls or [] -%}{{ '[TOOL_CALLS]' ~ c.function.name ~ '[ARGS]' ~ (c.function.arguments | tojson) }}"
    + "{%- endfor -%}"
    + TAIL,
    "ids": HEAD
    + "{%- for c in m.tool_calls or [] -%}{{ '[TOOL_CALLS]' ~ c.function.name ~ '[CALL_ID]' ~ c.id ~ '[ARGS]' }}"
    + "{{ c.function.arguments | tojson }}{%- endfor -%}"
    + TAIL,
    # Qwen3-Coder's, whose marks are no special tokens.
    "marked": HEAD
    + "{%- if m.content and m.tool_calls %}{{ '\n' }}{% endif -%}{%- for c in m.tool_calls or [] -%}"
    + "{%- if m.content or not loop.first %}{{ '\n' }}{% endif -%}"
    + "{{ '<tool_call>\n<function=' ~ c.function.name ~ '>\n' }}{%- for k, v in c.function.arguments | items -%}"
    + "{{ '<parameter=' ~ k ~ '>\n' ~ (v if v is string else v | tojson) ~ '\n</parameter>\n' }}{%- endfor -%}"
    + "{{ '</function>\n</tool_call>' }}{%- endfor -%}"
    + TAIL,
    # GLM 4.5's, here with marks that are.
    "keys": HEAD
    + "{%- for c in m.tool_calls or [] -%}{{ '\n<tool_call>' ~ c.function.name }}"
    + "{%- for k, v in c.function.arguments | items -%}{{ '\n<arg_key>' ~ k ~ '</arg_key>\n<arg_value>' }}"
    + "{{ (v if v is string else v | tojson) ~ '</arg_value>' }}{%- endfor -%}{{ '\n</tool_call>' }}{%- endfor -%}"
    + TAIL,
}
MARKS = {
    "list": ("[TOOL_CALLS]",),
    "tags": ("<tool_call>", "</tool_call>"),
    "named": ("[TOOL_CALLS]", "[ARGS]"),
    "ids": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "marked": (),
    "keys": ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
}


def marked_model(name):
    """The model, with the marks as added special tokens and a template of that name."""
    model = load_model("mini")
    model.tokenizer.add_tokens(list(MARKS[name]), special_tokens=True)
    model.network.resize_token_embeddings(len(model.tokenizer))
    template = Template("own", TEMPLATES[name])
    model.tokenizer.chat_template = template.source
    model.spec = model.spec.model_copy(update={"template": {"name": "own", "source": template.source}})
    model.renderer = Renderer(model.tokenizer, kind="decoder", template=template, max_length=512)
    return model
