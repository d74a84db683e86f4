"""Headers that state more than a file holds, or more than any model has: refused before they take time or memory."""

import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from pytest_qsa.checkpoint.folder import open_folder
from pytest_qsa.checkpoint.gguf_file import read_gguf
from pytest_qsa.checkpoint.tensors import tensors_of
from pytest_qsa.common.errors import AnomalyError


def test_a_file_with_more_tensors_than_any_known_one_is_refused_before_its_header_is_parsed(tmp_path):
    entry = '"a.%d": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}'
    header = ("{" + ", ".join(entry % index for index in range(150_001))).encode()  # no JSON: nothing parses it
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(AnomalyError, match=r"lists 150,001 tensors, more than the 150,000 .* smaller files"):
        open_folder(tmp_path).check_files()


def test_a_file_that_replaced_another_is_read_itself(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(2, np.float32)}, file)
    assert tensors_of(file)[0].values().tolist() == [0, 0]
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(file)
    assert tensors_of(file)[0].values().tolist() == [1, 1]


def gguf(*, tensors=0, fields=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


NAMED_X = struct.pack("<Q", 1) + b"x"
ENDLESS = {
    "tensors": gguf(tensors=1 << 40),
    "settings": gguf(fields=1 << 40),
    "a list of numbers": gguf(fields=1, rest=NAMED_X + struct.pack("<IIQ", 9, 5, 1 << 40) + bytes(64)),
    "a list of texts": gguf(fields=1, rest=NAMED_X + struct.pack("<IIQ", 9, 8, 1 << 40) + NAMED_X),
    "lists in lists": gguf(fields=1, rest=NAMED_X + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000),
    "a name": gguf(tensors=1, rest=struct.pack("<Q", 1 << 60)),
    "dimensions": gguf(tensors=1, rest=NAMED_X + struct.pack("<I", 1 << 30)),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_gguf_file_whose_counts_lead_behind_its_end_is_refused_at_once(tmp_path, what):
    (tmp_path / "x.gguf").write_bytes(ENDLESS[what])
    with pytest.raises(AnomalyError, match="can't be read as GGUF") as caught:
        read_gguf(tmp_path / "x.gguf")
    assert len(str(caught.value).splitlines()) == 1


def test_a_gguf_file_of_endless_texts_is_refused_after_as_many_as_any_vocabulary_has(tmp_path, monkeypatch):
    monkeypatch.setattr("pytest_qsa.checkpoint.gguf_file.MOST_READ", 1000)
    texts = gguf(fields=1, rest=NAMED_X + struct.pack("<IIQ", 9, 8, 2000) + NAMED_X * 2000)
    (tmp_path / "x.gguf").write_bytes(texts)
    with pytest.raises(AnomalyError, match="more than 1,000 values before its weights"):
        read_gguf(tmp_path / "x.gguf")


def test_the_lists_of_a_gguf_file_are_those_that_its_package_reads(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("llama.feed_forward_length", [3, 1, 2])
    writer.add_array("llama.words", ["a", "bc"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_gguf(tmp_path / "x.gguf").settings["intermediate_size"] == [3, 1, 2]
