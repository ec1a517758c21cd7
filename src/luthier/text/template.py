"""Chat templates: how a conversation becomes one text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError, did_you_mean

# Tool calls and results are written as JSON on a line of their own, in both named templates.
CALLS = (
    "{%- for call in message.tool_calls or [] -%}{%- set f = call.function or call -%}"
    "{{- '\\nCall: {\"name\": ' ~ (f.name | tojson) ~ ', \"arguments\": ' ~ "
    "(f.arguments if f.arguments is string else f.arguments | tojson) ~ '}' -}}{%- endfor -%}"
)
TOOLS = (
    "{%- if tools -%}{{- 'Tools:' -}}{%- for tool in tools -%}{{- '\\n' ~ (tool | tojson) -}}{%- endfor -%}"
    "{{- END -}}{%- endif -%}"
)

TEMPLATES: dict[str, str] = {
    # No token that is not in the vocabulary already: fits every tokenizer that has an end-of-text token.
    "plain": (
        TOOLS.replace("END", "'\\n\\n'")
        + "{%- for message in messages -%}"
        + "{{- {'system': 'System', 'user': 'User', 'assistant': 'Assistant', 'tool': 'Tool'}[message.role] ~ ':\\n' -}}"
        + "{{- message.content or '' -}}"
        + CALLS
        + "{{- (eos_token ~ '\\n') if message.role == 'assistant' else '\\n\\n' -}}"
        + "{%- endfor -%}"
        + "{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"
    ),
    # OpenAI's ChatML, which Qwen, SmolLM and many others use.
    "chatml": (
        TOOLS.replace("'Tools:'", "'<|im_start|>system\\nTools:'").replace("END", "'<|im_end|>\\n'")
        + "{%- for message in messages -%}"
        + "{{- '<|im_start|>' ~ message.role ~ '\\n' ~ (message.content or '') -}}"
        + CALLS
        + "{{- '<|im_end|>\\n' -}}"
        + "{%- endfor -%}"
        + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    # A prompt, its completion and the end-of-text token, with no roles between them; the renderer does it itself.
    "raw": "",
}


@dataclass(frozen=True, slots=True)
class Template:
    """A named Jinja template, in the convention of transformers' `apply_chat_template`."""

    name: str
    source: str


def choose_template(tokenizer: Any, asked: str = "auto") -> tuple[Template, str]:
    """The template to use, and why.

    auto: the tokenizer's own; else chatml where its tokens are in the vocabulary; else plain. Otherwise "own", a name
    of TEMPLATES, or the path of a .jinja file. Raises ConfigError for an unknown name, or "own" where there is none.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if asked in ("auto", "own") and own:
        return Template("own", own), "the tokenizer brings its own"
    if asked == "own":
        raise ConfigError(
            "template: the tokenizer has no chat template of its own; use auto, plain, chatml or a .jinja file"
        )
    if asked == "auto":
        vocabulary = tokenizer.get_vocab()
        if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
            return Template("chatml", TEMPLATES["chatml"]), "the tokenizer has none, but knows ChatML's tokens"
        return Template("plain", TEMPLATES["plain"]), "the tokenizer has none; plain needs no new tokens"
    if asked in TEMPLATES:
        if asked == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
            raise ConfigError(
                "template: chatml needs the tokens <|im_start|> and <|im_end|>, which this vocabulary lacks; use plain"
            )
        return Template(asked, TEMPLATES[asked]), "asked for"
    path = Path(asked)
    if path.suffix == ".jinja":
        try:
            return Template(path.stem, path.read_text(encoding="utf-8")), "asked for"
        except OSError as err:
            raise ConfigError(f"template: {asked} cannot be read ({err.strerror})") from None
    raise ConfigError(
        f"template: {asked!r} is no template; {did_you_mean(asked, ['auto', 'own', *TEMPLATES])}, or a .jinja file"
    )
