"""The file of a capture: as safetensors writes it, read into memory once, refused where an array can't lie."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save

from pytest_qsa.captures import TOKENS, Capture, SiteNumbers
from pytest_qsa.captures.arrays import safetensors_arrays, safetensors_header, safetensors_parts
from pytest_qsa.common import InfraError, QsaWarning
from support.captures import same, without_checksum


def capture_of(tokens):
    """Return a capture of one site: a sample of that many tokens."""
    numbers = SiteNumbers(
        dtype="float32",
        shape=(4,),
        token_axis=True,
        statistics=frozenset({TOKENS}),
        sample=np.zeros(1, np.int32),
        call=np.zeros(1, np.int32),
        lengths=np.array([tokens]),
        arrays={"token_max": np.arange(tokens, dtype=np.float32), "peaks": np.zeros((1, 0), np.int32)},
    )
    return Capture({("layers.0", "output"): numbers}, modules=("layers.0",))


def test_a_file_is_what_safetensors_writes_and_reads(tmp_path):
    kinds = ("bool", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8")
    arrays = {f"{place}/{kind}": np.arange(6).reshape(2, 3).astype(kind).T for kind in kinds for place in (10, 9)}
    arrays |= {"none": np.zeros((0, 3), np.float32), "scalar": np.array(2.5), 'a "b" \\ é': np.ones(3, np.int32)}
    expected = save({name: array.copy("C") for name, array in arrays.items()}, {"qsa": '{"é": "\\n"}'})
    content = b"".join(safetensors_parts(arrays, {"qsa": '{"é": "\\n"}'}))
    assert content == expected
    read = safetensors_arrays(content, safetensors_header(content))
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)

    whole = capture_of(8)
    whole.save(tmp_path / "a.qsa")
    assert (tmp_path / "a.qsa").read_bytes() == whole.to_bytes()
    assert same(Capture.load(tmp_path / "a.qsa"), whole)


def test_a_file_is_read_into_memory_once(tmp_path):
    whole, file = capture_of(2_000_000), tmp_path / "a.qsa"
    whole.save(file)
    tracemalloc.start()
    read = Capture.load(file)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert same(read, whole)
    assert file.stat().st_size > 8_000_000
    assert most < 1.5 * file.stat().st_size


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [9]},
        {"shape": [7]},
        {"shape": [-8]},
        {"shape": [10**30]},
        {"shape": "8"},
        {"dtype": "F8_E4M3"},
        {"dtype": []},
        {"data_offsets": [-32, 0]},
        {"data_offsets": [1 << 20, (1 << 20) + 32]},
        {"data_offsets": [0]},
        {"data_offsets": ["0", "32"]},
    ],
    ids=str,
)
def test_an_array_whose_place_or_form_cannot_be_is_refused(tmp_path, change):
    content = without_checksum(capture_of(8).to_bytes())  # so that no checksum tells first
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    (name,) = (name for name in header if name.endswith("token_max"))
    header[name] |= change
    text = json.dumps(header).encode()
    file = tmp_path / "a.qsa"
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    refused = pytest.raises(InfraError, match=r"a\.qsa: .*: not a whole capture")
    with pytest.warns(QsaWarning, match="no checksum"), refused:
        Capture.load(file)
