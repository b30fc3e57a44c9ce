"""Options: accepted values, refused values, and those in a config.json."""

import pickle
from typing import Any

import pytest
import torch
from model_loads import loaded
from tiny_models import SHIPPED, official
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.config import DFloat11Config
from vllm_dfloat.integration.layers import layouts
from vllm_dfloat.integration.seam import gemms
from vllm_dfloat.integration.seam.options import IN_CONFIG, LAYOUTS, ON_COMMAND_LINE, Options


def test_later_options_go_on_top_of_earlier_ones() -> None:
    first = Options().updated({"ignore": ["a"], "layout": "dfloat11"}, "here")
    assert first.updated({"mode": "exact"}, "there") == Options(("a",), "dfloat11")
    assert first.updated({"ignore": [], "layout": "packed"}, "there") == Options()


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (
            {"layout": "auto", "kv_tokens": 5},
            {"layout": "packed"},
            "there: kv_tokens 5 of quantization_config with layout 'packed'; it needs layout 'auto'. "
            "Set layout to 'auto', or leave kv_tokens out of quantization_config.",
        ),
        (
            {"layout": "dfloat11"},
            {"mode": "fused"},
            "there: mode 'fused' with layout 'dfloat11' of quantization_config; it needs layout 'packed' or 'fast' or "
            "'auto'. Set layout to one of these, or leave mode out.",
        ),
    ],
)
def test_an_earlier_option_that_excludes_another_is_named_with_its_place(
    first: dict[str, Any], then: dict[str, Any], message: str
) -> None:
    # Bug caught: the advice was to leave out of the command line what is not there.
    config = DFloat11Config.from_config({"quant_method": "dfloat11", **first})
    with pytest.raises(UnsupportedError) as caught:
        config.options.updated(then, "there")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("in_config", "on_command_line"),
    [
        ({"kv_tokens": 5}, {"layout": "auto"}),
        ({"mode": "fused-exact"}, {"layout": "fast"}),
        ({"mode": "fused", "layout": "dfloat11"}, {"mode": "exact"}),
    ],
)
def test_options_of_both_places_are_judged_together(
    in_config: dict[str, Any], on_command_line: dict[str, Any]
) -> None:
    # Bug caught: config.json's were refused by themselves, though the command line gave what they need.
    config = DFloat11Config.from_config({"quant_method": "dfloat11", **in_config})
    run = VllmConfig(additional_config={"dfloat11": on_command_line})
    expected = {**in_config, **on_command_line}
    found = config.checked_options(run)
    assert {name: getattr(found, name) for name in expected} == expected
    with pytest.raises(UnsupportedError, match=f"^{IN_CONFIG}: .* needs layout"):
        config.checked_options(VllmConfig())


def test_every_layout_that_can_be_asked_for_has_its_functions() -> None:
    assert tuple(layouts.BY_NAME) == LAYOUTS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ingore": []}, "here: unknown option 'ingore'; expected ignore, layout, mode"),
        ({"ignore": "lm_head"}, "here: ignore is 'lm_head'; expected a list"),
        ({"ignore": [1]}, r"here: ignore is \[1\]; expected a list"),
        ({"ignore": ["re:["]}, "here: ignore has 're:\\['"),
        ({"layout": "row"}, "here: layout: 'row'; expected one of packed, fast, dfloat11, auto"),
        ({"mode": 1}, "here: mode: 1; expected one of exact, fused"),
        ({"layout": None}, "here: layout: null; expected one of packed"),
        (
            {"ignore": {"a": [True, None]}},
            r'here: ignore is {"a": \[true, null\]}; expected a list',
        ),
        (
            {"granularity": "model"},
            "here: granularity: 'model'; expected one of auto, layer, block",
        ),
        ({"mode": "fused", "layout": "dfloat11"}, "here: mode 'fused' with layout 'dfloat11'"),
        (
            {"mode": "fused-exact"},
            "here: mode 'fused-exact' with layout 'packed'; it needs layout 'fast' or 'auto'",
        ),
        (
            {"mode": "fused", "layout": "dfloat11"},
            "it needs layout 'packed' or 'fast' or 'auto'. Set layout to one of these, or leave mode out.",
        ),
        (
            {"kv_tokens": 5, "layout": "fast"},
            "kv_tokens 5 with layout 'fast'; it needs layout 'auto'. Set layout to 'auto', or leave kv_tokens out.",
        ),
        ({"kv_tokens": 0, "layout": "auto"}, "here: kv_tokens: 0; expected a number of tokens"),
        ({"kv_tokens": True, "layout": "auto"}, "here: kv_tokens: true; expected a number"),
        ({"kv_tokens": "all", "layout": "auto"}, "here: kv_tokens: 'all'; expected a number"),
        (
            {"granularity": "block", "layout": "dfloat11"},
            "layout 'dfloat11'; it needs layout 'packed' or 'fast' or 'auto'. Set",
        ),
    ],
)
def test_wrong_options_are_refused_with_their_place(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        Options().updated(given, "here")


def test_config_json_may_hold_options_or_an_official_config() -> None:
    ours = DFloat11Config.from_config({"quant_method": "dfloat11", "ignore": ["lm_head"]})
    assert (ours.options.ignore, ours.is_official) == (("lm_head",), False)
    theirs = DFloat11Config.from_config({"quant_method": "dfloat11", "dfloat11_config": {}})
    assert (theirs.options, theirs.is_official) == (Options(), True)


def test_config_json_with_an_unknown_option_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=f"^{IN_CONFIG}: unknown option"):
        DFloat11Config.from_config({"quant_method": "dfloat11", "bits": 11})


def test_config_survives_the_way_into_a_worker_and_brings_the_loaders_along() -> None:
    # Bug caught: a spawned worker without our loaders; only the config itself can install them there.
    from vllm.model_executor import model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from vllm_dfloat.integration.loading.loader import DFloat11ModelLoader

    sent = pickle.dumps(DFloat11Config(Options(ignore=("x",)), is_official=True))
    model_loader._LOAD_FORMAT_TO_MODEL_LOADER["auto"] = DefaultModelLoader
    received = pickle.loads(sent)  # our own bytes
    assert (received.options.ignore, received.is_official) == (("x",), True)
    assert model_loader._LOAD_FORMAT_TO_MODEL_LOADER["auto"] is DFloat11ModelLoader


def test_fused_mode_is_refused_where_batches_must_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemms, "is_batch_invariant", lambda: True)  # as on a GPU only
    run = VllmConfig(additional_config={"dfloat11": {"mode": "fused"}})
    with (
        set_current_vllm_config(run),
        pytest.raises(UnsupportedError, match="'fused' with VLLM_BATCH_INVARIANT"),
    ):
        DFloat11Config().get_quant_method(torch.nn.Linear(1, 1), "x")


@pytest.mark.parametrize("load_format", ["tensorizer", "sharded_state"])
def test_a_load_format_that_cannot_work_is_refused_before_its_loader_looks_for_anything(
    load_format: str,
) -> None:
    # Bug caught: "No module named 'tensorizer'", and where that is installed an attempt to read the folder as a file.
    refused = pytest.raises(UnsupportedError, match=f"--load-format {load_format}: it restores")
    with refused, loaded(SHIPPED, quantization="dfloat11", load_format=load_format):
        pass


def test_another_load_format_of_a_bf16_model_is_left_alone() -> None:
    missing = pytest.raises(ValueError, match="Could not find checkpoint files")
    with missing, loaded(SHIPPED, load_format="sharded_state"):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            dict(additional_config={"dfloat11": {"layout": "fsat"}}),
            "layout: 'fsat'; expected one of packed",
        ),
        (
            dict(additional_config={"dfloat11": None}),
            "^--additional-config: dfloat11 is null; expected an object.",
        ),
        (dict(load_format="tensorizer"), "does not work with --load-format tensorizer"),
    ],
)
def test_what_cannot_work_is_refused_before_a_worker_is_started(
    given: dict[str, Any], message: str
) -> None:
    # Bug caught: refused by the engine's process, between its log and two tracebacks of vLLM's.
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(model=str(SHIPPED), quantization="dfloat11", **given)
    with pytest.raises(UnsupportedError, match=message):
        arguments.create_engine_config()


@pytest.mark.parametrize(
    ("ignore", "parts"),
    [
        (["model.layers.1.self_attn.q_proj"], "q_proj"),
        ([r"re:.*1.*\.[kv]_proj"], "k_proj, v_proj"),
    ],
)
@pytest.mark.parametrize("is_in_config", [False, True])
def test_a_part_of_a_fused_layer_cannot_stay_bf16_alone(
    ignore: list[str], parts: str, is_in_config: bool
) -> None:
    # Bug caught: vLLM's "Found different quantization schemes for the shards of", which names neither entry nor option.
    options: dict[str, Any] = {"additional_config": {"dfloat11": {"ignore": ignore}}}
    if is_in_config:
        given = {"quant_method": "dfloat11", "ignore": ignore}
        options = {"hf_overrides": {"quantization_config": given}}
    with (
        pytest.raises(UnsupportedError) as caught,
        loaded(SHIPPED, quantization="dfloat11", **options),
    ):
        pass
    assert str(caught.value) == (
        f"{IN_CONFIG if is_in_config else ON_COMMAND_LINE}: ignore has {ignore[0]!r}, of "
        f"model.layers.1.self_attn.qkv_proj only a part ({parts}); expected qkv_proj itself, or all of q_proj, k_proj, "
        "v_proj. Name one or the other, or none."
    )


@pytest.mark.parametrize(
    ("given", "told", "inside"),
    [
        ({"layout": "fast", "other": 1}, "layout", '"layout": ...'),
        ({"DFloat11": {"layout": "fast"}, "floats": 1}, "DFloat11", "..."),
        ({"dfloat": {"layout": "fast"}}, "dfloat", "..."),
        ({"df11": {"layout": "fast"}, "dfloat11": {}}, "df11", "..."),
    ],
)
def test_an_option_outside_of_the_plugins_name_is_told_once(
    given: dict[str, Any], told: str, inside: str, log_lines: list[str]
) -> None:
    # Bugs caught: these were served packed, without a word.
    config = DFloat11Config()
    for _ in range(2):
        run = VllmConfig(additional_config=given)
        assert config.checked_options(run).layout == "packed"
    (line,) = log_lines
    assert line == (
        f"dfloat11: --additional-config: {told!r} has no effect there; give "
        f'{{"dfloat11": {{{inside}}}}}'
    )


@pytest.mark.parametrize(
    "overrides", [{"quantization_config": {"quant_method": "fp8"}}, {"dfloat11_config": None}]
)
def test_an_official_folder_that_is_made_out_to_be_another_is_refused(
    overrides: dict[str, Any],
) -> None:
    # Bug caught: it ended in vLLM's sentence on FP8, or on tensors that are not there.
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(model=str(official("llama-tiny")), hf_overrides=overrides)
    with pytest.raises(UnsupportedError, match=r"--hf-overrides: .* holds a DFloat11 checkpoint"):
        arguments.create_engine_config()
