"""Formats of one's own: registered by a subclass, found by an entry point only where no built-in claims the files."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import numpy as np
import pytest
from safetensors.numpy import save_file

from pytest_qsa import Format
from pytest_qsa.checkpoint import Files, format_of, libraries_of_formats, open_folder, problems_of
from pytest_qsa.checkpoint.formats.format import FORMATS
from pytest_qsa.checkpoint.tensors import spread
from pytest_qsa.common import InfraError, Registry

PLUGIN = '''
from pytest_qsa import Format
from pytest_qsa.checkpoint import Declaration, LayerScheme

class Halves(Format):
    """Codes times the scale of their row, twice."""

    name = "halves"
    libraries = ("halves-kernels",)

    @property
    def declaration(self):
        scheme = LayerScheme("halves", 8, "channel", required=(("weight",), ("weight_scale",)), dtypes=("I8",))
        return Declaration([(["Linear"], scheme)], names_layers=True)

    def dequantized(self, layer, codes, rows):
        scale = self.parts(layer)["weight_scale"].values()
        return codes.raw()[rows].astype("f8") * scale[rows] / 2
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a package with an entry point for a format; return the list of the groups that are asked for."""
    (tmp_path / "qsa_halves.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = []

    def entry_points(*, group):
        asked.append(group)
        entry = metadata.EntryPoint("halves", "qsa_halves:Halves", group)
        return metadata.EntryPoints([entry] if group == "pytest_qsa.formats" else [])

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    monkeypatch.setattr(FORMATS, "_entry_points_loaded", False)
    yield asked
    FORMATS._known.pop("halves", None)
    sys.modules.pop("qsa_halves", None)


def folder_of(path, method):
    path.mkdir()
    config = {"quantization_config": {"quant_method": method}} if method else {}
    (path / "config.json").write_text(json.dumps(config))
    tensors = {
        f"model.layers.{index}.mlp.up_proj.{part}": value
        for index in range(2)
        for part, value in (
            ("weight", np.arange(32, dtype=np.int8).reshape(4, 8)),
            ("weight_scale", np.ones((4, 1), np.float32)),
        )
    }
    save_file(tensors, path / "model.safetensors")
    return open_folder(path)


def test_a_format_of_an_entry_point_is_checked_and_read_as_a_built_in_is(tmp_path, installed):
    folder = folder_of(tmp_path / "halves", "halves")
    form = format_of(folder)
    assert form.label == "halves"
    np.testing.assert_array_equal(form.rows("model.layers.1.mlp.up_proj", slice(1, 2)), [np.arange(8, 16) / 2])
    assert "halves-kernels" in libraries_of_formats(folder)
    assert problems_of(Files(folder), "checkpoint_scales")[1] == []
    del folder.layers["model.layers.1.mlp.up_proj"]["weight_scale"]
    assert [finding.what for finding in problems_of(Files(folder), "checkpoint_scales")[1]] == [
        "missing, though the scheme halves needs it"
    ]


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq", "awq", "fp8", "torchao", None])
def test_no_entry_point_is_loaded_for_what_a_built_in_claims(tmp_path, installed, method):
    format_of(folder_of(tmp_path / "known", method))
    assert installed == []


def test_what_nothing_claims_is_compared_with_its_siblings_and_never_read(tmp_path, installed):
    folder = folder_of(tmp_path / "unknown", "aqlm")
    form = format_of(folder)
    assert installed == ["pytest_qsa.formats"]
    assert (form.label, form.rows("model.layers.1.mlp.up_proj")) == ("aqlm", None)
    assert problems_of(Files(folder), "checkpoint_formats")[1] == []


def test_an_entry_point_that_can_not_be_loaded_is_named(tmp_path, installed, monkeypatch):
    (tmp_path / "qsa_halves.py").write_text("raise RuntimeError('no kernels here')")
    with pytest.raises(InfraError, match=r"the entry point halves = qsa_halves:Halves .*RuntimeError: no kernels here"):
        format_of(folder_of(tmp_path / "halves", "halves"))


def test_two_formats_of_one_name_are_refused():
    FORMATS.built_in()
    with pytest.raises(InfraError, match=r"'fp8' is defined twice, by pytest_qsa\.checkpoint.*Fp8 and by"):

        class Other(Format):
            name = "fp8"


def test_a_registry_finds_every_module_of_its_package_and_asks_entry_points_last(monkeypatch):
    registry: Registry[type] = Registry("pytest_qsa.tests", "pytest_qsa.checkpoint.formats")
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: ())
    registry.add("zip", zip)
    assert registry.find("zip") is zip
    assert registry.find("nothing") is None
    assert list(registry.all()) == [zip]


@pytest.mark.parametrize(
    ("shape", "scales", "group", "expected"),
    [
        ((576, 1), (5, 1), (128, 1), np.repeat([0, 1, 2, 3, 4], 128)[:576]),
        ((4, 1), (2, 1), None, [0, 0, 1, 1]),
        ((4, 1), (1, 1), (128, 128), [0, 0, 0, 0]),
        ((3, 1), (3, 1), 64, [0, 1, 2]),
    ],
    ids=["a smaller last block", "even blocks", "one scale", "a scale a row"],
)
def test_a_scale_belongs_to_the_elements_of_its_group(shape, scales, group, expected):
    table = np.arange(np.prod(scales), dtype=float).reshape(scales)
    np.testing.assert_array_equal(spread(table, shape, slice(None), group)[:, 0], expected)
    np.testing.assert_array_equal(spread(table, shape, slice(1, 3), group)[:, 0], expected[1:3])


def test_groups_of_columns_may_end_in_a_smaller_one():
    found = spread(np.arange(10.0).reshape(2, 5), (2, 576), slice(None), 128)
    np.testing.assert_array_equal(found, np.repeat(np.arange(10.0).reshape(2, 5), 128, axis=1)[:, :576])


@pytest.mark.parametrize(("count", "length", "group"), [(5, 576, None), (5, 576, (64, 1)), (2, 64, (128, 128))])
def test_scales_that_nothing_assigns_or_that_contradict_the_declaration_give_no_number(count, length, group):
    with pytest.raises(ValueError, match=f"{count} scales for {length} rows, and no group size that fits"):
        spread(np.ones((count, 1)), (length, 1), slice(None), group)
