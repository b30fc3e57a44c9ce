"""Random LoRA adapters in PEFT's form for the tiny checkpoints, and answers of a batch in which they are mixed."""

import json
from pathlib import Path
from typing import Any

import torch
from engines import PROMPTS, values
from safetensors import safe_open
from safetensors.torch import save_file

RANK = 8
EMBEDDING = "embed_tokens"
# Two adapters in one batch, and a third place free.
ENGINE: dict[str, Any] = dict(enable_lora=True, max_loras=2, max_lora_rank=RANK, max_cpu_loras=3)


def save(model: Path, path: Path, seed: int, targets: tuple[str, ...] = ()) -> Path:
    """Write an adapter for the linear layers of a checkpoint into `path`, and return it.

    Args:
        targets: last parts of the names of the layers; by default all linear layers of the blocks.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.1).bfloat16()

    tensors, names = {}, set()
    with safe_open(model / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    if "lm_head" in targets and "lm_head.weight" not in shapes:  # tied
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for key, shape in shapes.items():
        module = key.removesuffix(".weight")
        last = module.rpartition(".")[2]
        is_asked = last in targets if targets else last.endswith("_proj")
        if len(shape) != 2 or not key.endswith(".weight") or not is_asked:
            continue
        rows, cols = shape
        names.add(last)
        if last == EMBEDDING:
            tensors[f"base_model.model.{module}.lora_embedding_A"] = random(RANK, rows)
            tensors[f"base_model.model.{module}.lora_embedding_B"] = random(cols, RANK)
        else:
            tensors[f"base_model.model.{module}.lora_A.weight"] = random(RANK, cols)
            tensors[f"base_model.model.{module}.lora_B.weight"] = random(rows, RANK)
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16}
    (path / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": sorted(names)})
    )
    return path


def ask(llm: Any, *adapters: Path) -> list[Any]:
    """Return the answers to one prompt without an adapter, then of one batch with a prompt per adapter.

    On a CPU, BF16 vLLM itself gives a prompt without an adapter the answer of one, if a batch has two.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(
        temperature=0, max_tokens=6, logprobs=-1, ignore_eos=True, detokenize=False
    )
    found = []
    for paths in ([None], adapters):
        requests = [
            path and LoRARequest(path.name, _ids.setdefault(path, len(_ids) + 1), str(path))
            for path in paths
        ]
        prompts = [{"prompt_token_ids": PROMPTS[0]}] * len(requests)
        outputs = llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        found += [(list(a.token_ids), [values(at) for at in a.logprobs]) for a in answers]
    return found


_ids: dict[Path, int] = {}
