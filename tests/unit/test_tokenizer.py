"""Loading tokenizers: sentencepiece itself is the oracle for LLaMA's own file format."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from package_archives import extract_member, fetch_package
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from dora_dist.data.formats import training_prompt
from dora_dist.models.tokenizer import load_tokenizer
from dora_dist.runtime.errors import UserError
from tests import toy

MISTRAL_COMMON = "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"


@pytest.fixture(scope="module")
def llama_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real sentencepiece model of LLaMA's kind: 32,000 pieces, byte fallback."""
    wheel = fetch_package("mistral-common==1.13.1", MISTRAL_COMMON, request.config.cache.mkdir("packages"))
    found = extract_member(wheel, "mistral_common/data/tokenizer.model.v1", tmp_path_factory.mktemp("wheel"))
    return found.rename(found.with_name("tokenizer.model"))


def texts() -> list[str]:
    """The paper's prompts, runs of spaces, and random mixtures of what tends to go wrong."""
    generator = random.Random(0)
    parts = [
        "   ",
        " ",
        "\n",
        "\t",
        "é",
        "日本",
        "the",
        "Answer",
        "x",
        "1",
        "😀",
        "\u00a0",
        "ing",
        "##",
        " a",
    ]
    mixed = ["".join(generator.choices(parts, k=generator.randrange(60))) for _ in range(300)]
    spaces = [" " * n + "word" for n in range(40)] + ["a" + " " * n + "b" for n in range(40)]
    return mixed + spaces + [training_prompt(record) + record["output"] for record in toy.records(20)]


def test_a_bare_sentencepiece_file_splits_text_as_sentencepiece_does(llama_file: Path) -> None:
    tokenizer, oracle = load_tokenizer(llama_file), SentencePieceProcessor(model_file=str(llama_file))
    for text in texts():
        ids = tokenizer(text)["input_ids"]
        assert ids == [oracle.bos_id(), *oracle.encode(text)], repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert len(tokenizer) == oracle.vocab_size()


def test_a_folder_with_only_the_sentencepiece_file_keeps_its_chat_template(llama_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(llama_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    tokenizer = load_tokenizer(tmp_path)
    indented = "a\n                ### Response:\n                the"
    assert tokenizer(indented)["input_ids"] == load_tokenizer(llama_file)(indented)["input_ids"]
    message = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "hello"


def test_what_was_loaded_can_be_saved_and_loaded_by_transformers(llama_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(llama_file)
    tokenizer.save_pretrained(tmp_path)
    again, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in texts()[::7]:
        assert again(text)["input_ids"] == ours(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_missing_padding_token_is_taken_from_unknown_or_end_of_sequence(tmp_path: Path) -> None:
    tokenizer: Any = toy.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<unk>"


def test_without_an_end_of_sequence_token_there_is_no_training(tmp_path: Path) -> None:
    tokenizer: Any = toy.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"just some text\n" * 20, b"IQ== 0\nIg== 1\n"])
def test_other_files_named_tokenizer_model_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model is not a sentencepiece model .* tokenizer.json"):
        load_tokenizer(file)


def test_a_folder_without_a_tokenizer_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no tokenizer that loads"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="is neither a folder here nor a hub name"):
        load_tokenizer(tmp_path / "absent")
