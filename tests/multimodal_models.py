"""Tiny random models that see or hear, with processors and tokenizers that are made here too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import tiny_models
import torch
import transformers
from PIL import Image

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
Request = dict[str, Any]
TEXT: dict[str, Any] = {
    **architectures.SHAPE, "vocab_size": 320, "pad_token_id": 3, "max_position_embeddings": 2048,
}  # fmt: skip
VISION: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14,
    projection_dim=64,
)  # fmt: skip


def tokenizer(*special: str, **named: str) -> Any:
    """Return a tokenizer of single bytes and special tokens, first; the named ones are attributes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = [*SPECIAL, *special, *named.values()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*names, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(names)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        **named,
    )


def image(seed: int, width: int = 70, height: int = 50) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def sound(seed: int, seconds: float = 1.0, rate: int = 16000) -> tuple[np.ndarray, int]:
    return np.random.default_rng(seed).standard_normal(int(seconds * rate)).astype(np.float32), rate


def whisper(path: Path) -> list[Request]:
    languages = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|en|>",
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    config = dict(
        vocab_size=320, num_mel_bins=80, d_model=128, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=256,
        decoder_ffn_dim=256, encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=50,
        max_target_positions=128, pad_token_id=3, bos_token_id=1, eos_token_id=2, decoder_start_token_id=5,
    )  # fmt: skip
    architectures.save("WhisperForConditionalGeneration", path, config)
    words = tokenizer(*languages)
    words.save_pretrained(path)
    heard = transformers.WhisperFeatureExtractor(
        feature_size=80, chunk_length=1, n_fft=400, hop_length=160
    )
    heard.save_pretrained(path)
    _set(path / "preprocessor_config.json", processor_class="WhisperProcessor")
    start = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
    return [
        {
            "encoder_prompt": {"prompt": "", "multi_modal_data": {"audio": sound(seed)}},
            "decoder_prompt": start,
        }
        for seed in range(2)
    ]


def _set(file: Path, **entries: Any) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**found, **entries}))


def llava(path: Path) -> list[Request]:
    words = tokenizer("<image>")
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=len(SPECIAL),
    )  # fmt: skip
    architectures.save_config("LlavaForConditionalGeneration", path, config)
    _rename(path, "vision_tower.", "vision_tower.vision_model.")
    seen = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    transformers.LlavaProcessor(
        seen, words, patch_size=14, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(path)  # fmt: skip
    return [_about("<image>", image(seed)) for seed in range(2)]


def _about(token: str, picture: Any) -> Request:
    return {"prompt": f"{token} what is this?", "multi_modal_data": {"image": picture}}


def gemma3(path: Path) -> list[Request]:
    lines = [count * "\n" for count in range(1, 5)]  # tokens of their own, which vLLM looks up
    words = tokenizer(
        *lines,
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    ids = dict(
        zip(("boi_token_index", "eoi_token_index", "image_token_index"), range(8, 11), strict=True)
    )
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT, query_pre_attn_scalar=64),
        vision_config=transformers.SiglipVisionConfig(**VISION), mm_tokens_per_image=4, **ids,
    )  # fmt: skip
    architectures.save_config("Gemma3ForConditionalGeneration", path, config)
    _rename(path, "vision_tower.", "vision_tower.vision_model.")
    seen = transformers.Gemma3ImageProcessorPil(
        size={"height": 56, "width": 56}, do_pan_and_scan=False
    )
    transformers.Gemma3Processor(seen, words, image_seq_length=4).save_pretrained(path)
    return [_about("<start_of_image>", image(seed)) for seed in range(2)]


def qwen2_audio(path: Path) -> list[Request]:
    words = tokenizer("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    config = transformers.Qwen2AudioConfig(
        audio_config=dict(
            num_mel_bins=80, d_model=128, encoder_layers=2, encoder_ffn_dim=256, encoder_attention_heads=2
        ),
        text_config=transformers.Qwen2Config(**TEXT, architectures=["Qwen2ForCausalLM"]), audio_token_index=4,
    )  # fmt: skip
    architectures.save_config("Qwen2AudioForConditionalGeneration", path, config)
    _rename(path, "language_model.model.model.", "language_model.model.")
    heard = transformers.WhisperFeatureExtractor(feature_size=80)
    transformers.Qwen2AudioProcessor(heard, words).save_pretrained(path)
    return [
        {
            "prompt": "<|audio_bos|><|AUDIO|><|audio_eos|>what?",
            "multi_modal_data": {"audio": sound(seed)},
        }
        for seed in range(2)
    ]


def _rename(path: Path, prefix: str, published: str) -> None:
    """Give tensors the names of published checkpoints; Transformers 5.19 writes others."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            tensors[name.replace(prefix, published, 1)] = tensors.pop(name)

    tiny_models.edit(path, change)


def qwen2_5_vl(path: Path) -> list[Request]:
    words = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ids = dict(vision_start_token_id=4, vision_end_token_id=5, image_token_id=6, video_token_id=7)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[8, 12, 12])
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, tie_word_embeddings=False, **ids,
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128, fullatt_block_indexes=[1],
            window_size=56,
        ),
    )  # fmt: skip
    architectures.save_config("Qwen2_5_VLForConditionalGeneration", path, config)
    seen = transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=84 * 84)
    videos = transformers.Qwen2VLVideoProcessor()
    transformers.Qwen2_5_VLProcessor(seen, words, videos).save_pretrained(path)
    return [_about("<|vision_start|><|image_pad|><|vision_end|>", image(seed)) for seed in range(2)]


def _with_experts_as_published(tensors: dict[str, torch.Tensor]) -> None:
    """Turn the matrices of experts around: Transformers 5.19 writes [experts, outputs, inputs]."""
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()


def qwen3_vl_moe(path: Path) -> list[Request]:
    """All experts of a layer are two tensors."""
    words = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ids = dict(vision_start_token_id=4, vision_end_token_id=5, image_token_id=6, video_token_id=7)
    rope = dict(
        rope_type="default", rope_theta=10000.0, mrope_section=[12, 10, 10], mrope_interleaved=True
    )
    text = {
        **TEXT,
        **architectures.CASES["Qwen3MoeForCausalLM"],
        "norm_topk_prob": True,
        "rope_parameters": rope,
    }
    config = transformers.Qwen3VLMoeConfig(
        text_config=text, tie_word_embeddings=False, **ids,
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128,
            num_position_embeddings=16, deepstack_visual_indexes=[0],
        ),
    )  # fmt: skip
    architectures.save_config("Qwen3VLMoeForConditionalGeneration", path, config)
    tiny_models.edit(path, _with_experts_as_published)
    seen = transformers.Qwen2VLImageProcessorPil(
        patch_size=16,
        min_pixels=64 * 64,
        max_pixels=96 * 96,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    videos = transformers.Qwen3VLVideoProcessor()
    transformers.Qwen3VLProcessor(seen, words, videos).save_pretrained(path)
    return [_about("<|vision_start|><|image_pad|><|vision_end|>", image(seed)) for seed in range(2)]


def llama4(path: Path) -> list[Request]:
    special = (
        "<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
    )  # fmt: skip
    words = tokenizer(*special)
    text = {**TEXT, **architectures.CASES["Llama4ForCausalLM"], "pad_token_id": 3}
    config = transformers.Llama4Config(
        text_config=text, boi_token_index=4, eoi_token_index=5, image_token_index=7,
        vision_config=dict(
            hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, image_size=56,
            patch_size=14, vision_output_dim=128, projector_input_dim=128, projector_output_dim=128,
        ),
    )  # fmt: skip
    architectures.save_config("Llama4ForConditionalGeneration", path, config)
    seen = transformers.Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=2)
    transformers.Llama4Processor(seen, words, patch_size=14).save_pretrained(path)
    return [_about("<|image|>", image(seed)) for seed in range(2)]


MODELS: dict[str, Callable[[Path], list[Request]]] = {
    "WhisperForConditionalGeneration": whisper,
    "LlavaForConditionalGeneration": llava,
    "Gemma3ForConditionalGeneration": gemma3,
    "Qwen2AudioForConditionalGeneration": qwen2_audio,
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl,
    "Qwen3VLMoeForConditionalGeneration": qwen3_vl_moe,
    "Llama4ForConditionalGeneration": llama4,
}
