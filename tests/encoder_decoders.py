"""Tiny random encoder-decoders of which Transformers has no class: with the config and the names of published ones."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import multimodal_models
import torch
from safetensors.torch import save_file

WIDTH, INNER, VOCABULARY, LAYERS, HEADS, CHANNELS, MELS = 128, 256, 320, 2, 2, 32, 80
SEED = 20240611


class Tensors(dict[str, torch.Tensor]):
    """The tensors of a checkpoint, random."""

    def normal(self, name: str, *shape: int) -> None:
        self[name] = torch.empty(shape).normal_(std=0.02).bfloat16()

    def linear(self, name: str, rows: int, cols: int) -> None:
        self.normal(f"{name}.weight", rows, cols)
        self.normal(f"{name}.bias", rows)

    def norm(self, name: str, width: int = WIDTH) -> None:
        self[f"{name}.weight"] = torch.empty(width).normal_(1, 0.02).bfloat16()
        self.normal(f"{name}.bias", width)

    def convolution(self, name: str, *shape: int) -> None:
        self.normal(f"{name}.weight", *shape)
        self.normal(f"{name}.bias", shape[0])

    def save(self, path: Path) -> None:
        save_file(self, path / "model.safetensors", metadata={"format": "pt"})


def _write_config(path: Path, **entries: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(entries, dtype="bfloat16")))


def cohere_asr(path: Path) -> list[multimodal_models.Request]:
    """Write a model of CohereLabs' for transcription: a Conformer that hears, a decoder that writes."""
    _with_mel_scale()
    torch.manual_seed(SEED)
    _write_config(path, **COHERE_ASR)
    tensors = Tensors()
    _conformer(tensors)
    tensors.normal("transf_decoder._embedding.token_embedding.weight", VOCABULARY, WIDTH)
    tensors.norm("transf_decoder._embedding.layer_norm")
    for layer in range(LAYERS):
        at = f"transf_decoder._decoder.layers.{layer}"
        for attention in ("first_sub_layer", "second_sub_layer"):
            for part in ("query_net", "key_net", "value_net", "out_projection"):
                tensors.linear(f"{at}.{attention}.{part}", WIDTH, WIDTH)
        tensors.linear(f"{at}.third_sub_layer.dense_in", INNER, WIDTH)
        tensors.linear(f"{at}.third_sub_layer.dense_out", WIDTH, INNER)
        for norm in ("layer_norm_1", "layer_norm_2", "layer_norm_3"):
            tensors.norm(f"{at}.{norm}")
    tensors.norm("transf_decoder._decoder.final_layer_norm")
    tensors.linear("log_softmax.mlp.layer0", VOCABULARY, WIDTH)
    tensors.save(path)
    multimodal_models.tokenizer("<|startoftranscript|>", "<|en|>").save_pretrained(path)
    start = "<|startoftranscript|><|en|>"
    return [
        {"prompt": start, "multi_modal_data": {"audio": multimodal_models.sound(seed)}}
        for seed in range(2)
    ]


COHERE_ASR: dict[str, Any] = dict(
    architectures=["CohereAsrForConditionalGeneration"], model_type="cohere_asr", vocab_size=VOCABULARY,
    is_encoder_decoder=True, sample_rate=16000, max_audio_clip_s=2, overlap_chunk_second=1, pad_token_id=3,
    bos_token_id=1, eos_token_id=2, max_position_embeddings=128,
    head=dict(num_classes=VOCABULARY, hidden_size=WIDTH),
    transf_decoder=dict(
        config_dict=dict(
            hidden_size=WIDTH, inner_size=INNER, hidden_act="relu", num_attention_heads=HEADS, num_layers=LAYERS,
            max_sequence_length=128,
        )
    ),
    encoder=dict(
        feat_in=MELS, n_layers=LAYERS, d_model=WIDTH, feat_out=-1, causal_downsampling=False, subsampling="dw_striding",
        subsampling_factor=8, subsampling_conv_channels=CHANNELS, ff_expansion_factor=2, self_attention_model="rel_pos",
        n_heads=HEADS, att_context_size=[-1, -1], xscaling=False, untie_biases=True, pos_emb_max_len=500,
        conv_kernel_size=9, conv_norm_type="batch_norm", conv_context_size=None,
    ),
    preprocessor=dict(
        sample_rate=16000, features=MELS, window_size=0.025, window_stride=0.01, n_fft=512, dither=0.0, pad_to=0
    ),
)  # fmt: skip


def _conformer(tensors: Tensors) -> None:
    tensors.linear("encoder.pre_encode.out", WIDTH, CHANNELS * MELS // 8)
    for index in (0, 2, 5):
        tensors.convolution(f"encoder.pre_encode.conv.{index}", CHANNELS, 1, 3, 3)
    for index in (3, 6):
        tensors.convolution(f"encoder.pre_encode.conv.{index}", CHANNELS, CHANNELS, 1, 1)
    for layer in range(LAYERS):
        at = f"encoder.layers.{layer}"
        for half in ("feed_forward1", "feed_forward2"):
            tensors.linear(f"{at}.{half}.linear1", INNER, WIDTH)
            tensors.linear(f"{at}.{half}.linear2", WIDTH, INNER)
        for part in ("linear_q", "linear_k", "linear_v", "linear_out"):
            tensors.linear(f"{at}.self_attn.{part}", WIDTH, WIDTH)
        tensors.normal(f"{at}.self_attn.linear_pos.weight", WIDTH, WIDTH)
        for bias in ("pos_bias_u", "pos_bias_v"):
            tensors.normal(f"{at}.self_attn.{bias}", HEADS, WIDTH // HEADS)
        tensors.convolution(f"{at}.conv.pointwise_conv1", 2 * WIDTH, WIDTH, 1)
        tensors.convolution(f"{at}.conv.depthwise_conv", WIDTH, 1, 9)
        tensors.convolution(f"{at}.conv.pointwise_conv2", WIDTH, WIDTH, 1)
        tensors.norm(f"{at}.conv.batch_norm")
        tensors.normal(f"{at}.conv.batch_norm.running_mean", WIDTH)
        tensors[f"{at}.conv.batch_norm.running_var"] = torch.ones(WIDTH).bfloat16()
        for norm in ("feed_forward1", "self_att", "conv", "feed_forward2", "out"):
            tensors.norm(f"{at}.norm_{norm}")


def _with_mel_scale() -> None:
    """Give vLLM the one function that it takes from torchaudio where that is not installed: Transformers' own."""
    if importlib.util.find_spec("torchaudio") is not None:
        return

    def melscale_fbanks(
        n_freqs: int, f_min: float, f_max: float, n_mels: int, sample_rate: int, **kind: str
    ) -> Any:
        from transformers.audio_utils import mel_filter_bank

        found = mel_filter_bank(n_freqs, n_mels, f_min, f_max, sample_rate, **kind)
        return torch.from_numpy(found).float()

    for name in ("torchaudio", "torchaudio.functional"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["torchaudio"].functional = sys.modules["torchaudio.functional"]  # type: ignore[attr-defined]
    sys.modules["torchaudio.functional"].melscale_fbanks = melscale_fbanks  # type: ignore[attr-defined]


def nemotron_parse(path: Path) -> list[multimodal_models.Request]:
    import nemotron_parse

    return nemotron_parse.save(path)


MODELS = {
    "CohereAsrForConditionalGeneration": cohere_asr,
    "NemotronParseForConditionalGeneration": nemotron_parse,
}
