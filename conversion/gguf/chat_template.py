"""A chat template that takes whole chains in earlier turns, and gives the model the English side of them.

A model that answers in chains is trained on conversations whose earlier turns are English. Clients of a server send
back what the model wrote, and so do not know that. The template's beginning turns such turns into English, as
`generation.chain.remembered` does; then the model's own template follows, unchanged.
"""

from __future__ import annotations

import json

from transllm_jax.tokenizer.chain import Markers

# `messages` is replaced by a list in which the question before a chain is the chain's English one. The last message is
# left as it is: an answer there is one to go on with.
_BEGINNING = """\
{%- set turns = namespace(list=[]) -%}
{%- for message in messages -%}
{%- set text = message['content'] if message['content'] is string else '' -%}
{%- set sides = text.split(ENGLISH)[-1].split(RESPONSE) if ENGLISH in text else [] -%}
{%- if message['role'] != 'assistant' or loop.last -%}
{%- set turns.list = turns.list + [message] -%}
{%- elif turns.list and sides | length == 2 and sides[0].strip() and sides[1].split(TARGET)[0].strip() -%}
{%- set turns.list = turns.list[:-1] + [{'role': 'user', 'content': sides[0].strip()}, {'role': 'assistant', \
'content': sides[1].split(TARGET)[0].strip()}] -%}
{%- else -%}
{%- set turns.list = turns.list + [{'role': 'assistant', 'content': text.replace(ENGLISH, '').replace(RESPONSE, '')\
.replace(TARGET, '').strip()}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = turns.list -%}
"""


def with_english_history(template: str, markers: Markers) -> str:
    """The template with a beginning that makes whole chains of earlier turns English. Other messages are unchanged."""
    beginning = _BEGINNING
    for name, marker in zip(("ENGLISH", "RESPONSE", "TARGET"), markers.in_order(), strict=True):
        beginning = beginning.replace(name, json.dumps(marker, ensure_ascii=False))
    return beginning + template
