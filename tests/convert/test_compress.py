"""Compression and decompression: official bytes, the round trip, interruptions, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from conftest import Checkpoint
from dfloat11_helpers import VECTORS
from interrupted import contents
from safetensors.torch import load_file
from small_models import bf16, make_model

from vllm_dfloat.checkpoint.folder import FINISHED_FILE
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE, file_entry, read_manifest
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.checkpoint.verify import compare
from vllm_dfloat.checkpoint.weights import weights
from vllm_dfloat.convert.compress import Report, compress, plan_files
from vllm_dfloat.convert.compress_file import CompressedFile
from vllm_dfloat.convert.decompress import decompress
from vllm_dfloat.convert.resume import COMPRESSION
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.convert.units import plan_units
from vllm_dfloat.errors import FormatError, UnsupportedError

SHIPPED = tiny_models.SHIPPED


def circle(model: Path, folder: Path) -> tuple[Report, Path]:
    """Compress and decompress `model`; check that verify sees no difference and that all bits are back."""
    report = compress(open_source(model), folder / "df11")
    result = compare(folder / "df11", model)
    assert result.is_equal, result.differences
    decompress(folder / "df11", folder / "again")
    before = load_file(model / "model.safetensors")
    after = load_file(folder / "again/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    return report, folder / "df11"


@pytest.mark.parametrize("vector", ["llama-tiny", "qwen3-tiny-tied", "phi3-tiny-fused"])
def test_weight_files_equal_those_of_the_official_package(
    vector: str, bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    compress(open_source(bf16_checkpoint(vector)), tmp_path / "df11")
    official = sorted((VECTORS / f"{vector}-df11").glob("*.safetensors"))
    assert [file.name for file in official] == sorted(
        file.name for file in (tmp_path / "df11").glob("*.safetensors")
    )
    for file in official:
        assert (tmp_path / "df11" / file.name).read_bytes() == file.read_bytes(), file.name


def test_shipped_model_comes_back_with_every_file_byte_for_byte(tmp_path: Path) -> None:
    report, compressed = circle(SHIPPED, tmp_path)
    for file in SHIPPED.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert (report.units, report.left) == (6, {})
    assert report.num_bytes < 0.7 * report.bf16_bytes
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(SHIPPED / "model.safetensors").keys()
    manifest = read_manifest(compressed)
    assert manifest is not None
    files = {path.name for path in compressed.iterdir()} - {MANIFEST_FILE, FINISHED_FILE}
    assert files == set(manifest.files)
    for name, entry in manifest.files.items():
        assert entry == file_entry(compressed / name)


def test_shards_are_cut_at_the_given_size_and_listed_in_the_index(tmp_path: Path) -> None:
    compress(open_source(SHIPPED), tmp_path / "df11")
    decompress(tmp_path / "df11", tmp_path / "again", shard_bytes=2_000_000)
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    assert len(names) > 2
    assert compare(tmp_path / "again", SHIPPED).is_equal
    found = {name: file for file in names for name in load_file(tmp_path / "again" / file)}
    assert found == index["weight_map"]


def test_a_sharded_source_is_read_by_its_index_and_its_copy_left_out(tmp_path: Path) -> None:
    # Bug caught: consolidated.safetensors compressed as further weights, in addition to the shards.
    compress(open_source(SHIPPED), tmp_path / "df11")
    source = tmp_path / "sharded"
    decompress(tmp_path / "df11", source, shard_bytes=2_000_000)
    shutil.copy(SHIPPED / "model.safetensors", source / "consolidated.safetensors")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    compress(open_source(source), tmp_path / "again")
    left, right = tmp_path / "df11", tmp_path / "again"
    (left / FINISHED_FILE).unlink()  # it names the source
    (right / FINISHED_FILE).unlink()
    assert contents(left) == contents(right)
    assert compare(right, source).is_equal


def test_what_the_format_cannot_hold_stays_with_a_reason_and_the_rest_of_its_unit_is_compressed(
    tmp_path: Path,
) -> None:
    names = {0: "a.weight", 1: "b.weight", 2: "c.weight"}
    tensors = {f"h.{i}.{name}": bf16(64, 96) for i in range(3) for name in names.values()}
    tensors["h.1.b.weight"][3, 4] = float("nan")
    tensors["h.2.b.weight"] = torch.randn(64, 96)
    tensors |= {"tiny.weight": bf16(4, 4), "zeros.weight": torch.zeros(96, 64).bfloat16()}
    tensors["conv.weight"] = bf16(8, 8, 3)
    report, compressed = circle(make_model(tmp_path / "m", tensors), tmp_path)
    assert sorted(report.left) == ["conv.weight", "h.1.b.weight", "h.2.b.weight", "tiny.weight"]
    assert "1 of its weights are Inf, NaN" in report.left["h.1.b.weight"]
    assert "F32" in report.left["h.2.b.weight"]
    assert "compressed it would take" in report.left["tiny.weight"]
    units = {name: unit.members for name, unit in open_checkpoint(compressed).units.items()}
    assert units == {
        "h.0": ("a", "b", "c"),
        "h.1": ("a", "c"),
        "h.2": ("a", "c"),
        "zeros": (),
    }


def test_unit_with_more_tables_than_the_format_can_name_stays(tmp_path: Path) -> None:
    flat = load_file(VECTORS / "edge-bad-must-refuse-bf16/original.safetensors")["rows19.weight"]
    model = make_model(tmp_path / "m", {"rows19.weight": flat, "good.weight": bf16(64, 64)})
    report, _ = circle(model, tmp_path)
    assert "17 child tables" in report.left["rows19.weight"]
    assert report.units == 1


def test_experts_in_one_tensor_and_tied_lm_head_come_back_under_their_names(tmp_path: Path) -> None:
    base = "model.layers.0.mlp.experts"
    tensors = {f"{base}.gate_up_proj": bf16(4, 64, 96), f"{base}.down_proj": bf16(4, 48, 64)}
    tensors |= {f"{base}.gate_up_proj_bias": bf16(4, 96), "lm_head.weight": bf16(64, 64)}
    for i in range(3):  # as Mixtral names them
        tensors[f"model.layers.1.block_sparse_moe.experts.{i}.w1.weight"] = bf16(64, 64, seed=i)
    model = make_model(tmp_path / "m", tensors, tie_word_embeddings=True)
    report, compressed = circle(model, tmp_path)
    assert sorted(report.left) == ["lm_head.weight", f"{base}.gate_up_proj_bias"]
    assert len(open_checkpoint(compressed).units) == 4


def test_the_embedding_of_an_encoder_has_its_name_and_shape_without_a_manifest_too(
    tmp_path: Path,
) -> None:
    config = transformers.BertConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=96,
    )
    transformers.BertModel(config).bfloat16().save_pretrained(tmp_path / "m")
    _, compressed = circle(tmp_path / "m", tmp_path)
    (compressed / MANIFEST_FILE).unlink()
    units = open_checkpoint(compressed)
    assert "embeddings.word_embeddings" in units.units
    found = {name: tuple(tensor.shape) for name, tensor in weights(units)}
    original = load_file(tmp_path / "m/model.safetensors")
    assert found == {name: tuple(tensor.shape) for name, tensor in original.items()}


def test_rerun_after_a_kill_at_any_point_ends_with_the_same_bytes(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    script = Path(__file__).parents[1] / "interrupted.py"
    source = str(bf16_checkpoint("llama-tiny"))
    command = [sys.executable, str(script), "compress", source, str(tmp_path)]
    out = subprocess.run([*command, "1", "20", "10"], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    whole, *runs = map(json.loads, out.stdout.splitlines())
    assert whole["events"] >= 20
    assert len(runs) == 30
    for run in runs:
        expected = signal.SIGKILL if "event" in run["kill"] else signal.SIGXFSZ
        assert run["status"] & 0x7F == expected, run["kill"]
        assert run["again"] == 0
        assert run["files"] == whole["files"], run["kill"]
    # The kills were of every kind: files half written, some finished, the journal there or not yet.
    assert any(name.startswith(".tmp-") for run in runs for name in run["left"])
    assert len({tuple(run["left"]) for run in runs}) > 5


def test_finished_files_are_not_made_again_unless_they_were_changed(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, target = open_source(bf16_checkpoint("llama-tiny")), tmp_path / "t"
    compress(source, target)
    finished = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    entries = [file_entry(target / name) for name in finished]
    jobs = plan_files(plan_units(source.config, source.tensors), source)
    units = {job.file: job.units for job in jobs}
    lines = [{"version": 1, "source": source.identity()}]
    lines += [
        CompressedFile(name, entry["bytes"], entry["sha256"], units[name], {}).as_json()
        for name, entry in zip(finished, entries, strict=True)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (target / COMPRESSION.journal).write_text(text + '{"file": "cut sho')
    changed = target / "lm_head.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    os.utime(changed, ns=(0, 0))
    seen = []
    compress(source, target, start=lambda total, done: seen.append((total, done)))
    after = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert {name for name in after if after[name] != finished[name]} == {"lm_head.safetensors"}
    assert file_entry(changed) == entries[list(finished).index("lm_head.safetensors")]
    ((total, done),) = seen
    assert 0 < done < total
    assert not (target / COMPRESSION.journal).exists()


def test_processes_write_the_same_bytes_and_end_with_a_killed_parent(tmp_path: Path) -> None:
    compress(open_source(SHIPPED), tmp_path / "one")
    command = [sys.executable, "-m", "vllm_dfloat.cli", "compress", str(SHIPPED), "--workers", "2"]
    with subprocess.Popen([*command, str(tmp_path / "two")]) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not list((tmp_path / "two").glob("*.safetensors")):
            assert process.poll() is None
            time.sleep(0.005)
        workers = children.read_text().split()
        process.kill()
    assert len(workers) >= 2
    end = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < end, "workers outlive their parent"
        time.sleep(0.05)
    assert subprocess.run([*command, str(tmp_path / "two")]).returncode == 0
    left, right = tmp_path / "one", tmp_path / "two"
    assert contents(left) == contents(right)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def refused(source: Path, target: Path, force: bool = False) -> str:
    with pytest.raises((FormatError, UnsupportedError)) as error:
        compress(open_source(source), target, force)
    return str(error.value)


def test_targets_that_are_not_ours_are_refused_and_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    assert "give --force" in refused(SHIPPED, target)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file" in refused(SHIPPED, file, force=True)
    source = Path(shutil.copytree(SHIPPED, tmp_path / "s"))
    for place in (source, source / "inside", tmp_path):
        assert "the source is never touched" in refused(source, place, force=True)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == {
        p.name: p.read_bytes() for p in SHIPPED.iterdir()
    }


def test_force_replaces_a_checkpoint_and_keeps_other_files(tmp_path: Path) -> None:
    target = make_model(tmp_path / "t", {"old.weight": bf16(4, 4)})
    (target / "notes.txt").write_text("mine")
    shutil.copy(target / "model.safetensors", target / "model-2.safetensors")
    compress(open_source(SHIPPED), target, force=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert compare(target, SHIPPED).is_equal


def test_a_begun_compression_of_other_weights_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.mkdir()
    line = json.dumps({"version": 1, "source": "another"}) + "\n"
    (target / COMPRESSION.journal).write_text(line)
    assert "of other weights" in refused(SHIPPED, target)
    assert (target / COMPRESSION.journal).read_text() == line


def test_sources_without_anything_to_compress_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "fp32", {"a.weight": torch.zeros(4, 4)})
    assert "embedding layer, but F32; expected some" in refused(model, tmp_path / "t")
    norm = make_model(tmp_path / "norm", {"a.weight": bf16(1, 4)[0]})
    assert refused(norm, tmp_path / "t").endswith("Serve it as it is.")
    assert "DFloat11 checkpoint already" in refused(VECTORS / "llama-tiny-df11", tmp_path / "t")
    (model / "config.json").unlink()
    assert "has no config.json" in refused(model, tmp_path / "t")
    assert "no such folder" in refused(tmp_path / "nowhere", tmp_path / "t")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc"}}')
    assert "is in '../../etc', which is no *.safetensors file" in refused(model, tmp_path / "t")
    assert not (tmp_path / "t").exists()
