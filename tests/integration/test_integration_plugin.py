"""`register`: vLLM calls it in every process on the machine, so it must do no harm."""

import subprocess
import sys
from typing import Any

import pytest
from conftest import Checkpoint

from vllm_dfloat.integration import autodetect, plugin
from vllm_dfloat.integration.seam import compat


def test_register_twice_equals_register_once() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER as parsers

    plugin.register()
    first = parsers["hf"]
    plugin.register()
    assert QUANTIZATION_METHODS.count("dfloat11") == 1
    assert parsers["hf"] is first


def test_a_plugin_that_took_the_name_first_is_named(
    monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    # Bug caught: --quantization dfloat11 was another plugin's, and nothing said so.
    from vllm.model_executor.layers import quantization

    class Other:
        pass

    plugin.register()
    assert log_lines == []
    monkeypatch.setitem(quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG, "dfloat11", Other)
    plugin.register()
    (line,) = log_lines
    assert Other.__qualname__ in line
    assert "VLLM_PLUGINS" in line


def test_register_never_raises_but_says_why(
    monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    # Bug caught: an exception of the plugin, with which vLLM ends every run on the machine.
    def fail() -> None:
        raise RuntimeError("no such hook")

    monkeypatch.setattr(autodetect, "install", fail)
    plugin.register()
    assert log_lines == [
        "dfloat11: could not register with vLLM (RuntimeError: no such hook); "
        "--quantization dfloat11 will be unknown"
    ]


def test_without_vllm_the_module_imports_and_register_only_logs() -> None:
    code = """
import sys
sys.modules["vllm"] = None
import vllm_dfloat.integration.plugin as plugin
plugin.register()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert "could not register with vLLM (ModuleNotFoundError" in result.stderr


@pytest.mark.parametrize(
    ("version", "num_lines"),
    [("0.27.1", 1), ("0.28.0", 0), ("0.33.2+cpu", 0), ("0.34.0rc1", 1), ("dev", 1)],
)
def test_an_untested_vllm_gets_one_line(
    version: str, num_lines: int, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    compat.warn_if_untested_version()
    assert len(log_lines) == num_lines
    assert all(f"vLLM {version} is outside the tested range >=0.28,<0.34" in s for s in log_lines)


class Parser:
    """Stands in for vLLM's parser of config.json."""

    found: dict[str, Any] = {}  # noqa: RUF012

    def parse(self) -> tuple[dict[str, Any], None]:
        return dict(self.found), None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dfloat11_config": {"v": 1}}, {"quant_method": "dfloat11", "dfloat11_config": {"v": 1}}),
        (
            {"dfloat11_config": {}, "quantization_config": {"quant_method": "fp8"}},
            {"quant_method": "fp8"},
        ),
        (
            {"dfloat11_config": {}, "quantization_config": {"ignore": ["lm_head"]}},
            {"quant_method": "dfloat11", "dfloat11_config": {}, "ignore": ["lm_head"]},
        ),
        ({"model_type": "llama"}, None),
    ],
)
def test_only_an_official_config_without_another_quantization_is_recognised(
    config: dict[str, Any], expected: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Parser, "found", config)
    parsed, _ = autodetect._knowing_dfloat11(Parser)().parse()
    assert parsed.get("quantization_config") == expected


def test_parser_leaves_a_plain_checkpoint_alone(bf16_checkpoint: Checkpoint) -> None:
    from vllm.transformers_utils.config import get_config

    plugin.register()
    config = get_config(bf16_checkpoint("llama"), trust_remote_code=False)
    assert getattr(config, "quantization_config", None) is None
