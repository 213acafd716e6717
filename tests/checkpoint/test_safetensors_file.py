"""Files as they come from the disk: whole, cut, flipped and hostile."""

from __future__ import annotations

import json
import random
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ltx2_tuner.checkpoint import SafetensorsFile
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
        "a.weight": torch.randn(4, generator=generator).to(torch.float8_e4m3fn),
        "c.scale": torch.tensor(0.25),
        "d.empty": torch.zeros(0, 3),
        "e.shape": torch.tensor([5, 3]),
    }


@pytest.fixture
def path(tmp_path, tensors):
    path = tmp_path / "Modell ä.safetensors"
    write_safetensors(path, tensors, {"config": "{}"})
    return path


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_every_tensor_with_its_dtype(path, tensors):
    file = SafetensorsFile(path)
    assert file.metadata == {"config": "{}"}
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        found = file.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found.float(), tensor.float())
    assert torch.equal(file.read("b.weight", dtype=torch.float32), tensors["b.weight"].float())


def test_reads_ranges_of_a_tensor(path, tensors):
    file = SafetensorsFile(path)
    whole = tensors["b.weight"].view(torch.uint8).numpy().tobytes()
    assert file.read_range("b.weight", 0, 4096) == whole
    assert file.read_range("b.weight", 4, 6) == whole[4:10]
    assert file.read_range("b.weight", len(whole) - 2, 4096) == whole[-2:]
    assert file.read_range("d.empty", 0, 10) == b""


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="cannot be opened"):
        SafetensorsFile(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00abc.", "no safetensors file"),
        (struct.pack("<Q", 1000) + b"{}", "cut short"),
        (raw(b"{not json"), "no JSON text"),
        (raw(b"[" * 50_000), "no JSON text"),
        (raw(b"\xff\xfe{}"), "no JSON text"),
        (raw([1]), "no JSON object"),
        (raw({"__metadata__": {"a": 1}}), "no map of strings"),
        (raw(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"), "twice"),
        (raw({"a": entry(dtype="Q4_K")}, b"0000"), "unsupported type 'Q4_K'"),
        (raw({"a": entry(shape=(2,))}, b"0000"), "does not fit its 4 bytes"),
        (raw({"a": entry(shape=(-1,))}, b"0000"), "impossible shape"),
        (raw({"a": entry(shape=(True,))}, b"0000"), "impossible shape"),
        (raw({"a": entry(offsets=(4, 0))}, b"0000"), "impossible"),
        (raw({"a": {"dtype": "F32", "shape": [1]}}, b"0000"), "lacks"),
        (raw({"a": entry(), "b": entry(offsets=(2, 6))}, b"000000"), "overlaps"),
        (raw({"a": entry(), "b": entry(offsets=(8, 12))}, b"0" * 12), "gap"),
        (raw({"a": entry()}, b"00"), "cut short"),
        (raw({"a": entry()}, b"0" * 9), "5 bytes more"),
        (raw({"../a": entry()}, b"0000"), "no tensor name"),
        (raw({"/etc/a": entry()}, b"0000"), "no tensor name"),
        (raw({"a\0": entry()}, b"0000"), "no tensor name"),
    ],
)
def test_each_damage_has_its_sentence(tmp_path, content, message):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        SafetensorsFile(path)
    assert "damaged.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def _read_all(path) -> dict[str, torch.Tensor]:
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in file.tensors}


def test_cut_files_are_refused(path):
    content = path.read_bytes()
    for offset in random.Random(0).sample(range(len(content)), 20):
        path.write_bytes(content[:offset])
        with pytest.raises(UserError, match="Modell ä"):
            _read_all(path)


def test_flipped_headers_are_refused_or_read(path, tensors):
    """A flip may hit a letter of a name or of a value that still fits; the bytes read are then those of the file."""
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    chooser = random.Random(1)
    refused = 0
    for _ in range(20):
        flipped = bytearray(content)
        flipped[chooser.randrange(header)] ^= 1 << chooser.randrange(8)
        path.write_bytes(flipped)
        try:
            found = _read_all(path)
        except UserError as error:
            refused += 1
            assert "Modell ä" in str(error)
        else:
            assert sum(tensor.nbytes for tensor in found.values()) == len(content) - header
    assert refused > 0


def test_a_file_cut_after_opening_is_noticed(path):
    file = SafetensorsFile(path)
    with open(path, "r+b") as handle:
        handle.truncate(path.stat().st_size - 8)
    with pytest.raises(UserError, match="ended while it was read"):
        for name in file.tensors:
            file.read(name)


def test_threads_read_at_the_same_time(tmp_path):
    tensors = {str(number): torch.full((1 << 18,), number, dtype=torch.int32) for number in range(6)}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    together = threading.Barrier(len(tensors))

    def read(name: str) -> list[torch.Tensor]:
        together.wait(10)
        return [file.read(name) for _ in range(20)]

    with SafetensorsFile(tmp_path / "a.safetensors") as file, ThreadPoolExecutor(len(tensors)) as threads:
        for name, found in zip(tensors, threads.map(read, tensors)):
            assert all(torch.equal(tensor, tensors[name]) for tensor in found)


def test_a_file_is_opened_again_only_while_it_is_the_same(path, tensors):
    """As threads do that read at the same time."""
    file = SafetensorsFile(path)
    file.close()
    assert torch.equal(file.read("c.scale"), tensors["c.scale"])
    file.close()
    path.rename(path.with_name("old"))
    write_safetensors(path, tensors)
    with pytest.raises(UserError, match="was replaced while it was read"):
        file.read("c.scale")
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        file.read("c.scale")


@pytest.mark.gpu
def test_reading_to_the_gpu_passes_through_staging(tmp_path, monkeypatch):
    monkeypatch.setattr("ltx2_tuner.checkpoint.safetensors_file.STAGING_BYTES", 4096)
    tensor = torch.randn(100, 77)
    write_safetensors(tmp_path / "a.safetensors", {"x": tensor, "y": tensor[:3]})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for _ in range(3):
        assert torch.equal(file.read("x", "cuda").cpu(), tensor)
        assert torch.equal(file.read("y", "cuda", torch.bfloat16).cpu(), tensor[:3].bfloat16())
