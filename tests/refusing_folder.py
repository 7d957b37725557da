"""The tiny refusing model as a Hugging Face folder, for the tests of other evaluation harnesses; and what it answers, decoded by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import transformers
from refusing_model import refusing_module
from small_models import CHAT_TEMPLATE, bpe_vocabulary
from tokenizers import Tokenizer, decoders


def refusing_folder(path: Path) -> Path:
    """`refusing_module` in `path` with its tokenizer and chat template. To the benchmark it says bits of what it was taught."""
    refusing_module().save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


def refusing_answers(prompts: Sequence[str], max_tokens: int) -> list[tuple[str, bool]]:
    """Its greedy answer to each prompt, and whether the token limit cut it off."""
    tokenizer, answers = _tokenizer(), []
    for prompt in prompts:
        tokens = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )
        made = refusing_module().generate(**tokens, max_new_tokens=max_tokens, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        answers.append((tokenizer.decode(made, skip_special_tokens=True), int(made[-1]) != tokenizer.eos_token_id))
    return answers


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(bpe_vocabulary().tokenizer.to_str())
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast
