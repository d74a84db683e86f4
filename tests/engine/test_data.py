"""Calibration data: windows of tokens by each rule, their special tokens and chat templates, and the seed."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from pytest_qsa.common.errors import AnomalyError, InfraError
from pytest_qsa.engine.load.data import (
    batches_of,
    document_windows,
    stream_windows,
    windows_of,
)
from pytest_qsa.engine.load.sources import check_local, read_texts
from pytest_qsa.suite import Data

BOS, EOS, UNKNOWN = 0, 1, 2
WORDS = {f"w{index}": index + 3 for index in range(100)}


def tokenizer(template="$A"):
    model = WordLevel({"<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN, **WORDS}, unk_token="<unk>")
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if template != "$A":
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def words(count, start=0):
    return " ".join(f"w{index % 100}" for index in range(start, start + count))


def ids(count, start=0):
    return [index % 100 + 3 for index in range(start, start + count)]


def data(source="custom:a.txt", **settings):
    return Data(source=source, **{"num_samples": 2, "seq_len": 5, **settings})


# Windows.


def test_texts_are_packed_one_after_the_other_without_padding():
    windows = windows_of([words(7), words(3, start=7)], data(), tokenizer())
    assert windows.tolist() == [ids(5), ids(5, start=5)]
    assert windows.dtype == torch.int64


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        ("<s> $A", [BOS], []),
        ("$A </s>", [], [EOS]),
        ("<s> $A </s>", [BOS], [EOS]),
        ("<s> <s> $A", [BOS, BOS], []),
        ("$A", [], []),
    ],
)
def test_each_window_has_the_special_tokens_of_its_own(template, before, after):
    inner = 6 - len(before) - len(after)
    windows = windows_of([words(2 * inner)], data(seq_len=6), tokenizer(template))
    assert windows.tolist() == [[*before, *ids(inner, start), *after] for start in (0, inner)]


def test_special_tokens_can_be_left_out():
    windows = windows_of([words(10)], data(add_special_tokens=False), tokenizer("<s> $A </s>"))
    assert windows.tolist() == [ids(5), ids(5, start=5)]


def test_a_special_token_inside_the_text_is_kept():
    windows = windows_of(["w1 </s> w2 w3 w4"], data(num_samples=1), tokenizer())
    assert windows.tolist() == [[4, EOS, 5, 6, 7]]


def test_the_seed_chooses_the_windows_and_nothing_else_does():
    text, tok = [words(400)], tokenizer("<s> $A")
    settings = {"num_samples": 6, "seq_len": 5}
    first, again, other = (windows_of(text, data(seed=seed, **settings), tok) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(99)
    assert torch.equal(first, windows_of(text, data(seed=3, **settings), tok))


@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_windows_are_different_ones_in_the_order_of_the_text(seed):
    windows = windows_of([words(100)], data(num_samples=8, seed=seed), tokenizer())
    starts = [row[0] - 3 for row in windows.tolist()]
    assert starts == sorted(set(starts))
    assert all(row == ids(5, start) for row, start in zip(windows.tolist(), starts, strict=True))


def test_all_windows_are_taken_where_there_are_just_enough():
    assert windows_of([words(14)], data(), tokenizer()).tolist() == [ids(5), ids(5, start=5)]


def test_too_little_text_says_how_much_there_was():
    with pytest.raises(
        InfraError, match=r"too little text in 'custom:a\.txt': 14 tokens make 2 windows of 5.*num_samples asks for 3"
    ):
        windows_of([words(14)], data(num_samples=3), tokenizer())
    with pytest.raises(InfraError, match="0 tokens make 0 windows"):
        windows_of([], data(), tokenizer())


@pytest.mark.parametrize("seed", range(3))
def test_windows_with_a_stride_overlap_and_follow_one_another(seed):
    windows = windows_of([words(60)], data(num_samples=6, seq_len=6, stride=2, seed=seed), tokenizer("<s> $A"))
    first = windows[0, 1].item() - 3
    assert windows.tolist() == [[BOS, *ids(5, first + 2 * at)] for at in range(6)]
    assert windows_of([words(13)], data(num_samples=5, stride=2), tokenizer()).tolist()[-1] == ids(5, start=8)
    with pytest.raises(InfraError, match=r"13 tokens make 5 windows of 5 that begin 2 apart"):
        windows_of([words(13)], data(num_samples=6, stride=2), tokenizer())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stride": 5}, "windows of 5 tokens overlap only where stride is less"),
        ({"stride": 2, "answers": {}}, "answers are samples of their own"),
        ({"stride": 0}, "greater than 0"),
    ],
)
def test_a_stride_that_means_nothing_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        data(**settings)


def test_a_stride_of_a_set_whose_windows_lie_at_random_is_refused(tmp_path):
    with pytest.raises(InfraError, match=r"data\.stride: windows of 'wikitext2' are drawn at random places"):
        check_local(data("wikitext2", stride=2), tmp_path)


def test_a_window_without_room_for_text_is_an_error():
    with pytest.raises(InfraError, match="seq_len 2 leaves no room beside 2 special tokens"):
        windows_of([words(9)], data(seq_len=2), tokenizer("<s> $A </s>"))


# Batches.


def test_batches_have_their_size_and_the_last_one_the_rest(tmp_path):
    (tmp_path / "a.txt").write_text(words(25))
    batches = batches_of(data(num_samples=5, batch_size=2), tokenizer(), tmp_path)
    assert [batch.keys() for batch in batches] == [{"input_ids"}] * 3
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 5), (2, 5), (1, 5)]
    assert torch.cat([batch["input_ids"] for batch in batches]).flatten().tolist() == ids(25)


@pytest.mark.parametrize(("start", "first"), [(7, 7), (None, 0), (0, 0)])
def test_a_model_with_a_decoder_gets_the_tokens_shifted_behind_its_start(tmp_path, start, first):
    (tmp_path / "a.txt").write_text(words(10))
    config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=start)
    (batch,) = batches_of(data(batch_size=2), tokenizer(), tmp_path, config)
    assert batch["input_ids"].tolist() == [ids(5), ids(5, start=5)]
    assert batch["decoder_input_ids"].tolist() == [[first, *ids(4)], [first, *ids(4, start=5)]]


def test_a_model_without_a_decoder_gets_no_shifted_tokens(tmp_path):
    (tmp_path / "a.txt").write_text(words(10))
    (batch,) = batches_of(data(batch_size=2), tokenizer(), tmp_path, SimpleNamespace(is_encoder_decoder=False))
    assert batch.keys() == {"input_ids"}


def test_the_batches_of_a_decoder_run_in_a_real_model(tmp_path):
    from support import models

    (tmp_path / "a.txt").write_text(words(10) + " w1" * 20)
    model = models.t5()
    (batch,) = batches_of(data(batch_size=2), tokenizer(), tmp_path, model.config)
    batch = {key: value.clamp(max=models.VOCABULARY - 1) for key, value in batch.items()}
    from pytest_qsa import capture

    cap = capture(model, [batch], sites=[(r"decoder\.block\.1$", "output")])
    assert cap.sites["decoder.block.1", "output"].sample.tolist() == [0, 1]


# Sources.


def test_the_sample_that_comes_with_the_package_is_long_enough_for_the_defaults(tmp_path):
    (text,) = read_texts(Data(source="sample"), tmp_path)
    assert len(text.split()) > Data().num_samples * 512


@pytest.mark.parametrize("seed", [0, 7])
def test_wikitext_windows_begin_at_random_places_of_the_first_nine_tenths(seed):
    """The rule of PrefixQuant, with Python's own generator, so that its seed gives the same places here."""
    texts = [words(300), words(200, start=300)]
    windows = stream_windows(texts, data("wikitext2", num_samples=8, seed=seed), tokenizer())
    chance = random.Random(seed)
    starts = [chance.randint(0, 450 - 5 - 1) for _ in range(8)]
    assert windows.tolist() == [ids(5, start) for start in starts]


def test_documents_that_are_too_short_are_passed_over():
    texts = [words(3), words(40, start=10), words(4), words(50, start=50), *[words(2)] * 6]
    windows = document_windows(texts, data("c4", num_samples=12), tokenizer("<s> $A")).tolist()
    assert len(windows) == 12
    assert {row[0] for row in windows} == {BOS}
    places = [row[1] - 3 for row in windows]
    assert all(row[1:] == ids(4, place) for row, place in zip(windows, places, strict=True))
    assert {10 <= place < 50 or 50 <= place < 100 for place in places} == {True}
    again = document_windows(texts, data("c4", num_samples=12), tokenizer("<s> $A")).tolist()
    assert again == windows


def test_too_few_long_documents_say_so():
    with pytest.raises(InfraError, match=r"too few texts of 'pile' are longer than 5 tokens: 0 windows were found"):
        document_windows([words(5), words(4)], data("pile"), tokenizer())


# Conversations.

CHAT = "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}"


def test_conversations_are_put_into_the_template_of_the_tokenizer(tmp_path):
    tok = tokenizer()
    tok.chat_template = CHAT
    records = [{"text": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}, {"text": "w3"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    settings = data("custom:a.jsonl", num_samples=1, seq_len=9, chat_template=True)
    (batch,) = batches_of(settings, tok, tmp_path)
    assert batch["input_ids"].tolist() == [[BOS, 4, EOS, BOS, 5, EOS, BOS, 6, EOS]]


def test_a_tokenizer_that_can_not_encode_a_text_is_told_in_one_line(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    lacking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"w1": 0}, unk_token="<unk>")))
    (tmp_path / "a.txt").write_text(words(20))
    with pytest.raises(AnomalyError, match=r"the tokenizer of .* can't encode 'a': .* Missing"):
        batches_of(data(), lacking, tmp_path)


@pytest.mark.parametrize(
    ("template", "limit"),
    [
        ("{{ 'a' * 10000000000 }}", "1 GB"),
        ("{{ 'a'|center(10000000000) }}", "1 GB"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "0 s"),
    ],
)
def test_a_template_that_never_ends_is_the_checkpoints_fault(template, limit, tmp_path, monkeypatch):
    monkeypatch.setattr("pytest_qsa.engine.load.tokenizer.TEMPLATE_SECONDS", 0.1)
    tok = tokenizer()
    tok.chat_template = template
    (tmp_path / "a.txt").write_text(words(20))
    with pytest.raises(AnomalyError, match=rf"the checkpoint's chat template takes more than {limit}"):
        batches_of(data(chat_template=True), tok, tmp_path)


def test_a_tokenizer_without_a_template_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text(words(20))
    with pytest.raises(InfraError, match=r"data\.chat_template: the tokenizer can't format"):
        batches_of(data(chat_template=True), tokenizer(), tmp_path)
