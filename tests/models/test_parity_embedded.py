"""The loaded module against llama.cpp on the catalogue's real weights, over 50 prompts of ordinary text.

llama.cpp rounds the activations to 8 bits before it multiplies them with quantized weights, the module does not. So the same weights
are also compared as F16, where it rounds them to 16 bits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_reference import llama_reference, mean_kl, module_logits

from trailmed.export.bake import bake
from trailmed.models.load import LoadedModel, load_model

PROMPTS = (
    "The ferry leaves the harbour at six in the morning and arrives on the island before lunch.",
    "To bake bread you need flour, water, salt and yeast, and a good deal of patience.",
    "My grandmother kept bees behind the house until she was eighty-four years old.",
    "Write a short poem about the first snow of the year.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "The committee decided to postpone the vote because half of its members were ill.",
    "What is the difference between weather and climate?",
    "In 1969 two people walked on the moon while a third one waited above them.",
    "The price of tomatoes has doubled since last spring, and farmers blame the drought.",
    "How do I change the tyre of a bicycle without special tools?",
    "SELECT name, age FROM employees WHERE age > 40 ORDER BY",
    "She opened the letter, read it twice, and put it into the stove.",
    "Water boils at a lower temperature in the mountains because the air is thinner.",
    "Translate into French: The library is closed on Sundays.",
    "The old bridge was built from larch wood and has been repaired seven times.",
    "Please summarise the following paragraph in one sentence.",
    "A right triangle with legs of 3 and 4 has a hypotenuse of",
    "The orchestra tuned for a long time, as if nobody wanted to begin.",
    "Which vitamins does a person get from oranges and from carrots?",
    "If the train is late again, we will miss the last bus to the village.",
    "for (int i = 0; i < 10; i++) {\n    printf(\"%d\\n\", i);\n}",
    "The museum shows tools that people made from bone twelve thousand years ago.",
    "Tell me three facts about octopuses that most people do not know.",
    "He learned to swim at fifty and crossed the lake at fifty-one.",
    "The recipe says to let the dough rest, but for how long depends on the room.",
    "Electric motors turn most of the energy they take into motion, and little into heat.",
    "Dear Ms. Tanaka, thank you for your letter of the third of March.",
    "The dog waited at the gate every evening until the school bus came.",
    "Why does the moon look larger when it is close to the horizon?",
    "import numpy as np\n\nx = np.linspace(0, 1, 100)\ny =",
    "The village has one shop, one church, and three opinions about everything.",
    "Explain to a child how a rainbow is made.",
    "The river rose two metres in one night, but the dam held.",
    "What should I wear for a hike in changeable autumn weather?",
    "Most languages of Europe belong to one large family; Basque belongs to none.",
    "The chess player thought for forty minutes and then moved the wrong rook.",
    "Give me a packing list for a weekend by the sea.",
    "Light from the sun takes a little more than eight minutes to reach the earth.",
    "They painted the kitchen yellow, and the whole street talked about it.",
    "{\"name\": \"Ada\", \"born\": 1815, \"languages\": [\"English\",",
    "The doctor asked him to breathe in, hold his breath, and breathe out slowly.",
    "How many continents are there, and which one is the smallest?",
    "In the north the summer nights are so bright that the birds hardly sleep.",
    "The contract ends on the last day of June unless both sides agree otherwise.",
    "Once upon a time there was a tailor who could not thread a needle.",
    "Compare a bicycle with a car as a way to get to work in a city.",
    "The concert was sold out within an hour, although nobody knew the singer.",
    "An apple a day keeps the doctor away, as the saying goes, but",
    "Sort these numbers from small to large: 17, 3, 99, 42, 8.",
    "When the fog lifted, they saw that they had camped ten steps from the road.",
)


@dataclass(frozen=True)
class Parity:
    """Agreement over every position of every prompt: share with the same argmax, mean KL in nats, largest logit difference."""

    positions: int
    same_argmax: float
    mean_kl: float
    largest_difference: float


def parity(loaded: LoadedModel, paths: Sequence[Path]) -> list[Parity]:
    """`loaded` against llama.cpp on each of the GGUFs at `paths`, over PROMPTS."""
    same: list[list[bool]] = [[] for _ in paths]
    kl = [0.0 for _ in paths]
    largest = [0.0 for _ in paths]
    with ExitStack() as stack:
        references = [stack.enter_context(llama_reference(path, context_length=64)) for path in paths]
        for prompt in PROMPTS:
            ids = loaded.tokenizer.encode(prompt)
            if loaded.tokenizer.bos_token == "<bos>":
                ids = [loaded.tokenizer.bos_id or 0, *ids]  # Gemma makes no sense of a text that does not begin so
            ours = module_logits(loaded.module, ids)
            for n, reference in enumerate(references):
                theirs = reference.logits(ids)
                same[n] += (theirs.argmax(-1) == ours.argmax(-1)).tolist()
                kl[n] += mean_kl(theirs, ours) * len(ids)
                largest[n] = max(largest[n], float(np.abs(theirs - ours).max()))
    return [Parity(len(same[n]), float(np.mean(same[n])), kl[n] / len(same[n]), largest[n]) for n in range(len(paths))]


@pytest.mark.embedded
def test_embedded_model_agrees_with_llama_cpp(embedded_model: Path, tmp_path: Path) -> None:
    loaded = load_model(embedded_model)
    unquantized_path = tmp_path / "f16.gguf"
    bake(None, embedded_model, unquantized_path, "F16", progress=False)
    quantized, unquantized = parity(loaded, [embedded_model, unquantized_path])
    unquantized_path.unlink()
    print(f"same GGUF: {quantized}\nits weights as F16: {unquantized}")
    assert len(PROMPTS) == 50
    assert unquantized.same_argmax >= 0.99
    assert unquantized.mean_kl < 1e-4
    # llama.cpp's own rounding of activations, measured: 97.4 % and 0.0016 nats
    assert quantized.same_argmax >= 0.95
    assert quantized.mean_kl < 0.01


@pytest.mark.embedded
def test_embedded_model_answers_through_its_own_template(embedded_model: Path) -> None:
    loaded = load_model(embedded_model)
    ids = loaded.tokenizer.encode(loaded.template.prompt("What is the capital of France? Answer in one word."))
    answer = loaded.module.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids):].tolist()
    assert "Paris" in loaded.tokenizer.decode(answer)
    assert answer[-1] in loaded.tokenizer.eos_ids
