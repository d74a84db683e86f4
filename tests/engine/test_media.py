"""Pictures and sounds as data: through the model's own processor, into towers, projectors and text layers alike."""

import json
import re
import wave
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch

from pytest_qsa import capture
from pytest_qsa.captures import LOGITS, Capture, Provenance, Request, merge
from pytest_qsa.common import InfraError
from pytest_qsa.engine import anatomy
from pytest_qsa.engine.load.batches import pictures_of
from pytest_qsa.engine.load.media import has_media, media_batches
from pytest_qsa.engine.load.media_records import drawn_picture, drawn_sound, records_of
from pytest_qsa.engine.load.models import load_model
from pytest_qsa.engine.load.patches import grid_of
from pytest_qsa.engine.run.shared_pass import SampleShare
from pytest_qsa.engine.subject import capture_loaded
from pytest_qsa.metrics import METRICS
from pytest_qsa.metrics.series import Bounds
from pytest_qsa.report.verdict_text import token_line
from pytest_qsa.suite import Data, Memory, Model, Subject
from pytest_qsa.verdicts.tokens import token_evidence
from support.architectures import IMAGE, saved
from support.captures import differing
from support.judged import judge_bounds
from support.models import record

SOURCES = {"llava": "pictures", "vit": "sample", "clip": "sample", "whisper": "sample", "qwen2_audio": "sounds"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Return a function: the name of an architecture → its checkpoint's folder, made when first asked for."""
    root = tmp_path_factory.mktemp("media")

    def folder(name):
        if not (root / name).exists():
            torch.manual_seed(0)
            saved(name, root / name)
        return root / name

    return folder


def loaded(folder):
    return load_model(Model(path=str(folder)), str(folder), Memory(), allow_code=False)


@pytest.mark.parametrize("name", SOURCES)
def test_every_tower_and_text_block_is_measured_on_what_the_package_draws(checkpoints, tmp_path, name):
    folder = checkpoints(name)
    own, data = loaded(folder), Data(source=SOURCES[name], num_samples=2)
    batches = media_batches(data, tmp_path, own, str(folder))
    found = capture(own.model, batches, sites=[("kind:*.blocks", "output")])
    series = found.output("kind:*.blocks").absmax()
    assert series.layers == list(found.blocks)
    assert list(anatomy(Model(path=str(folder)), str(folder), "", data, tmp_path).blocks) == list(found.blocks)
    first = found.blocks[0]
    expected = max(np.abs(each).max() for each in record(own.model, batches, first, "output"))
    assert series[first] == pytest.approx(expected, rel=1e-6)


def test_a_picture_changes_what_the_text_layers_see(checkpoints, tmp_path):
    own = loaded(checkpoints("llava"))
    first, other = media_batches(Data(source="pictures", num_samples=2), tmp_path, own, str(checkpoints("llava")))
    assert torch.equal(first["input_ids"], other["input_ids"])
    assert int((first["input_ids"] == IMAGE).sum()) == 16  # one for each patch of 32 × 32 pixels
    rms = [
        capture(own.model, [each], sites=[("kind:blocks", "output")]).output("kind:blocks").rms()
        for each in (first, other)
    ]
    assert not np.allclose(rms[0].values, rms[1].values)


def test_drawn_media_are_the_same_for_a_number_and_others_for_another():
    for draw in (drawn_picture, drawn_sound):
        one, again, other = draw(3), draw(3), draw(4)
        for part in ("image", "audio"):
            if (content := getattr(one, part)) is not None:
                assert np.array_equal(content, getattr(again, part))
                assert not np.array_equal(content, getattr(other, part))
                assert content.std() > 0


def test_a_classifier_is_compared_with_its_reference_by_its_decisions(checkpoints, tmp_path):
    folder = checkpoints("vit")
    own, other = loaded(folder), loaded(folder)
    with torch.no_grad():
        other.model.classifier.weight.add_(torch.randn_like(other.model.classifier.weight))
    needs = METRICS["kl_divergence"].needs(LOGITS, "all", {"stat": "mean"}) | METRICS["same_top"].needs(
        LOGITS, "all", {}
    )
    batches = media_batches(Data(source="pictures", num_samples=3), tmp_path, own, str(folder))
    subject = Subject("vit", Model(path=str(folder)), Data(source="pictures"), Memory(), tmp_path)
    found = capture_loaded(subject, own, batches, [Request("", LOGITS, None, needs)], reference=other)
    with torch.no_grad():
        q, p = (np.concatenate([m.model(**b).logits.double().numpy() for b in batches]) for m in (own, other))
    p, q = (each - np.log(np.exp(each).sum(axis=1, keepdims=True)) for each in (p, q))
    expected = (np.exp(p) * (p - q)).sum(axis=1).mean()
    assert found.logits().kl_divergence().values[0] == pytest.approx(expected, rel=1e-5)
    assert found.logits().same_top().values[0] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())


ENCODERS = {
    "clip": [("visual_projection", "mean"), (r"vision_model\.(encoder\.)?layers\.1", "mean")],
    "bert": [(r"encoder\.layer\.2", "mean"), (r"encoder\.layer\.2", "first")],
    "modernbert": [(r"layers\.1", "last")],
}


def texts_with_padding():
    ids = torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return [{"input_ids": ids[rows], "attention_mask": mask[rows]} for rows in (slice(2), slice(2, 4))]


def outputs_of(model, batches, layer, pool):
    """Return a layer's output for each sample, pooled in float64 without padding, by a hook of its own."""
    seen, rows = [], []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    for batch, output in zip(batches, seen, strict=True):
        output = output[0] if isinstance(output, tuple) else output
        for index, row in enumerate(output.double()):
            if "attention_mask" in batch and "pixel_values" not in batch:
                row = row[batch["attention_mask"][index].bool()]
            row = row if row.dim() == 2 else row[None]
            rows.append({"mean": row.mean(0), "first": row[0], "last": row[-1]}[pool].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_embeddings_of_an_encoder_are_pooled_without_padding(checkpoints, tmp_path, name):
    folder = checkpoints(name)
    own, other = loaded(folder), loaded(folder)
    with torch.no_grad():
        for parameter in own.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batches = texts_with_padding()
    if name == "clip":
        batches = media_batches(Data(source="pictures", num_samples=4), tmp_path, own, str(folder))
    asked = [
        Request(f"{layer}$", "output", None, METRICS["embedding"].needs("output", "all", {"pool": pool}))
        for layer, pool in ENCODERS[name]
    ]
    subject = Subject(name, Model(path=str(folder)), Data(), Memory(), tmp_path)
    found = capture_loaded(subject, own, batches, asked, reference=other)
    for pattern, pool in ENCODERS[name]:
        (layer,) = {layer for layer, _ in found.sites if re.search(f"{pattern}$", layer)}
        expected = [outputs_of(each.model, batches, layer, pool) for each in (other, own)]
        pooled = found.sites[layer, "output"].arrays[f"pooled/pooled:{pool}"]
        np.testing.assert_allclose(pooled, np.stack(expected, axis=1), rtol=1e-5, atol=1e-6)
        assert found.output(f"{pattern}$").embedding("cosine", pool=pool).values[0] < 1


def folder_of(tmp_path, *names, records=()):
    from PIL import Image

    for index, name in enumerate(names):
        if name.endswith(".wav"):
            with wave.open(str(tmp_path / name), "wb") as sound:
                sound.setnchannels(1)
                sound.setsampwidth(2)
                sound.setframerate(16000)
                sound.writeframes((drawn_sound(index).audio * 32767).astype("<i2").tobytes())
        else:
            Image.fromarray(drawn_picture(index).image).save(tmp_path / name)
    if records:
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return Data(source=f"custom:{tmp_path}", num_samples=max(len(records) or len(names), 1))


def test_a_folder_gives_its_pictures_with_their_texts(tmp_path):
    data = folder_of(tmp_path, "b.png", "a.png", records=[{"image": "b.png", "text": "What is it?"}])
    (only,) = records_of(data, tmp_path)
    assert (only.name, only.text) == ("b.png", "What is it?")
    assert np.array_equal(only.image, drawn_picture(0).image)
    (tmp_path / "metadata.jsonl").unlink()
    assert [each.name for each in records_of(data.model_copy(update={"num_samples": 2}), tmp_path)] == [
        "a.png",
        "b.png",
    ]


def test_a_set_of_texts_with_a_picture_beside_it_stays_one_of_texts(tmp_path):
    data = folder_of(tmp_path, "logo.png")
    assert has_media(data, tmp_path, torch.nn.Linear(1, 1))
    (tmp_path / "train.jsonl").write_text('{"text": "a"}', encoding="utf-8")
    assert not has_media(data, tmp_path, torch.nn.Linear(1, 1))


def test_a_sound_is_read_as_it_was_written(tmp_path):
    (only,) = records_of(folder_of(tmp_path, "a.wav"), tmp_path)
    assert only.rate == 16000
    assert np.abs(only.audio - drawn_sound(0).audio).max() < 2**-14


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda folder: (folder / "a.png").write_bytes(b"no picture"), r"a\.png: the picture can't be decoded"),
        (lambda folder: (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:200]), r"a\.png: the picture"),
        (lambda folder: (folder / "b.wav").write_bytes(b"RIFF"), r"b\.wav: the sound can't be decoded"),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"image": "../x.png"}'), "no file of this folder"),
        (
            lambda folder: (folder / "metadata.jsonl").write_text('{"image": "x.png"}\n{"image": "a.png"}'),
            "no such file",
        ),
        (lambda folder: (folder / "metadata.jsonl").write_text("{"), "record 0 is no JSON"),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"text": "a"}\n[1]'), "record 0 names no file"),
        (lambda folder: (folder / "a.png").unlink(), "it has 1 records, and data.num_samples asks for 2"),
    ],
)
def test_what_can_not_be_read_is_one_line(tmp_path, broken, says):
    data = folder_of(tmp_path, "a.png", "b.wav")
    broken(tmp_path)
    with pytest.raises(InfraError, match=says) as caught:
        records_of(data, tmp_path)
    assert "\n" not in str(caught.value)


def written(tmp_path, *rows):
    (tmp_path / "set").mkdir(exist_ok=True)
    for index in range(2):
        PIL.Image.fromarray(drawn_picture(index).image).save(tmp_path / "set" / f"{index}.png")
    if not (tmp_path / "outside.png").is_symlink():
        (tmp_path / "outside.png").symlink_to("/etc/passwd")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return Data(source="custom:a.jsonl", num_samples=max(1, len(rows)))


def test_records_of_a_file_name_pictures_beside_it(tmp_path):
    data = written(tmp_path, {"image": "set/1.png", "question": "Which?"}, {"image": ["set/0.png"]})
    first, second = records_of(data, tmp_path)
    assert (first.name, first.text, second.name) == ("1.png", "", "0.png")
    assert np.array_equal(first.image, drawn_picture(1).image)
    assert np.array_equal(second.image, drawn_picture(0).image)
    asked = data.model_copy(update={"num_samples": 1, "column": "question"})
    assert records_of(asked, tmp_path)[0].text == "Which?"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"image": "set/9.png"}], r"record 0 names 'set/9\.png', and there is no such file below"),
        ([{"image": "../b.png"}], r"record 0 names '\.\./b\.png', which doesn't lie below .*: paths count from there"),
        ([{"image": "/etc/passwd"}], "which doesn't lie below"),
        ([{"image": "outside.png"}], "which doesn't lie below"),
        ([{"image": "https://x.org/a.png"}], "which doesn't lie below"),
        ([{"image": "a.jsonl"}], r"a\.jsonl: the picture can't be decoded: it is no picture"),
        ([{"image": "set/0.png"}, {"text": "b"}], "record 1 has nothing under 'image'"),
        ([{"image": "set/0.png", "text": 3}], "record 0 has no text under 'text' but a int"),
        ([{"image": ["set/0.png", "set/1.png"]}], "record 0 has 2 of them, and a sample is a prompt with one image"),
        ([{"picture": "set/0.png"}], "there is no column 'image' or 'audio'"),
    ],
)
def test_a_record_that_names_no_picture_is_one_line(tmp_path, rows, says):
    with pytest.raises(InfraError, match=says) as caught:
        records_of(written(tmp_path, *rows), tmp_path)
    assert "\n" not in str(caught.value)


def test_sets_as_the_hub_has_them_give_their_pictures_and_sounds(tmp_path):
    written(tmp_path)
    folder_of(tmp_path, "s.wav")
    files = [{"bytes": (tmp_path / "set" / f"{i}.png").read_bytes(), "path": f"{i}.png"} for i in (0, 1)]
    pictures = datasets.Dataset.from_dict({"img": files, "text": ["a", "b"]}).cast_column("img", datasets.Image())
    pictures.to_parquet(tmp_path / "a.parquet")
    inside = [{"bytes": (tmp_path / "s.wav").read_bytes(), "path": "s.wav"}]
    schema = datasets.Features({"audio": datasets.Audio()}).arrow_schema
    datasets.Dataset(pa.table({"audio": inside}, schema=schema)).save_to_disk(tmp_path / "saved")
    (tmp_path / "hub").mkdir()
    pictures.to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    for source in ("custom:a.parquet", "hf:./hub"):
        first, second = records_of(Data(source=source, num_samples=2), tmp_path)
        assert np.array_equal(first.image, drawn_picture(0).image)
        assert (first.text, second.text) == ("a", "b")
    (sound,) = records_of(Data(source="custom:saved", num_samples=1), tmp_path)
    assert sound.rate == 16000
    assert sound.audio.std() > 0


def test_a_set_with_pictures_is_one_of_texts_for_a_model_that_takes_none(checkpoints, llama, tmp_path):
    data = written(tmp_path, {"image": "set/0.png", "text": "a"})
    assert not has_media(data, tmp_path, loaded(llama).model)
    assert has_media(data, tmp_path, loaded(checkpoints("llava")).model)
    texts = written(tmp_path, {"id": 1, "text": "a"})
    assert not has_media(texts, tmp_path, loaded(checkpoints("llava")).model)
    with pytest.raises(InfraError, match=r"there is no column 'image'; it has id, text, and ViT.* takes nothing else"):
        has_media(texts, tmp_path, loaded(checkpoints("vit")).model)


def test_a_token_is_known_by_its_patch_in_tower_projector_and_prompt(checkpoints, tmp_path):
    folder, tokens = checkpoints("llava"), {}
    own = loaded(folder)
    plain = drawn_picture(0).image[:32, :32].copy()
    for name, side in (("plain", 0), ("marked", 8)):  # the patch of 8 × 8 pixels in row 1, column 2, from 0
        image = plain.copy()
        image[8 : 8 + side, 16 : 16 + side] = 255 - image[8 : 8 + side, 16 : 16 + side]
        (tmp_path / name).mkdir()
        PIL.Image.fromarray(image).save(tmp_path / name / "a.png")
        data = Data(source=f"custom:{tmp_path / name}", num_samples=1)
        (tokens[name],) = media_batches(data, tmp_path, own, str(folder))
    (picture,) = pictures_of([tokens["marked"]]).values()
    assert np.abs(picture.pixels[8:16, 16:24].astype(int) - (255 - plain[8:16, 16:24])).max() <= 1
    prompt = tokens["marked"]["input_ids"].shape[1]
    # Before attention mixes the patches, those of one token alone differ.
    for layer in ("model.vision_tower.*embeddings", r"patch_embedding"):
        (name,) = [each for each, _ in own.model.named_modules() if re.search(f"{layer}$", each)]
        both = [outputs_before(own.model, tokens[each], name) for each in ("plain", "marked")]
        (position,) = np.flatnonzero(np.abs(both[0] - both[1]).max(axis=1) > 1e-6)
        assert picture.patch_at(int(position), len(both[0]), prompt) == (1, 2, 4, 4)
    places = np.flatnonzero(tokens["marked"]["input_ids"][0].numpy() == IMAGE)
    assert picture.patch_at(int(places[6]), prompt, prompt) == (1, 2, 4, 4)
    assert picture.patch_at(6, 16, prompt) == (1, 2, 4, 4)
    assert picture.patch_at(0, 17, prompt) is None  # the class token
    assert picture.patch_at(prompt - 1, prompt, prompt) is None  # a word


def outputs_before(model, batch, layer):
    """Return a layer's output as [tokens, channels]."""
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    (output,) = seen
    output = output[0] if isinstance(output, tuple) else output
    return (output.flatten(2).mT if output.dim() == 4 else output)[0].numpy()


@pytest.mark.parametrize(
    ("count", "thw", "size", "tower", "grid"),
    [
        (16, None, (32, 32), (4, 4), (4, 4)),  # LLaVA
        (4, None, (32, 32), (4, 4), (2, 2)),  # Gemma 3 pools
        (6, [[1, 4, 6]], None, (0, 0), (2, 3)),  # Qwen-VL merges four patches
        (12, [[2, 4, 6]], None, (0, 0), (0, 0)),  # a video
        (5, None, (32, 32), (4, 4), (0, 0)),
        (18, None, (48, 24), (6, 3), (6, 3)),
    ],
)
def test_the_grid_of_a_pictures_tokens_is_known_or_none(count, thw, size, tower, grid):
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    assert grid_of(count, None if thw is None else torch.tensor(thw), config, size, tower) == grid


def test_evidence_of_a_pictures_token_is_its_patch_and_is_kept_and_redacted_with_the_capture(checkpoints, tmp_path):
    folder = checkpoints("vit")
    own, data = loaded(folder), Data(source="pictures", num_samples=3)
    subject = Subject("vit", Model(path=str(folder)), data, Memory(), tmp_path)
    asked = [Request("kind:blocks", "output")]
    found = capture_loaded(subject, own, None, asked)
    kept = Capture.from_bytes(found.to_bytes())
    layer, verdict = found.blocks[0], judge_bounds(found.output("kind:blocks").outlier_ratio(), Bounds(max=0.5))
    token = token_evidence(kept, [layer], verdict)[0]
    assert token.patch == (*divmod(token.position - 1, 4), 4, 4)
    assert token.picture.startswith("data:image/jpeg;base64,")
    assert f"row {token.patch.row + 1}, column {token.patch.column + 1} of 4 × 4" in token_line(token)
    assert token_evidence(kept.redacted(), [layer], verdict)[0].patch is None
    parts = [capture_loaded(subject, own, None, asked, share=SampleShare(samples=part)) for part in ((0, 1), (1, 3))]
    assert {s: p.pixels.tobytes() for s, p in merge(parts).pictures.items()} == {
        s: p.pixels.tobytes() for s, p in kept.pictures.items()
    }


def test_a_run_says_whether_a_tower_read_anything(checkpoints, llama, tmp_path):
    said = {}
    for folder, source in ((checkpoints("llava"), "sample"), (checkpoints("llava"), "pictures"), (llama, "sample")):
        data = Data(source=source, num_samples=2, seq_len=16)
        subject = Subject("m", Model(path=str(folder)), data, Memory(), tmp_path)
        asked = [Request("kind:blocks", "output")]
        made = capture_loaded(subject, loaded(folder), None, asked).provenance
        said[folder.name, source] = str(Provenance.of(made.plain()).data).partition(" (sha256")[0]
    assert list(said.values()) == [
        "2 × 16 tokens of sample, seed 0, text alone, so that its vision tower read nothing",
        "2 samples of pictures, seed 0",
        "2 × 16 tokens of sample, seed 0",
    ]


def test_a_prompt_that_is_too_long_with_its_picture_is_one_line(checkpoints, tmp_path):
    own = loaded(checkpoints("llava"))
    own.model.config.get_text_config().max_position_embeddings = 24
    data = written(tmp_path, {"image": "set/0.png", "text": "far too much " * 9})
    with pytest.raises(InfraError, match=r"0\.png: the prompt has \d+ tokens with its image, more than the 24 pos"):
        media_batches(data, tmp_path, own, str(checkpoints("llava")))


def test_a_model_without_a_processor_says_what_is_missing(checkpoints, llama, tmp_path):
    own = loaded(llama)
    with pytest.raises(InfraError, match="no processor of pictures or sounds can be loaded"):
        media_batches(Data(source="pictures", num_samples=1), tmp_path, own, str(llama))
    whisper = checkpoints("whisper")
    with pytest.raises(InfraError, match="takes no image"):
        media_batches(Data(source="pictures", num_samples=1), tmp_path, loaded(whisper), str(whisper))


def test_a_package_that_a_processor_needs_is_named(checkpoints, tmp_path, monkeypatch):
    def refuse(*names, **options):
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found.\n")

    folder = checkpoints("llava")
    own = loaded(folder)
    # The processor of its pictures alone would load, and make no prompt.
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", refuse)
    with pytest.raises(
        InfraError, match=r"requires the Torchvision library .*: install torchvision, the build"
    ) as said:
        media_batches(Data(source="pictures", num_samples=1), tmp_path, own, str(folder))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_audio"])  # which read weights of a tower without calling the layer
def test_a_tower_streamed_from_disk_gives_the_bits_of_one_in_memory(checkpoints, tmp_path, name):
    folder, data = checkpoints(name), Data(source=SOURCES.get(name, "pictures"), num_samples=2)
    requests = [Request("kind:*.blocks", "output")]
    found = []
    for place in ("cpu", "disk"):
        memory = Memory(offload_device=place)
        own = load_model(Model(path=str(folder)), str(folder), memory, allow_code=False)
        subject = Subject(name, Model(path=str(folder)), data, memory, tmp_path)
        found.append(capture_loaded(subject, own, None, requests))
        own.close()
    assert len(found[0].sites) == 4
    assert differing(*found) == []
