"""A small RL loop: sample, train a step, push the new weights into the running engine; then compare with fresh engines.

    python scripts/rl_loop.py [MODEL] [--steps 2] [--quantization dfloat11] [--tensor-parallel-size 1]

MODEL is a folder with a BF16 checkpoint; models/tiny by default. The engine holds its weights compressed. Each step
samples answers from it, takes one step of REINFORCE with AdamW in BF16 (Transformers), and pushes what was trained:
all weights, in the last step only q_proj of every block and the whole last block. Printed per push: seconds and bytes.
Every step's checkpoint is saved too; at the end a fresh BF16 engine on each must give the greedy tokens and all
log-probabilities that the running engine gave after the push, bit for bit.

Exit status: 0 equal, 1 different, or a push that changed nothing, 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # trainer and engine in one process
os.environ.setdefault(
    "VLLM_CPU_KVCACHE_SPACE", "1"
)  # GiB; on a CPU vLLM takes most of the memory without it
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
PROMPT_LENGTHS = (5, 14)
NUM_SAMPLES, NUM_TOKENS, LEARNING_RATE = 4, 8, 1e-3

Pairs = list[tuple[str, torch.Tensor]]
Answers = list[dict[str, Any]]


class Receiver:
    """vLLM's worker_extension_cls: the method that this loop adds to every worker.

    A whole model goes through reload_weights, which takes effect on all ranks or on none. It refuses a part of a fused
    layer (q_proj of qkv_proj); the model's own load_weights takes parts, and the rest keeps its values.
    """

    def receive(self: Any, source: str | Pairs, is_whole: bool) -> None:
        pairs: Iterable[Any] = load_file(source).items() if isinstance(source, str) else source
        if is_whole:
            self.reload_weights(weights_iterator=iter(pairs))
        else:
            self.model_runner.get_model().load_weights(pairs)


class Engine:
    """A running engine: samples for the trainer, takes its weights, and answers for the comparison."""

    def __init__(self, model: Path, args: argparse.Namespace, quantization: str | None) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(model),
            quantization=quantization,
            tensor_parallel_size=args.tensor_parallel_size,
            worker_extension_cls=f"{Path(__file__).stem}.{Receiver.__name__}",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=128,
            max_logprobs=-1,
            seed=0,
        )

    def _generate(self, prompt: list[int], **how: Any) -> Any:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, **how)
        return self.llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0]

    def sample(self, prompts: list[list[int]], step: int) -> list[tuple[list[int], list[int]]]:
        """Return (prompt, answer) pairs, several per prompt."""
        found = []
        for prompt in prompts:
            output = self._generate(prompt, temperature=1.0, n=NUM_SAMPLES, seed=step)
            found += [(prompt, list(answer.token_ids)) for answer in output.outputs]
        return found

    def answer(self, prompts: list[list[int]]) -> Answers:
        """Return greedy tokens and the log-probabilities of the whole vocabulary; one prompt at a time, since batches
        change bits."""
        found = []
        for prompt in prompts:
            (output,) = self._generate(prompt, temperature=0, logprobs=-1).outputs
            logprobs = [{t: e.logprob for t, e in at.items()} for at in output.logprobs]
            found.append({"tokens": list(output.token_ids), "logprobs": logprobs})
        return found

    def push(self, pairs: Pairs, is_whole: bool) -> float:
        """Give new weights to the engine, and return the seconds that it took."""
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
            source: str | Pairs = pairs
            if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":  # workers are other processes
                source = str(Path(folder) / "weights.safetensors")
                save_file({name: tensor.contiguous() for name, tensor in pairs}, source)
            self.llm.collective_rpc("receive", args=(source, is_whole))
        self.llm.reset_prefix_cache()  # it holds keys and values of the old weights
        return time.perf_counter() - begin

    def stop(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def memory_folder() -> str | None:
    """Return a folder in memory, where there is one, for weights that go to other processes."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


class Trainer:
    """A BF16 model of Transformers, trained by REINFORCE: an answer's reward is its share of distinct tokens."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def step(
        self, samples: list[tuple[list[int], list[int]]], is_whole: bool
    ) -> tuple[float, Pairs]:
        """Take one step of the optimizer; return the mean reward, and the weights that were trained."""
        trained = [(n, p) for n, p in self.model.named_parameters() if is_whole or self.is_part(n)]
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for _, parameter in trained:
            parameter.requires_grad_(True)
        rewards = torch.tensor([len(set(answer)) / len(answer) for _, answer in samples])
        self.optimizer.zero_grad()
        for (prompt, answer), advantage in zip(samples, rewards - rewards.mean(), strict=True):
            logits = self.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.float().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            (-advantage * chosen.mean() / len(samples)).backward()
        self.optimizer.step()
        return rewards.mean().item(), [(name, p.detach()) for name, p in trained]

    def is_part(self, name: str) -> bool:
        """Return whether a partial step trains this parameter: q_proj everywhere, and the whole last block."""
        last = f".layers.{self.model.config.num_hidden_layers - 1}."
        return "q_proj" in name or last in name

    def save(self, folder: Path) -> Path:
        self.model.save_pretrained(folder)
        return folder


def run(args: argparse.Namespace, folder: Path) -> int:
    """Do what the module says, with checkpoints in `folder`, and return the exit status."""
    engine = Engine(
        args.model, args, args.quantization
    )  # first: on a CPU it binds threads to cores
    trainer = Trainer(args.model)
    size = trainer.model.config.vocab_size
    prompts = [[(7 * i + 13 * k) % (size - 3) + 3 for i in range(k)] for k in PROMPT_LENGTHS]
    answers, lines, status = [engine.answer(prompts)], [], 0
    for step in range(1, args.steps + 1):
        is_whole = step < args.steps
        begin = time.perf_counter()
        reward, pairs = trainer.step(engine.sample(prompts, step), is_whole)
        trained = time.perf_counter() - begin
        seconds = engine.push(pairs, is_whole)
        num_bytes = sum(tensor.nbytes for _, tensor in pairs)
        lines.append(
            f"step {step}: reward {reward:.4f}, sampled and trained in {trained:.2f} s, pushed {len(pairs)} tensors, "
            f"{num_bytes} bytes of BF16, in {seconds:.3f} s"
        )
        print(lines[-1], flush=True)
        answers.append(engine.answer(prompts))
        trainer.save(folder / str(step))
    engine.stop()
    for step in range(1, args.steps + 1):
        fresh = Engine(folder / str(step), args, None)
        is_equal, has_moved = (
            fresh.answer(prompts) == answers[step],
            answers[step] != answers[step - 1],
        )
        fresh.stop()
        shutil.rmtree(folder / str(step))
        status |= not (is_equal and has_moved)
        verdict = "equal" if is_equal else "DIFFERENT"
        print(
            f"step {step}: {verdict}: tokens and log-probabilities of the running engine and of a fresh BF16 engine on "
            f"the trained checkpoint{'' if has_moved else '; but the push CHANGED NOTHING'}",
            flush=True,
        )
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "models" / "tiny")
    parser.add_argument("--steps", type=int, default=2, help="the last one is partial; default 2")
    parser.add_argument("--quantization", default="dfloat11", help="of the running engine")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; expected 1 or more")
    if not (args.model / "config.json").is_file():
        parser.error(
            f"{args.model}: no config.json there; expected a folder with a BF16 checkpoint"
        )
    if args.tensor_parallel_size > 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    with tempfile.TemporaryDirectory(prefix="rl-loop-") as folder:
        return run(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
