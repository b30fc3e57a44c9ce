"""`vllm-dfloat plan` as a user types it: exit status, table, JSON, picture, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from tiny_models import SHIPPED

from vllm_dfloat.cli import main
from vllm_dfloat.plan.byte_sizes import show_size
from vllm_dfloat.plan.kv_cache import DTYPE_BYTES
from vllm_dfloat.plan.states import STATE_DTYPES

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
GIB = 1 << 30


def config_of(name: str) -> str:
    return str(CONFIGS / f"{name}.json")


@pytest.fixture
def edited(tmp_path: Path):
    """Return a function that writes the 8B's config with changes, and returns its folder; None removes an entry."""

    def write(**changes: Any) -> str:
        config = {**json.loads((CONFIGS / "Llama-3.1-8B.json").read_text()), **changes}
        config = {name: value for name, value in config.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


@pytest.mark.parametrize(
    ("memory", "num_bytes"),
    [
        ("80GiB", 80 << 30),
        ("80GB", 80 * 10**9),
        ("80 gib", 80 << 30),
        ("1.5GB", 15 * 10**8),
        ("24GB", 24 * 10**9),
        ("24G", 24 * 10**9),
        ("24g", 24 * 10**9),
        ("24000MB", 24 * 10**9),
        ("24000M", 24 * 10**9),
        ("24576MiB", 24 << 30),
        ("4096B", 4096),
    ],
)
def test_units_of_memory(memory: str, num_bytes: int, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", config_of("Llama-3.1-8B"), "--gpu-memory", memory, "--json"])
    assert json.loads(capsys.readouterr().out)["gpu_memory"] == num_bytes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu-memory", "80 potatoes"], "not a size"),
        (["--gpu-memory=-8GiB"], "not a size"),
        (["--gpu-memory", "GiB"], "not a size"),
        (["--gpu-memory", "24"], "no unit; expected GiB or MiB (2**30 or 2**20 bytes"),
        (["--gpu-memory", "24"], "If GiB is meant: --gpu-memory 24GiB."),
        (["--gpu-memory", "24GiB", "--kv-cache-memory", "10"], "--kv-cache-memory 10: no unit"),
        (["--gpu-memory", "0GiB"], "--gpu-memory 0GiB: expected more than nothing"),
        (["--gpu-memory", "80GiB", "--tp", "3"], "--tp 3: 32 attention heads"),
        (["--gpu-memory", "80GiB", "--tp", "64"], "--tp 64: 32 attention heads"),
        (["--gpu-memory", "80GiB", "--pp", "33"], "--pp 33: the model has 32 layers"),
        (
            ["--gpu-memory", "80GiB", "--gpus", "8", "--tp", "4"],
            "--gpus 8: --tp 4 times --pp 1 is 4",
        ),
        (
            ["--gpu-memory", "80GiB", "--gpus", "8", "--dp", "3"],
            "--gpus 8: --tp 2 times --pp 1 times --dp 3 is 6",
        ),
        (["--gpu-memory", "80GiB", "--dp", "0"], "--dp 0: expected at least 1"),
        (["--gpu-memory", "80GiB", "--gpus", "0"], "--gpus 0: expected at least 1"),
        (["--gpu-memory", "80GiB", "--max-model-len", "131073"], "made for 131072 tokens"),
        (["--gpu-memory", "80GiB", "--max-model-len", "-1"], "--max-model-len -1"),
        (["--gpu-memory", "80GiB", "--kv-cache-dtype", "int3"], "--kv-cache-dtype int3"),
        (["--gpu-memory", "80GiB", "--gpu-memory-utilization", "1.2"], "1.2: expected a fraction"),
        (["--gpu-memory", "80GiB", "--code-bits", "nan"], "--code-bits nan"),
    ],
)
def test_bad_arguments_are_one_sentence_and_exit_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", config_of("Llama-3.1-8B"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(architectures=["Unheard"]), "architecture Unheard; from a config alone plan knows"),
        (dict(architectures=None), "`architectures` is None"),
        (dict(hidden_size=None), "hidden_size is None"),
        (dict(hidden_size="4096"), "hidden_size is '4096'"),
        (dict(vocab_size=-3), "vocab_size is -3"),
        (dict(num_hidden_layers=1 << 40), "num_hidden_layers is"),
        (dict(num_hidden_layers=1 << 20), "num_hidden_layers is 1048576; at most"),
        (dict(num_key_value_heads=True), "num_key_value_heads is True"),
        (dict(kv_lora_rank=512), "multi-head latent attention"),
        (dict(quantization_config=dict(quant_method="fp8")), "its weights are not BF16"),
    ],
)
def test_bad_configs_are_one_sentence_and_exit_2(
    changes: dict[str, Any], sentence: str, edited, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", edited(**changes), "--gpu-memory", "80GiB"]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_no_model_is_one_sentence_and_debug_shows_the_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(tmp_path / "nowhere"), "--gpu-memory", "80GiB"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"vllm-dfloat: {tmp_path / 'nowhere'}: no such file")
    assert main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_files_that_contradict_the_config_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    (tmp_path / "config.json").write_text((SHIPPED / "config.json").read_text())
    name = "model.embed_tokens.weight"
    save_file({name: torch.zeros(3, 4, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert main(["plan", str(tmp_path), "--gpu-memory", "80GiB"]) == 2
    assert f"{name}: shape [3, 4]; config.json makes it [272, 256]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "length", "status", "last"),
    [
        ("24GiB", "40000", 0, "fits in both"),
        ("24GiB", "70000", 0, "fits in DFloat11 only"),
        ("24GiB", "131072", 1, "fits neither"),
        ("16GiB", None, 0, "fits in DFloat11 only"),
        ("8GiB", None, 1, "fits neither"),
    ],
)
def test_exit_status_says_whether_it_fits(
    memory: str, length: str | None, status: int, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--max-model-len", length] if length else []
    arguments = ["plan", config_of("Llama-3.1-8B"), "--gpu-memory", memory, *asked]
    assert main(arguments) == status
    table = capsys.readouterr().out.splitlines()
    assert last in table[-1]
    assert main([*arguments, "--quiet"]) == status
    assert capsys.readouterr().out.splitlines() == table[-1:]


def test_json_has_the_numbers_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        config_of("Llama-3.1-405B"),
        "--gpus",
        "8",
        "--pp",
        "2",
        "--gpu-memory",
        "80GiB",
    ]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tp"], found["pp"], len(found["stages"])) == (4, 2, 2)
    assert main(arguments) == 0
    table = capsys.readouterr().out
    for stage in found["stages"]:
        assert f"{stage['dfloat11_weights'] / GIB:,.2f} GiB" in table
        assert f"{stage['scratch'] / GIB:,.2f} GiB" in table
    assert f"{found['dfloat11']['kv_tokens']:,}" in table
    assert "assumed" in table


def test_png_shows_the_plan(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.png"
    assert (
        main(
            [
                "plan",
                config_of("Llama-3.1-8B"),
                "--gpu-memory",
                "24GiB",
                "--quiet",
                "--png",
                str(file),
            ]
        )
        == 0
    )
    assert colours(file) >= {"#4477aa", "#ccbb44", "#bbbbbb", "#228833"}


def colours(file: Path) -> set[str]:
    """Return the colours of the large areas of an RGB(A) PNG."""
    from matplotlib.image import imread

    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = (imread(file)[..., :3] * 255).round().astype(int)
    found, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return {
        f"#{r:02x}{g:02x}{b:02x}"
        for (r, g, b), count in zip(found, counts, strict=True)
        if count > 200
    }


def test_without_matplotlib_the_picture_is_refused_in_one_sentence(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from vllm_dfloat.cli import main\n"
        f"sys.exit(main(['plan', {config_of('Llama-3.1-8B')!r}, '--gpu-memory', '24GiB', '--png', 'plan.png']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert result.returncode == 2
    assert "matplotlib is not installed" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "plan.png").exists()


def test_help_names_every_value_that_the_error_names(capsys: pytest.CaptureFixture[str]) -> None:
    # Bug caught: help of three, an error of six.
    with pytest.raises(SystemExit):
        main(["plan", "-h"])
    told = " ".join(capsys.readouterr().out.split())
    for dtypes in (DTYPE_BYTES, STATE_DTYPES):
        *others, last = dtypes
        assert f" {', '.join(others)} or {last} (default: auto)" in told


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "-h"])
    assert stopped.value.code == 0
    assert "example: vllm-dfloat plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (80 << 30, "80.00 GiB"),
        (-(23 << 30), "-23.00 GiB"),
        (GIB // 10 + 1, "0.10 GiB"),
        (6_623_744, "6.32 MiB"),
        (-6_623_744, "-6.32 MiB"),
        (4096, "4,096 B"),
        (0, "0 B"),
    ],
)
def test_sizes_keep_their_digits_however_small(num_bytes: int, shown: str) -> None:
    # Bug caught: weights, scratch and peak of a small model were all 0.00 GiB.
    assert show_size(num_bytes) == shown


def test_a_small_model_is_planned_in_mib(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(SHIPPED), "--gpu-memory", "64MiB", "--overhead", "0"]
    assert main([*arguments, "--max-num-batched-tokens", "128"]) == 0
    table = capsys.readouterr().out
    assert "3.287 million parameters" in table
    assert "each GPU 64.00 MiB" in table
    assert "0.00 GiB" not in table


@pytest.fixture
def drawn(tmp_path: Path):
    """Return a function that draws a plan, and returns all texts in the picture, and its colours."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    def draw(*arguments: str) -> tuple[list[str], set[str]]:
        texts: list[str] = []
        plain = Figure.savefig

        def save(figure: Figure, *args: Any, **options: Any) -> None:
            plain(figure, *args, **options)
            texts.extend(text.get_text() for text in figure.findobj(Text))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", save)
            main(["plan", *arguments, "--quiet", "--png", str(tmp_path / "plan.png")])
        return texts, colours(tmp_path / "plan.png")

    return draw


def test_the_picture_says_in_numbers_what_is_held_and_what_is_missing(drawn) -> None:
    model = config_of("Llama-3.1-405B")
    texts, _ = drawn(model, "--gpus", "8", "--gpu-memory", "80GiB")
    title = next(text for text in texts if "TP 8 x PP 1" in text)
    assert "8 GPUs of 80.00 GiB each: the model fits in DFloat11 only" in title
    assert {"94.50", "63.86", "6.59", "23.65 missing", "scratch 0.41, other 2.74"} <= set(texts)
    assert "BF16\ndoes not fit" in texts


def test_the_picture_of_two_stages_names_them(drawn) -> None:
    texts, _ = drawn(config_of("Llama-3.1-405B"), "--tp", "8", "--pp", "2", "--gpu-memory", "80GiB")
    assert any("TP 8 x PP 2, 16 GPUs of 80.00 GiB each" in text for text in texts)
    assert [text for text in texts if text.startswith("stage 1, DFloat11\n")]
    assert not any("missing" in text for text in texts)


def test_the_picture_of_a_small_model_is_in_mib(drawn) -> None:
    texts, _ = drawn(str(SHIPPED), "--gpu-memory", "64MiB", "--overhead", "0")
    assert {"MiB per GPU", "6.32", "4.30"} <= set(texts)
    texts, _ = drawn(str(SHIPPED), "--gpu-memory", "80GiB", "--kv-cache-memory", "3MiB")
    assert any("weights 4.30 MiB, scratch 0.75 MiB" in text for text in texts)
    assert any(text.startswith("free ") for text in texts)
