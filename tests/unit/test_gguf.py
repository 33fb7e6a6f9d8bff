"""GGUF to a Hugging Face folder: a LLaMA file with known weights is written here and converted back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dora_dist.models.gguf import import_gguf
from dora_dist.runtime.errors import UserError
from dora_dist.weights.safetensors_io import TensorFolder

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def vocabulary() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's names of the 256 bytes
    shifted = [chr(256 + n) for n in range(256 - len(printable))]
    return [*SPECIAL, *map(chr, printable), *shifted, *(merge.replace(" ", "") for merge in MERGES)]


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": len(vocabulary()),
    }
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's order of query and key rows: a head's two halves alternate, so rotary pairs lie side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, architecture: str = "llama", without: str = "") -> Path:
    config: Any = model.config
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary())
    kinds = [TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (config.vocab_size - len(SPECIAL))
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for name, short in BLOCK.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            if f"{layer}.{short}" == without:
                continue
            if short in ("attn_q", "attn_k"):
                weight = interleaved(weight, 4 if short == "attn_q" else 2)
            writer.add_tensor(f"blk.{layer}.{short}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_converted_model_computes_what_the_original_did(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied)
    import_gguf(write_gguf(tmp_path / "tiny.gguf", model), tmp_path / "out", dtype="fp32")
    entries = TensorFolder.open(tmp_path / "out").entries
    expected = {name for name in model.state_dict() if not (tied and name == "lm_head.weight")}
    assert entries.keys() == expected and "model.layers.1.mlp.up_proj.weight" in expected
    assert {entry.dtype for entry in entries.values()} == {torch.float32}
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(converted) is LlamaForCausalLM and converted.config.tie_word_embeddings == tied
    tokens = torch.arange(20).view(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(converted(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_tokenizer_chat_template_and_end_of_text_come_along(tmp_path: Path) -> None:
    import_gguf(write_gguf(tmp_path / "tiny.gguf", tiny_llama(True)), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("hello you", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["hello", "Ġ", "y", "o", "u"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "hello<|im_end|>" and tokenizer(chat, add_special_tokens=False)["input_ids"][-1] == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == 2
    assert {entry.dtype for entry in TensorFolder.open(tmp_path / "out").entries.values()} == {torch.bfloat16}


def test_what_cannot_be_converted_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf", tiny_llama(True))
    files = sorted(tmp_path.iterdir())

    def failure(file: Path, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            import_gguf(file, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "absent.gguf: no such file" in failure(tmp_path / "absent.gguf")
    assert "dtype='int4'" in failure(whole, dtype="int4")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert "pip install 'dora-dist[gguf]'" in failure(whole)
    assert sorted(tmp_path.iterdir()) == files
    (tmp_path / "other.gguf").write_bytes(b"PK" + bytes(100))
    assert "other.gguf: not a GGUF file" in failure(tmp_path / "other.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:-5000])
    assert "cut.gguf: cannot be converted" in failure(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:500])
    assert "cut.gguf: cannot be converted" in failure(tmp_path / "cut.gguf")
    foreign = write_gguf(tmp_path / "foreign.gguf", tiny_llama(True), architecture="wavtokenizer-dec")
    assert "wavtokenizer-dec is not supported" in failure(foreign)
    partial = write_gguf(tmp_path / "partial.gguf", tiny_llama(True), without="1.ffn_up")
    assert "partial.gguf: holds no weights for 'model.layers.1.mlp.up_proj.weight'" in failure(partial)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: already exists"):
        import_gguf(whole, tmp_path / "out")
