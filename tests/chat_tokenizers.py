"""Tokenizers of whole words, with chat templates in the manner of well-known models: spans can be counted by hand."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# In the manner of Qwen3: tools in the system turn, results in a user turn, thinking kept for the last answer only.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response> {{ m.content }} "
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think> {{ m.reasoning_content or '' }} </think> {% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call> {{ c.function.name }} "
    "{{ c.function.arguments.city }} </tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>  </think> {% endif %}{% endif %}"
)
# No end behind the assistant's words; the user's have one.
OPEN_ENDED = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}{% if m.role == 'user' %}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
# The prompt of an answer is not what stands before an answer.
UNLIKE_ITS_PROMPT = CHATML.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant", "{% if add_generation_prompt %}go"
)

_SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<unk>"),
)
_WORDS = "system user assistant model tool go be kind hi there hello you all bye so long weather cold in oslo hm"
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def word_tokenizer(template: str | None, words: str = "") -> PreTrainedTokenizerFast:
    """Every word is a token, white space is none."""
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *dict.fromkeys([*_WORDS.split(), *words.split()])])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(_SPECIAL),
    )
    wrapped.chat_template = template
    return wrapped
