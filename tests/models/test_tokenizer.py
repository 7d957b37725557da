"""llama.cpp's tokenizer through our wrapper, on byte-level BPE and sentencepiece vocabularies."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import CONTROL_TOKENS, VOCABULARY, bpe_vocabulary, tiny_gguf

from trailmed.errors import TrailmedError
from trailmed.models.tokenizer import Tokenizer

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_gguf(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module", params=[None, True, False], ids=["space by default", "space", "no space"])
def sentencepiece(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary of bytes and a few words, with and without the space that sentencepiece writes before the text."""
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    words = ["\u2581", "\u2581the", "the", "\u2581rope", "e", "r", "o", "p", "t", "h", "th", "ro", "pe", "rope"]
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(words)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-float(n) for n in range(len(words))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_block_count, writer.add_head_count):
        add(1)
    if request.param is not None:
        writer.add_add_space_prefix(request.param)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tokenizer(path)


@given(text=TEXT)
def test_bpe_gives_every_text_back(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text


@given(text=TEXT)
def test_sentencepiece_gives_every_text_back(sentencepiece: Tokenizer, text: str) -> None:
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


@pytest.mark.parametrize("text", ["The boat lies on the sand until the water comes back.", " How can I help", "first then", "é"])
def test_ids_are_those_of_hugging_faces_tokenizer(bpe: Tokenizer, text: str) -> None:
    assert bpe.encode(text) == bpe_vocabulary().tokenizer.encode(text).ids


def test_control_tokens_written_out_become_those_tokens(bpe: Tokenizer) -> None:
    start, end = (VOCABULARY - 2, VOCABULARY - 1)
    ids = bpe.encode("<|im_start|>user\nHi<|im_end|>")
    assert (ids[0], ids[-1]) == (start, end)
    assert bpe.encode("") == []


def test_special_tokens_are_known(bpe: Tokenizer) -> None:
    assert bpe.size == VOCABULARY
    assert (bpe.bos_token, bpe.eos_token) == (CONTROL_TOKENS[0], CONTROL_TOKENS[2])
    assert (bpe.bos_id, bpe.eos_id) == (VOCABULARY - 3, VOCABULARY - 1)
    assert bpe.eos_ids == {VOCABULARY - 3, VOCABULARY - 1}  # <|endoftext|> ends an answer too, <|im_start|> does not


def test_half_a_surrogate_pair_is_refused(bpe: Tokenizer) -> None:
    with pytest.raises(TrailmedError, match="character 2"):
        bpe.encode("ab\ud800")


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary_are_refused(bpe: Tokenizer, token: int) -> None:
    with pytest.raises(TrailmedError, match=f"no token {token}"):
        bpe.decode([0, token])


def test_half_a_character_is_replaced(bpe: Tokenizer) -> None:
    ids = bpe.encode("é")
    assert len(ids) == 2
    assert bpe.decode(ids[:1]) == "\ufffd"


def test_missing_and_foreign_files_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrailmedError, match=r"none\.gguf: no such file"):
        Tokenizer(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(TrailmedError, match=r"text\.gguf: llama\.cpp cannot read its tokenizer \(.*magic") as caught:
        Tokenizer(tmp_path / "text.gguf")
    assert "\n" not in str(caught.value)
    out, err = capfd.readouterr()
    assert out == err == ""
