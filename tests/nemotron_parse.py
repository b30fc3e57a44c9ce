"""A tiny random NemotronParse: an image is read by RADIO, of two blocks here, and written down by a decoder of mBART's.

Its config and its processor are code beside its weights; here as much of them as vLLM reads.
"""

import json
from pathlib import Path

import multimodal_models
import torch
from encoder_decoders import Tensors

SEED, VOCABULARY, WIDTH, INNER, BLOCKS, PATCH = 20240611, 320, 1024, 128, 2, 16
SEEN = 1280  # the width of RADIO; vLLM's neck has it in its code, as it has WIDTH
SIZE = (64, 64)

CONFIG = """
from transformers import PreTrainedConfig


class NemotronParseConfig(PreTrainedConfig):
    model_type = "nemotron_parse"

    def __init__(self, encoder=None, decoder=None, image_size=(64, 64), **kwargs):
        self.encoder = PreTrainedConfig(**(encoder or {}))
        self.decoder = PreTrainedConfig(**(decoder or {}))
        self.image_size = list(image_size)
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        return self.decoder
"""
PROCESSOR = """
import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin


class NemotronParseProcessor(ProcessorMixin):
    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)

    def __call__(self, text=None, images=None, **kwargs):
        found = dict(self.tokenizer(text, return_tensors="pt", add_special_tokens=False)) if text is not None else {}
        if images is not None:
            images = images if isinstance(images, list) else [images]
            pixels = [np.asarray(image.convert("RGB").resize((64, 64))) / 127.5 - 1 for image in images]
            found["pixel_values"] = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
        return BatchFeature(found)
"""


def save(path: Path, seed: int = SEED) -> list[multimodal_models.Request]:
    """Write the model into `path`, and return what to ask it."""
    from vllm.transformers_utils.configs import radio

    # The published depth of 32 takes 1.3 GB.
    radio.VIT_TIMM_DIM_BY_NAME["vit_huge_patch16_224"] = (SEEN, BLOCKS, 16, INNER)
    torch.manual_seed(seed)
    path.mkdir(parents=True, exist_ok=True)
    _write_config(path)
    tensors = Tensors()
    _encoder(tensors)
    _decoder(tensors)
    tensors.save(path)
    multimodal_models.tokenizer("<s_page>").save_pretrained(path)
    return [
        {"encoder_prompt": {"prompt": "", "multi_modal_data": {"image": multimodal_models.image(seed, 64, 64)}},
         "decoder_prompt": "<s_page>"}
        for seed in range(2)
    ]  # fmt: skip


def _write_config(path: Path) -> None:
    (path / "configuration_nemotron_parse.py").write_text(CONFIG)
    (path / "processing_nemotron_parse.py").write_text(PROCESSOR)
    teachers = [{"name": name, "use_summary": True} for name in ("a", "b", "c")]
    radio = dict(
        model="vit_huge_patch16_224", patch_size=PATCH, cpe_max_size=64, register_multiple=8,
        teachers=teachers, cls_token_per_teacher=True,
    )  # fmt: skip
    decoder = dict(
        model_type="mbart", vocab_size=VOCABULARY, d_model=WIDTH, hidden_size=WIDTH, decoder_layers=BLOCKS,
        num_hidden_layers=BLOCKS, decoder_attention_heads=16, num_attention_heads=16, encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER, activation_function="gelu", scale_embedding=True, max_position_embeddings=512,
        is_decoder=True, add_cross_attention=True, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    auto = {
        "AutoConfig": "configuration_nemotron_parse.NemotronParseConfig",
        "AutoProcessor": "processing_nemotron_parse.NemotronParseProcessor",
    }
    entries = dict(
        architectures=["NemotronParseForConditionalGeneration"], model_type="nemotron_parse", dtype="bfloat16",
        is_encoder_decoder=True, image_size=SIZE, auto_map=auto, encoder=dict(args=radio, patch_size=PATCH),
        decoder=decoder, bos_token_id=1, eos_token_id=2, pad_token_id=3, decoder_start_token_id=4,
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(entries))
    processor = dict(auto_map=auto, processor_class="NemotronParseProcessor")
    (path / "processor_config.json").write_text(json.dumps(processor))


def _encoder(tensors: Tensors) -> None:
    at = "encoder.model_encoder.radio_model.model"
    tensors.normal(f"{at}.patch_generator.embedder.weight", SEEN, 3 * PATCH * PATCH)
    tensors.normal(f"{at}.patch_generator.pos_embed", 1, (SIZE[0] // PATCH) ** 2, SEEN)
    tensors.normal(f"{at}.patch_generator.cls_token.token", 8, SEEN)
    for layer in range(BLOCKS):
        block = f"{at}.blocks.{layer}"
        tensors.linear(f"{block}.attn.qkv", 3 * SEEN, SEEN)
        tensors.linear(f"{block}.attn.proj", SEEN, SEEN)
        tensors.linear(f"{block}.mlp.fc1", INNER, SEEN)
        tensors.linear(f"{block}.mlp.fc2", SEEN, INNER)
        for norm in ("norm1", "norm2"):
            tensors.norm(f"{block}.{norm}", SEEN)
    tensors.convolution("encoder.conv1", WIDTH, SEEN, 1)
    tensors.normal("encoder.conv2.weight", WIDTH, WIDTH, 1, 4)
    tensors.linear("encoder.sum_proj", WIDTH, 3 * SEEN)
    for norm in ("layer_norm1", "layer_norm2", "layer_norm3"):
        tensors.norm(f"encoder.{norm}", WIDTH)


def _decoder(tensors: Tensors) -> None:
    tensors.normal("decoder.embed_tokens.weight", VOCABULARY, WIDTH)
    for layer in range(BLOCKS):
        at = f"decoder.layers.{layer}"
        for attention in ("self_attn", "encoder_attn"):
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                tensors.linear(f"{at}.{attention}.{part}", WIDTH, WIDTH)
            tensors.norm(f"{at}.{attention}_layer_norm", WIDTH)
        tensors.linear(f"{at}.fc1", INNER, WIDTH)
        tensors.linear(f"{at}.fc2", WIDTH, INNER)
        tensors.norm(f"{at}.final_layer_norm", WIDTH)
    for norm in ("layernorm_embedding", "layer_norm"):
        tensors.norm(f"decoder.{norm}", WIDTH)
    tensors.normal("lm_head.weight", VOCABULARY, WIDTH)
