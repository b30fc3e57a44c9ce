"""Train the small model in models/tiny from scratch on text that every Python ships with.

What: a byte-level Llama of 3.3 M parameters (4 layers, hidden 256, 4 heads of 64, 2 KV heads, separate lm_head),
saved in BF16 as an ordinary Hugging Face folder. It shows a person that serving works: its samples are recognisably
text. Tests of exactness would need no training.

How: the text is the docstrings of the running interpreter's standard library and the language reference that `help()`
prints, one document after another between BOS and EOS. Matrices inside the layers are trained with Muon, all else with
AdamW; cosine schedule, BF16 autocast. Weights, split and batches come from a fixed seed. Another Python version has
other text and gives another model; training.json records the versions, the hash of the text and the losses.

    python scripts/train_tiny.py --out models/tiny        # 5 to 10 minutes on 2 CPU cores
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import random
import runpy
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 11
BOS, EOS = 256, 257  # after the 256 bytes
VOCAB_SIZE = 272  # 258 in use, rounded up to a multiple of 16
WINDOW, BATCH, STEPS, WARMUP = 512, 4, 1000, 40
MUON_LR, ADAMW_LR = 5e-3, 5e-3
THREADS = 2
# Test data, generated code and what only some installations have.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip"}
)


def read_documents() -> list[str]:
    """Return the standard library's docstrings and the language reference, each text once, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                texts.add(ast.get_docstring(node) or "")
    texts.update(runpy.run_path(str(root / "pydoc_data" / "topics.py"))["topics"].values())
    return sorted(text for text in texts if len(text) >= 80)


def split_and_join(documents: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (training ids, validation ids); 4 % of the documents are kept out of training."""
    shuffled = list(documents)
    random.Random(SEED).shuffle(shuffled)
    cut = len(shuffled) // 25

    def join(part: list[str]) -> torch.Tensor:
        return torch.tensor([i for text in part for i in (BOS, *text.encode(), EOS)])

    return join(shuffled[cut:]), join(shuffled[:cut])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are the byte values; it puts BOS before a prompt."""
    # ByteLevel writes each byte as one printable character; this is its table, byte -> character.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable}
    character |= {byte: chr(256 + i) for i, byte in enumerate(others)}

    tokenizer = Tokenizer(models.BPE(vocab={character[i]: i for i in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_model() -> LlamaForCausalLM:
    """Return the untrained model, in float32."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss in nats per byte of windows ids[batch, length + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(
        logits.float().reshape(-1, VOCAB_SIZE), ids[:, 1:].reshape(-1)
    )


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Return the loss over up to 128 consecutive windows of `ids`."""
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:128]
    return sum(loss_of(model, part).item() * len(part) for part in windows.split(16)) / len(windows)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers and AdamW for all else."""
    inner = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    inner_ids = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in inner_ids]
    return [
        torch.optim.Muon(inner, lr=MUON_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(model: LlamaForCausalLM, ids: torch.Tensor, steps: int) -> float:
    """Train in place and return the mean training loss of the last 50 steps."""
    optimizers = build_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda i: min(1.0, (i + 1) / WARMUP) * (0.51 + 0.49 * math.cos(math.pi * i / steps)),
        )
        for optimizer in optimizers
    ]
    draw = torch.Generator().manual_seed(SEED)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        starts = torch.randint(len(ids) - WINDOW, (BATCH,), generator=draw).tolist()
        loss = loss_of(model, torch.stack([ids[i : i + WINDOW + 1] for i in starts]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        model.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {step + 1}/{steps}  loss {recent:.3f}  {seconds:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Return the prompt and a continuation at temperature 0.7."""
    torch.manual_seed(SEED)
    inputs: Any = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(
        **inputs, max_new_tokens=300, do_sample=True, temperature=0.7, pad_token_id=EOS
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def save(
    out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]
) -> None:
    """Write the Hugging Face folder and training.json."""
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    # Transformers 5 writes a class name that older versions do not have; this one exists in both.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="train the small model that the repository ships")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    documents = read_documents()
    train_ids, validation_ids = split_and_join(documents)
    print(f"{len(documents)} documents, {len(train_ids)} bytes to train on")
    model = build_model()
    train_loss = train(model, train_ids, args.steps)
    model.eval().to(torch.bfloat16)
    tokenizer = build_tokenizer()
    record = {
        "text": "documentation strings and language reference of Python's standard library",
        "text_sha256": hashlib.sha256("\0".join(documents).encode()).hexdigest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": model.num_parameters(),
        "seed": SEED,
        "threads": THREADS,
        "steps": args.steps,
        "bytes_per_step": BATCH * WINDOW,
        "train_loss_nats_per_byte": round(train_loss, 4),
        "validation_loss_nats_per_byte": round(evaluate(model, validation_ids), 4),
    }
    save(args.out, model, tokenizer, record)
    print(json.dumps(record, indent=2))
    print(sample(model, tokenizer, "Return a "))


if __name__ == "__main__":
    main()
