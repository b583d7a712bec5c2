"""Chat templates in the shapes of the model families, short, each with what it writes for an assistant's turn.

Every template has {% generation %} marks; without them it is as most models have it. What a turn should train is put
down here by hand (`Shape.answer`, `Shape.thought`, `Shape.called`), not found by rendering.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

CALL_ID = "call00001"


@dataclass(frozen=True)
class Shape:
    template: str
    kind: str  # of tokenizer: bytes, metaspace or replaced
    eos: str
    header: str  # before an answer, to be quoted in contents
    end: str  # of a turn
    end_of_last: str | None = None  # where it is another
    bos: str | None = None
    special: tuple[str, ...] = ()  # tokens, besides bos and eos
    before: str = ""  # an answer, which is not in the generation prompt
    strips: str = ""  # "all": white space around an answer; "lines": the line breaks before the last
    system: bool = True  # takes a system message
    swallows: bool = False  # its special tokens take the space that follows them, so it is not in the ids
    thinking: str | None = None  # what stands before the last answer that has thinking
    earlier_thinking: str = ""  # and before the others
    thinking_key: str | None = None  # of a message
    inline_thinking: bool = True  # <think>...</think> in the content
    calls: str | None = None  # how tool calls are written: "tags", "json", "list", "channel"

    @property
    def plain(self) -> str:
        """The template without marks."""
        return re.sub(r"\{%- (end)?generation %\}", "", self.template)

    def answer(self, text: str, last: bool) -> str:
        """What is trained of a turn; `last`: no message follows."""
        text = text.strip() if self.strips == "all" else text
        text = text.lstrip("\n") if self.strips == "lines" and last else text
        return self.before + text + (self.end_of_last if last and self.end_of_last is not None else self.end)

    def thought(self, thinking: str, text: str, last: bool) -> str:
        """What is trained of a turn with thinking."""
        assert self.thinking is not None
        return (self.thinking.format(thinking) if last else self.earlier_thinking) + self.answer(text, last)

    def called(self, content: str, calls: list[dict[str, Any]]) -> str:
        """What is trained of a turn with tool calls."""
        names = [call["name"] for call in calls]
        arguments = [json.dumps(call["arguments"], ensure_ascii=False) for call in calls]
        if self.calls == "tags":
            written = [
                f'{{"name": "{name}", "arguments": {text}}}' for name, text in zip(names, arguments, strict=True)
            ]
            blocks = [f"<tool_call>\n{text}\n</tool_call>" for text in written]
            return "\n".join([content] * bool(content) + blocks) + self.end
        if self.calls == "json":
            return f'{{"name": "{names[0]}", "parameters": {arguments[0]}}}{self.end}'
        if self.calls == "list":
            written = [
                f'{{"name": "{name}", "arguments": {text}, "id": "{CALL_ID}"}}'
                for name, text in zip(names, arguments, strict=True)
            ]
            return f"[TOOL_CALLS] [{', '.join(written)}]{self.end}"
        return f" to=functions.{names[0]}<|channel|>commentary json<|message|>{arguments[0]}<|call|>"


CHATML = """
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

_TOOLS = """
{%- if tools %}
{{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'You are helpful.') }}
{{- '\n\n# Tools\n\n<tools>' }}
{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}
{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}"""

_TOOL_RESULTS = """
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"""

QWEN2_5 = (
    _TOOLS.replace("{%- endif %}", "{%- else %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}")
    + """
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' and not message.tool_calls %}
{{- '<|im_start|>assistant\n' }}
{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{%- generation %}
{%- if message.content %}{{- message.content + '\n' }}{%- endif %}
{%- for call in message.tool_calls %}
{%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
{{- '\n' if not loop.first else '' }}
{{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"""
    + _TOOL_RESULTS
    + """
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
)

_REASONING = """
{%- set content = message.content or '' %}{%- set reasoning = '' %}
{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}"""

# Thinking of earlier turns is dropped, and the last turn has a thinking block even when it did not think.
QWEN3 = (
    _TOOLS
    + """
{%- set opens = false %}
{%- set ns = namespace(searching=true, query=messages|length - 1) %}
{%- for message in messages[::-1] %}
{%- if ns.searching and message.role == 'user' and not message.content.startswith('<tool_response>') %}
{%- set ns.searching = false %}{%- set ns.query = messages|length - 1 - loop.index0 %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}"""
    + _REASONING
    + """
{%- set thinks = loop.index0 > ns.query and (loop.last or reasoning) %}
{{- '<|im_start|>assistant\n' }}
{%- set reasoning = reasoning.strip('\n') %}
{%- if thinks and not reasoning %}{{- '<think>\n\n</think>\n\n' }}
{%- elif thinks and opens %}{{- '<think>\n' }}{%- endif %}
{%- generation %}
{%- if thinks and reasoning %}{{- '' if opens else '<think>\n' }}{{- reasoning + '\n</think>\n\n' }}{%- endif %}
{{- content.lstrip('\n') if thinks else content }}
{%- for call in message.tool_calls or [] %}
{{- '\n' if content or not loop.first else '' }}
{%- if call.function %}{%- set call = call.function %}{%- endif %}
{{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"""
    + _TOOL_RESULTS
    + """
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if opens %}{{- '<think>\n' }}{%- endif %}
{%- endif %}"""
)

# As Qwen3-…-Thinking-2507: the generation prompt opens the thinking block, which earlier turns have not.
QWEN3_THINKING = QWEN3.replace("set opens = false", "set opens = true")

LLAMA3 = """{{- bos_token }}
{%- set first = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' %}
{%- set messages = messages[1:] if messages[0]['role'] == 'system' else messages %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools %}{{- 'Environment: ipython\n' }}{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\n\n' + first + '<|eot_id|>' }}
{%- for message in messages %}
{%- if message.role == 'tool' or message.role == 'ipython' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
{{- message.content | tojson if message.content is mapping else message.content }}{{- '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('This model only supports single tool-calls at once!') }}
{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- generation %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
{%- endgeneration %}
{%- else %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

_ALTERNATE = """
{%- for message in turns %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- endfor %}"""

_SYSTEM_APART = """
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"""

# No generation prompt; the answer is joined by a space; every question has a BOS.
LLAMA2 = (
    _SYSTEM_APART
    + _ALTERNATE
    + """
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{%- set content = message['content'] %}
{%- if loop.first and system %}{%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}{%- endif %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}
{%- generation %}{{- ' ' + message['content'].strip() + ' ' + eos_token }}{%- endgeneration %}
{%- endif %}
{%- endfor %}"""
)

# v0.3: the system message stands in the last question; tool calls need ids of nine letters.
MISTRAL = (
    "{{- bos_token }}"
    + _SYSTEM_APART
    + """
{%- set ns = namespace(index=0) %}
{%- for message in turns %}
{%- if not (message.role == 'tool' or message.tool_calls) %}
{%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
{{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/...') }}
{%- endif %}
{%- set ns.index = ns.index + 1 %}
{%- endif %}
{%- endfor %}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' }}
{%- if loop.last and system %}{{- system + '\n\n' }}{%- endif %}
{{- message['content'] + '[/INST]' }}
{%- elif message.tool_calls %}
{%- generation %}{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']') }}
{%- endfor %}
{{- eos_token }}{%- endgeneration %}
{%- elif message['role'] == 'assistant' %}
{%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}
{%- elif message['role'] == 'tool' %}
{%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 %}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif %}
{{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}
{%- endfor %}"""
)

# Mistral-Nemo and later: no space before the answer.
MISTRAL_TIGHT = MISTRAL.replace("{{- ' ' + message['content'] + eos_token }}", "{{- message['content'] + eos_token }}")

GEMMA2 = (
    """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- set turns = messages %}"""
    + _ALTERNATE
    + """
{%- for message in turns %}
{%- if message['role'] == 'assistant' %}
{{- '<start_of_turn>model\n' }}
{%- generation %}{{- message['content'] | trim + '<end_of_turn>' }}{%- endgeneration %}{{- '\n' }}
{%- else %}{{- '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
)

GEMMA3 = GEMMA2.replace(
    """
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- set turns = messages %}""",
    _SYSTEM_APART,
).replace(
    "{%- else %}{{- '<start_of_turn>' + message['role'] + '\\n' + ",
    "{%- else %}{{- '<start_of_turn>user\\n' + (system + '\\n\\n' if loop.first and system else '') + ",
)

# The generation prompt stands in place of the end of text, so a rendering is not the beginning of a longer one.
PHI3 = """
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|end|>' }}{%- endgeneration %}{{- '\n' }}
{%- else %}{{- message['content'] + '<|end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

# Headers are plain text, in Zephyr and in Vicuna; Vicuna's answer is joined by a space.
ZEPHYR = """
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}{{- '\n' }}
{%- else %}{{- message['content'] + eos_token + '\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""

VICUNA = (
    "{{- bos_token }}"
    + _SYSTEM_APART
    + """
{{- (system or 'A chat between a curious user and an assistant.') + ' ' }}
{%- for message in turns %}
{%- if message['role'] == 'user' %}{{- 'USER: ' + message['content'].strip() }}
{%- else %}{{- ' ASSISTANT:' }}
{%- generation %}{{- ' ' + message['content'].strip() + eos_token }}{%- endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ' ASSISTANT:' }}{%- endif %}"""
)

# A turn without thinking has a closing mark only, and so has the generation prompt; thinking is never kept.
DEEPSEEK_V3_1 = """{{- bos_token }}
{%- set ns = namespace(after_user=false, tool=false) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{{- message['content'] }}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{%- set ns.after_user = true %}{%- set ns.tool = false %}{{- '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}
{%- if ns.after_user %}{{- '<｜Assistant｜></think>' }}{%- endif %}
{%- set ns.after_user = false %}
{%- set content = message['content'] %}
{%- if '</think>' in content and not ns.tool %}{%- set content = content.split('</think>', 1)[1] %}{%- endif %}
{%- generation %}{{- content + '<｜end▁of▁sentence｜>' }}{%- endgeneration %}
{%- elif message['role'] == 'tool' %}
{%- set ns.after_user = false %}{%- set ns.tool = true %}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.after_user %}{{- '<｜Assistant｜></think>' }}{%- endif %}"""

# The generation prompt opens a thinking block that no rendered turn has.
DEEPSEEK_R1 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}{{- '<｜Assistant｜>' }}
{%- generation %}{{- message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{%- endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}"""

# No end-of-turn token: the next role's token ends a turn, and nothing ends the last.
GLM4_5 = (
    """{{- '[gMASK]<sop>' }}
{%- set ns = namespace(query=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|user|>\n' + message.content }}
{%- elif message.role == 'assistant' %}{{- '<|assistant|>' }}"""
    + _REASONING
    + """
{%- set thinks = loop.index0 > ns.query and reasoning %}
{%- if not thinks %}{{- '\n<think></think>\n' }}{%- endif %}
{%- generation %}
{%- if thinks %}{{- '\n<think>' + reasoning.strip() + '</think>\n' }}{%- endif %}
{{- content.strip() }}{%- endgeneration %}
{%- elif message.role == 'system' %}{{- '<|system|>\n' + message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '\n<think></think>' }}{%- endif %}
{%- endif %}"""
)

# gpt-oss: the generation prompt leaves the channel to the model, the last turn ends otherwise than those before it.
HARMONY = """{{- '<|start|>system<|message|>You are ChatGPT.\n\n# Valid channels: analysis, final.<|end|>' }}
{%- set ns = namespace(tool='') %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- '<|start|>assistant' }}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}{%- set ns.tool = call.name %}
{%- generation %}
{%- if message.thinking %}
{{- '<|channel|>analysis<|message|>' + message.thinking + '<|end|><|start|>assistant' }}
{%- endif %}
{{- ' to=functions.' + call.name + '<|channel|>commentary json<|message|>' + call.arguments | tojson + '<|call|>' }}
{%- endgeneration %}
{%- elif loop.last and not add_generation_prompt %}
{%- generation %}
{%- if message.thinking %}
{{- '<|channel|>analysis<|message|>' + message.thinking + '<|end|><|start|>assistant' }}
{%- endif %}
{{- '<|channel|>final<|message|>' + message.content + '<|return|>' }}{%- endgeneration %}
{%- else %}
{%- generation %}{{- '<|channel|>final<|message|>' + message.content + '<|end|>' }}{%- endgeneration %}
{%- endif %}
{%- elif message.role == 'tool' %}
{%- if not ns.tool %}{{- raise_exception('Message has tool role, but there was no previous assistant message') }}
{%- endif %}
{{- '<|start|>functions.' + ns.tool + ' to=assistant<|channel|>commentary<|message|>' }}
{{- message.content | tojson + '<|end|>' }}
{%- elif message.role == 'system' %}
{{- '<|start|>developer<|message|># Instructions\n\n' + message.content + '<|end|>' }}
{%- else %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""


_CHATML: dict[str, Any] = {
    "kind": "bytes", "special": ("<|im_start|>",), "eos": "<|im_end|>", "end": "<|im_end|>",
    "header": "<|im_start|>assistant\n",
}  # fmt: skip
_LLAMA2: dict[str, Any] = {"kind": "metaspace", "bos": "<s>", "eos": "</s>", "end": "</s>", "header": "[/INST]"}
_MISTRAL: dict[str, Any] = _LLAMA2 | {
    "special": ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    "calls": "list",
}
_GEMMA: dict[str, Any] = {
    "kind": "replaced", "special": ("<start_of_turn>", "<end_of_turn>"), "bos": "<bos>", "eos": "<eos>",
    "end": "<end_of_turn>", "header": "<start_of_turn>model\n", "strips": "all",
}  # fmt: skip
_PHI3: dict[str, Any] = {
    "kind": "metaspace", "special": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "eos": "<|endoftext|>",
    "end": "<|end|>", "header": "<|assistant|>\n",
}  # fmt: skip
_DEEPSEEK: dict[str, Any] = {
    "kind": "bytes", "special": ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    "bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>", "end": "<｜end▁of▁sentence｜>",
    "header": "<｜Assistant｜>", "thinking": "\n\n", "earlier_thinking": "\n\n",
}  # fmt: skip

SHAPES: dict[str, Shape] = {
    "chatml": Shape(CHATML, **_CHATML),
    "qwen2.5": Shape(QWEN2_5, **_CHATML, calls="tags"),
    "qwen3": Shape(
        QWEN3, **_CHATML, strips="lines", thinking="<think>\n{}\n</think>\n\n", thinking_key="reasoning_content",
        calls="tags",
    ),
    "qwen3-thinking": Shape(
        QWEN3_THINKING, **_CHATML, strips="lines", thinking="{}\n</think>\n\n", thinking_key="reasoning_content",
        calls="tags",
    ),
    "llama-3.1": Shape(
        LLAMA3, "bytes", "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
        bos="<|begin_of_text|>", special=("<|start_header_id|>", "<|end_header_id|>"), strips="all", calls="json",
    ),
    "llama-2": Shape(LLAMA2, **(_LLAMA2 | {"end": " </s>"}), before=" ", strips="all"),
    "mistral": Shape(MISTRAL, **_MISTRAL, before=" "),
    "mistral-nemo": Shape(MISTRAL_TIGHT, **(_MISTRAL | {"kind": "bytes"})),
    "gemma-2": Shape(GEMMA2, **_GEMMA, system=False),
    "gemma-3": Shape(GEMMA3, **_GEMMA),
    "phi-3": Shape(PHI3, **_PHI3),
    "phi-3 as its tokenizer is": Shape(PHI3, **_PHI3, swallows=True),
    "zephyr": Shape(ZEPHYR, "metaspace", "</s>", "<|assistant|>\n", "</s>"),
    "vicuna": Shape(VICUNA, "metaspace", "</s>", " ASSISTANT:", "</s>", bos="<s>", before=" ", strips="all"),
    "deepseek-v3.1": Shape(DEEPSEEK_V3_1, **_DEEPSEEK),
    "deepseek-r1": Shape(DEEPSEEK_R1, **_DEEPSEEK),
    "glm-4.5": Shape(
        GLM4_5, "bytes", "<|endoftext|>", "<|assistant|>\n", "<|user|>", end_of_last="<|endoftext|>",
        special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"), strips="all",
        thinking="\n<think>{}</think>\n", thinking_key="reasoning_content",
    ),
    "gpt-oss": Shape(
        HARMONY, "bytes", "<|return|>", "<|start|>assistant", "<|end|>", end_of_last="<|return|>",
        special=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"),
        before="<|channel|>final<|message|>",
        thinking="<|channel|>analysis<|message|>{}<|end|><|start|>assistant", thinking_key="thinking",
        inline_thinking=False, calls="channel",
    ),
}  # fmt: skip
