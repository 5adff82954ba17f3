"""Chat templates for bases that bring none: a built-in one, or a file of the user's.

A template is data that becomes text: transformers renders it in jinja2's immutable sandbox,
where it can neither reach Python's inner attributes nor change what it is given.  Its hash
stands with the data's fingerprint in resolved.yaml, and the adapter carries its text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakeet.base.errors import DataError, RequestError
from lorakeet.base.recipe import Recipe
from lorakeet.data.render import template_failures
from lorakeet.models.load import read_tokenizer

_SAVED, _TAKEN_FROM = "chat_template.jinja", "chat_template_taken_from"
_PROBE = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
TEMPLATES = {
    "plain": (
        "{% for message in messages %}"
        "{{ message['role'] | capitalize }}: {{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
        "{% else %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}


def read_recipe_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of a recipe's base, with the recipe's chat template.

    Raises:
        FileFormatError, RequestError, DataError: as ``read_tokenizer`` and ``set_template``.
    """
    tokenizer = read_tokenizer(recipe.base)
    set_template(tokenizer, recipe.data.chat_template)
    return tokenizer


def set_template(tokenizer: Any, name: str | None) -> None:
    """Gives a tokenizer a built-in template or a file's, in place; None leaves it as it is.

    Raises:
        RequestError: the base has a template of its own, or there is no such name or file.
        DataError: the file is no template that can be rendered.
    """
    if name is None:
        return
    if tokenizer.chat_template:
        raise RequestError(
            f"data.chat_template is '{name}', but the base has a chat template of its own, which "
            "it was trained with and is served with. Take data.chat_template out of the recipe."
        )
    path = Path(name)
    if name not in TEMPLATES and not path.is_file():
        raise RequestError(
            f"data.chat_template: '{name}' is neither a file nor a built-in template. "
            f"Built in are {', '.join(TEMPLATES)}."
        )
    try:
        tokenizer.chat_template = TEMPLATES.get(name) or path.read_text(encoding="utf-8")
        tokenizer.apply_chat_template(_PROBE, tokenize=False)
    except template_failures() as error:
        raise DataError(
            f"{name}: a conversation cannot be rendered with this chat template ({error}). Needed "
            "is jinja that loops over 'messages', each with 'role' and 'content'."
        ) from error


def adopt_template(tokenizer: Any, folder: Path) -> None:
    """Gives a tokenizer without a template the one that an adapter was trained with, in place.

    Raises:
        RequestError: it has taken another adapter's, which is a different one.
    """
    saved = folder / _SAVED
    if not saved.is_file():
        return
    text, taken_from = saved.read_text(encoding="utf-8"), getattr(tokenizer, _TAKEN_FROM, None)
    if taken_from and tokenizer.chat_template != text:
        raise RequestError(
            f"{folder}: trained with another chat template than {taken_from}, and the base has "
            "none of its own, so one server cannot answer for both. Serve them apart."
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = text
        setattr(tokenizer, _TAKEN_FROM, str(folder))
