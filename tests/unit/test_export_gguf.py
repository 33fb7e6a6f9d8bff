"""`export --to gguf`: what transformers' own loader and llama.cpp itself compute from the file."""

import json
import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xllamacpp
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from dora_dist import cli
from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.checkpoint import merging
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.checkpoint.export_gguf import export_gguf
from dora_dist.runtime.errors import UserError
from dora_dist.weights.safetensors_io import TensorFolder
from tests import toy

QUERY, KEY, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.up_proj"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
TEXTS = (
    "question: is 12345 even? the correct answer is true",
    "  I'LL don't\n\n    indent\tx = 10;  \n",
    "naïve 日本語 🙂 ½ ١٢٣ <s> [x]</s> even</s>",
    "",
)


def adapted(folder: Path, *, modules: Sequence[str] = (QUERY, KEY, UP), **config: Any) -> Path:
    """`base`, a LLaMA of weights that matter, and `adapter`, a DoRA of some of its layers."""
    toy.base_model(folder / "base", initializer_range=0.2, **config)
    base, draw = TensorFolder.open(folder / "base"), torch.Generator().manual_seed(0)
    layers = {}
    for name in modules:
        rows, columns = base.entry(f"{name}.weight").shape
        norm = base.read_finite(f"{name}.weight").norm(dim=1)
        A, B = torch.randn(2, columns, generator=draw), torch.randn(rows, 2, generator=draw) * 0.1
        layers[name] = AdapterLayer(A, B, norm * (1 + 0.2 * torch.rand(rows, generator=draw)), 1.0)
    write_peft_folder(folder / "adapter", PeftAdapter(str(folder / "base"), 2, 2, 0.0, True, layers))
    return folder


def merged(folder: Path) -> Any:
    consolidate(folder / "adapter", folder / "base", folder / "merged", progress=False)
    return AutoModelForCausalLM.from_pretrained(folder / "merged").eval()


def export(folder: Path, source: str = "adapter", name: str = "model.gguf", **options: Any) -> Path:
    export_gguf(folder / source, folder / name, progress=False, **options)
    return folder / name


def by_transformers(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def llama_cpp(file: Path) -> Any:
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.verbosity = str(file), 256, 1, -1
    options.warmup = options.fit_params = False
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.cpuparams.n_threads = 1
    return xllamacpp.Server(options)


def asked(server: Any, path: str, **fields: Any) -> Any:
    request = urllib.request.Request(
        f"{server.listening_address}/{path}", json.dumps(fields).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def continued(server: Any, prompt: list[int], count: int) -> list[int]:
    """llama.cpp's likeliest tokens, one after the other."""
    greedy = {"temperature": 0, "ignore_eos": True, "return_tokens": True}
    found: list[int] = asked(server, "completion", prompt=prompt, n_predict=count, **greedy)["tokens"]
    return found


def tokens_of(server: Any, text: str) -> list[int]:
    found: list[int] = asked(server, "tokenize", content=text, add_special=True, parse_special=True)["tokens"]
    return found


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(tokens).logits
    return found


@torch.no_grad()
def assert_llama_cpp_continues_as(model: Any, file: Path) -> None:
    """The same likeliest tokens, each given what was written so far; or one that is as likely but for rounding."""
    prompt = toy.tokens()[:1]
    written = torch.tensor([continued(llama_cpp(file), prompt[0].tolist(), 24)])
    scores = logits(model, torch.cat([prompt, written], dim=1))[0, prompt.shape[1] - 1 : -1]
    scores[:, 2] = -torch.inf  # the end of text, which llama.cpp is told to ignore
    missed = scores.max(-1).values - scores.gather(1, written.T)[:, 0]
    assert written.shape[1] == 24 and missed.max() < 0.01 * scores[:, 3:].std()


def test_a_run_is_what_transformers_and_llama_cpp_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of rows that cut heads; straight from the adapter, or by way of the merged folder: the same file."""
    folder = adapted(tmp_path)
    monkeypatch.setattr(merging, "BLOCK_BYTES", 4 * 36 * 5)
    model, file = merged(folder), export(folder, gguf_type="f32")
    difference = logits(by_transformers(file), toy.tokens()) - logits(model, toy.tokens())
    plain = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert difference.abs().max() < 1e-5 < (logits(plain, toy.tokens()) - logits(model, toy.tokens())).abs().max() / 100
    assert_llama_cpp_continues_as(model, file)
    shutil.move(file, folder / "first.gguf")
    assert export(folder, "merged", gguf_type="f32").read_bytes() == (folder / "first.gguf").read_bytes()


def test_each_type_holds_the_merged_weights_rounded_once(tmp_path: Path) -> None:
    folder = adapted(tmp_path, hidden_size=96, intermediate_size=72)
    up = merged(folder).state_dict()[f"{UP}.weight"]
    expected = {"f16": up.half().float(), "bf16": up.bfloat16().float(), "q8_0": up}
    for kind, weight in expected.items():
        file = export(folder, name=f"{kind}.gguf", gguf_type=kind)
        tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        found = tensors["blk.1.ffn_up.weight"]
        assert found.tensor_type == GGMLQuantizationType[kind.upper()]
        assert tensors["blk.1.attn_norm.weight"].tensor_type == GGMLQuantizationType.F32
        read = dequantize(found.data, found.tensor_type).reshape(weight.shape)
        assert np.abs(read - weight.numpy()).max() <= (
            0.5 / 127 * float(up.abs().max()) * 1.01 if kind == "q8_0" else 0
        )
        # Its rows have 72 numbers, which no blocks of 32 hold.
        down = tensors["blk.1.ffn_down.weight"].tensor_type
        assert down == GGMLQuantizationType["F16" if kind == "q8_0" else kind.upper()]
    assert continued(llama_cpp(folder / "q8_0.gguf"), [5, 6, 7], 2)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}, "attention_bias": True},
        {"head_dim": 16, "mlp_bias": True},
    ],
    ids=["llama3's frequencies, tied", "linear frequencies, biases", "wide heads, biases"],
)
def test_llama_cpp_computes_what_llama_can_be_configured_to(tmp_path: Path, config: dict[str, Any]) -> None:
    toy.base_model(tmp_path / "base", initializer_range=0.3, **config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "base")
    assert_llama_cpp_continues_as(model, export(tmp_path, "base", gguf_type="f32"))


def test_qwen2_has_its_own_order_of_rows(tmp_path: Path) -> None:
    text = byte_level(pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"), ignore_merges=False)
    sizes = {**toy.SIZES, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": len(text) + 4}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, initializer_range=0.3)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "base")
    text.save_pretrained(tmp_path / "base")
    file = export(tmp_path, "base", gguf_type="f32")
    assert_llama_cpp_continues_as(model, file)
    assert (logits(by_transformers(file), toy.tokens()) - logits(model, toy.tokens())).abs().max() < 1e-4


# --- tokenizers -------------------------------------------------------------------------------------------------------


def learn(bpe: Any, **options: Any) -> None:
    texts = [json.dumps(toy.records(50)), *TEXTS]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, **options)
    bpe.train_from_iterator(texts, trainer)


def byte_level(words: Any, *, ignore_merges: bool) -> Any:
    """A byte-level BPE that cuts words by `words`, with a token of its own that is not special."""
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None or "Digits" in repr(words))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_alone]) if words else bytes_alone
    bpe.decoder = decoders.ByteLevel()
    learn(bpe, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.add_tokens(["[x]"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def pieces(prepended: bool) -> Any:
    """LLaMA's kind: pieces with a space in front, bytes for the rest; as transformers makes it, or by a normalizer."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    learn(bpe)
    learnt = list(json.loads(bpe.to_str())["model"]["vocab"])
    vocab = {name: number for number, name in enumerate([*learnt, *(f"<0x{byte:02X}>" for byte in range(256))])}
    # As sentencepiece has it, any two are joined whose union is a piece: earlier pieces first.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in learnt[3:]
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    if not prepended:
        return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.add_tokens([AddedToken("[x]", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "gpt-2": lambda: byte_level(None, ignore_merges=False),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), ignore_merges=False),
    "llama-bpe": lambda: byte_level(pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"), ignore_merges=True),
    "qwen2": lambda: byte_level(pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"), ignore_merges=False),
    "pieces of transformers": lambda: pieces(prepended=False),
    "pieces by a normalizer": lambda: pieces(prepended=True),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_splits_texts_as_the_tokenizer_does(tmp_path: Path, kind: str) -> None:
    text = TOKENIZERS[kind]()
    text.chat_template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    toy.base_model(tmp_path / "base", vocab_size=len(text) + 3)
    text.save_pretrained(tmp_path / "base")
    file = export(tmp_path, "base")
    server = llama_cpp(file)
    plain = kind == "pieces of transformers"  # it has no space after special tokens, nor two in front of a text
    for sample in (TEXTS[0], "a" + TEXTS[1], "naïve 日本語 🙂 ½") if plain else TEXTS:
        assert tokens_of(server, sample) == text(sample).input_ids, sample
    fields = GGUFReader(file).fields
    assert fields["tokenizer.chat_template"].contents() == text.chat_template
    assert fields["tokenizer.ggml.pre"].contents() == (
        kind if kind in ("gpt-2", "smollm", "llama-bpe", "qwen2") else "default"
    )


def test_what_llama_cpp_would_do_otherwise_is_refused(tmp_path: Path) -> None:
    """Models and tokenizers that it does not know, each by what is odd about it; nothing is left behind."""
    folder = adapted(tmp_path)
    config = json.loads((folder / "base" / "config.json").read_text())
    words = json.loads((folder / "base" / "tokenizer.json").read_text())

    def refused(changed: dict[str, Any], own_words: dict[str, Any]) -> str:
        (folder / "base" / "config.json").write_text(json.dumps({**config, **changed}))
        (folder / "base" / "tokenizer.json").write_text(json.dumps({**words, **own_words}))
        with pytest.raises(UserError) as caught:
            export(folder, "base")
        assert not list(folder.glob("*.gguf*")) and not list(folder.glob(".*.gguf*"))
        return str(caught.value)

    assert "model_type = 'gemma'" in refused({"model_type": "gemma"}, {})
    assert "hidden_act = 'gelu'" in refused({"hidden_act": "gelu"}, {})
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    assert "rope_type = 'yarn'" in refused({"rope_parameters": yarn}, {})
    assert "no tensor 'model.layers.2." in refused({"num_hidden_layers": 3}, {})
    assert "tensor 'model.layers.1." in refused({"num_hidden_layers": 1}, {})
    other = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    assert r"cuts words by Split \w+ Isolated False" in refused({}, {"pre_tokenizer": other})
    assert "changes texts by NFKC" in refused({}, {"normalizer": {"type": "NFKC"}})
    stripped = [{**token, "lstrip": True} for token in words["added_tokens"]]
    assert "has a token '<pad>' with lstrip" in refused({}, {"added_tokens": stripped})


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = adapted(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = 1e6
    model.save_pretrained(folder / "base")
    with pytest.raises(UserError, match=r"mlp.up_proj.weight' would not be finite.*try --type bf16 or f32"):
        export(folder)
    assert not list(folder.glob("*.gguf"))
    assert export(folder, gguf_type="bf16").exists()


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapted(tmp_path)
    line = ["export", str(folder / "adapter"), "--to", "gguf", "--output", str(folder / "out" / "model.gguf")]
    assert cli.main(line) == 0
    assert "3 of 21 tensors merged" in capsys.readouterr().out
    assert cli.main(line) == 2 and "model.gguf: already exists; choose another name" in capsys.readouterr().err
    assert cli.main([*line, "--overwrite", "--type", "q8_0"]) == 0
    assert "weights are f16: their rows are not a multiple of 32" in capsys.readouterr().out
