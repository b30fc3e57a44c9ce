"""Models that are already quantized: compress and plan refuse them alike, and no command prints a line per tensor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_commands import only_line
from safetensors.torch import save_file

from vllm_dfloat.cli import main
from vllm_dfloat.convert.left import left_lines

Tensors = dict[str, torch.Tensor]

HIDDEN, LAYERS = 64, 2
CONFIG: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=HIDDEN, intermediate_size=128,
    num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2, vocab_size=96,
    max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
}  # fmt: skip


def bf16(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()


def llama() -> Tensors:
    tensors = {f"{name}.weight": bf16(96, HIDDEN) for name in ("model.embed_tokens", "lm_head")}
    tensors["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
    for i in range(LAYERS):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{i}.{name}.weight"] = bf16(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
    return tensors


def replaced(**of_each: Any) -> Tensors:
    """Return the model with every projection's weight replaced by the functions' results, under their keyword names."""
    tensors = llama()
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors.pop(name)
        for suffix, make in of_each.items():
            tensors[name.removesuffix("weight") + suffix.replace("__", ".")] = make(*weight.shape)
    return tensors


def ints(dtype: torch.dtype, rows: int = 1, cols: int = 1) -> Any:
    return lambda n, k: torch.zeros(max(1, n // rows), max(1, k // cols), dtype=dtype)


def fp8(n: int, k: int) -> torch.Tensor:
    return torch.zeros(n, k).to(torch.float8_e4m3fn)


def scale(n: int, k: int) -> torch.Tensor:
    return torch.ones(n, 1)


def mxfp4() -> Tensors:
    tensors = {name: tensor for name, tensor in llama().items() if ".mlp." not in name}
    for i in range(LAYERS):
        experts = f"model.layers.{i}.mlp.experts.gate_up_proj"
        tensors[f"{experts}_blocks"] = torch.zeros(4, 256, 2, 16, dtype=torch.uint8)
        tensors[f"{experts}_scales"] = torch.zeros(4, 256, 2, dtype=torch.uint8)
    return tensors


# kind of checkpoint: (its tensors, its quantization_config)
KINDS: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "FP8, scales per block": (
        replaced(weight=fp8, weight_scale_inv=lambda n, k: torch.ones(1, 1)),
        dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128]),
    ),
    "GPTQ": (
        replaced(
            qweight=ints(torch.int32, 8), qzeros=ints(torch.int32, 64, 8), scales=scale,
            g_idx=lambda n, k: torch.zeros(k, dtype=torch.int32),
        ),
        dict(quant_method="gptq", bits=4, group_size=128),
    ),
    "AWQ": (
        replaced(qweight=ints(torch.int32, 1, 8), qzeros=ints(torch.int32, 64, 8), scales=scale),
        dict(quant_method="awq", bits=4, version="gemm"),
    ),
    "MXFP4": (mxfp4(), dict(quant_method="mxfp4")),
    "bitsandbytes, 4 bits": (
        replaced(
            weight=lambda n, k: torch.zeros(n * k // 2, 1, dtype=torch.uint8),
            weight__absmax=lambda n, k: torch.ones(n),
            weight__quant_map=lambda n, k: torch.ones(16),
        ),
        dict(quant_method="bitsandbytes", load_in_4bit=True),
    ),
    "bitsandbytes, 8 bits": (
        replaced(weight=ints(torch.int8), SCB=lambda n, k: torch.ones(n)),
        dict(quant_method="bitsandbytes", load_in_8bit=True),
    ),
    "compressed-tensors": (
        replaced(weight_packed=ints(torch.int32, 1, 8), weight_scale=scale),
        dict(quant_method="compressed-tensors", format="pack-quantized", config_groups={}),
    ),
    "NVFP4": (
        replaced(
            weight=ints(torch.uint8, 1, 2), weight_scale=fp8, weight_scale_2=lambda n, k: torch.ones(1)
        ),
        dict(quant_method="modelopt", quant_algo="NVFP4"),
    ),
    "MLX": (
        replaced(weight=ints(torch.uint32, 1, 8), scales=bf16, biases=bf16),
        dict(group_size=64, bits=4),
    ),
}  # fmt: skip


def save(folder: Path, tensors: Tensors, **changes: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def refusals(model: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the errors of compress and plan for a model, and check that they write nothing."""
    before = {path.name for path in model.parent.iterdir()}
    told = set()
    for command in (["compress", str(model), str(model.parent / "t")], ["plan", str(model)]):
        more = ["--gpu-memory", "4GiB"] if command[0] == "plan" else []
        assert main([*command, *more]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        told.add(only_line(err))
    assert {path.name for path in model.parent.iterdir()} == before
    return told


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
@pytest.mark.parametrize("part", ["", "text_config", "vision_config"])
@pytest.mark.parametrize("kind", ["FP8, scales per block", "MLX"])
def test_a_config_that_names_a_method_is_refused_by_compress_as_by_plan(
    kind: str, part: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: compressed with exit 0 into a checkpoint with two quantization configs.
    method = KINDS[kind][1]
    changes = {part: {key: method}} if part else {key: method}
    model = save(tmp_path / "m", llama(), **changes)
    (told,) = refusals(model, capsys)
    expected = "'fp8'" if kind.startswith("FP8") else "an object of 2"
    place = f"{part}.{key}" if part else key
    assert told == (
        f"vllm-dfloat: {model}/config.json: {place} is {expected}, so its weights are not BF16; expected a model in "
        "BF16. Take the original, from which this one was quantized."
    )


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_tensors_are_refused_without_a_word_in_the_config(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "m", KINDS[kind][0])
    (told,) = refusals(model, capsys)
    assert told.startswith(f"vllm-dfloat: {model}: model.layers.0.")
    assert "other tensors are of quantized weights, so its weights are not BF16" in told


@pytest.mark.parametrize("kind", KINDS)
def test_verify_and_inspect_of_a_quantized_model_have_sensible_output(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, method = KINDS[kind]
    model = save(tmp_path / "m", tensors, quantization_config=method)
    assert main(["verify", str(model)]) == 0
    out, err = capsys.readouterr()
    assert only_line(out).startswith(f"{model}: {len(tensors)} tensors")
    assert err == ""
    assert main(["verify", str(model), "--against", str(model)]) == 0
    assert main(["inspect", str(model)]) == 0
    assert "nothing is compressed on disk" in capsys.readouterr().out.splitlines()[-1]


def test_the_file_that_modelopt_writes_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "m", llama())
    file = model / "hf_quant_config.json"
    file.write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    (told,) = refusals(model, capsys)
    assert told.startswith(f"vllm-dfloat: {file}: quantization is 'FP8', so its weights are not")
    of_cache = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    file.write_text(json.dumps(of_cache))
    assert main(["compress", str(model), str(tmp_path / "t"), "--quiet"]) == 0


def test_our_own_options_scales_of_the_cache_and_masks_are_no_quantization(tmp_path: Path) -> None:
    tensors = llama()
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    tensors["model.layers.0.self_attn.bias"] = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    tensors["embeddings.position_ids"] = torch.zeros(1, 8, dtype=torch.int64)
    options = {"quant_method": "dfloat11", "ignore": ["lm_head"]}
    model = save(tmp_path / "m", tensors, quantization_config=options)
    assert main(["compress", str(model), str(tmp_path / "t"), "--quiet"]) == 0


def test_one_line_with_a_count_says_why_many_tensors_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: a line per tensor, hundreds for one reason.
    tensors = llama()
    for i in range(30):
        tensors[f"blocks.{i}.conv.weight"] = bf16(8, 8, 3)
        tensors[f"blocks.{i}.tiny.weight"] = bf16(3 + i % 2, 4)
    tensors["single.weight"] = torch.zeros(8, 8)
    model = save(tmp_path / "m", tensors)
    assert main(["compress", str(model), str(tmp_path / "t")]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert "all decoded and compared" in last
    assert len(lines) == 3
    told = "\n".join(lines)
    assert (
        "30 tensors, blocks.0.conv.weight to blocks.29.conv.weight: stay as they are: it is not the weight of"
        in told
    )
    assert "single.weight: stays as it is: it is F32; the format holds BF16" in told
    assert "30 tensors, blocks.0.tiny.weight to blocks.29.tiny.weight: stay as they are: " in told


def test_reasons_that_differ_in_numbers_only_are_one_line_that_says_so() -> None:
    left = {f"l.{i}": f"compressed it would take {9 + i} bytes, as it is {i}" for i in range(3)}
    assert left_lines(left) == [
        "3 tensors, l.0 to l.2: stay as they are: compressed it would take 9 bytes, as it is 0 (the first of them)"
    ]
    assert left_lines({"a": "x", "b": "y"}) == [
        "a: stays as it is: x",
        "b: stays as it is: y",
    ]
