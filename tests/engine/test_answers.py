"""The reference's own answers as data, and the tokens at which they end: found, counted, kept, or refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pytest_qsa import capture
from pytest_qsa.captures import GENERATION, LOGITS, BoundaryTokens, Capture, Request, merge, merge_requests
from pytest_qsa.common.errors import AnomalyError, InfraError, SuiteError
from pytest_qsa.engine import look_ahead
from pytest_qsa.engine.load import answers
from pytest_qsa.engine.load.answers import (
    batched,
    boundaries,
    conversations_of,
    formatted,
    greedy,
    markups_of,
    prompts_of,
    unbatched,
)
from pytest_qsa.engine.load.generation import check_cache
from pytest_qsa.engine.reference.record import RecordOptions
from pytest_qsa.engine.run.shared_pass import SampleShare
from pytest_qsa.engine.subject import capture_subject, record_reference
from pytest_qsa.metrics import METRICS
from pytest_qsa.suite import (
    Data,
    Generation,
    Memory,
    Model,
    NamedSubject,
    load_suite,
    prompts,
    subject_of as subject_of_suite,
)
from pytest_qsa.tools.calibrate import Sampled
from support import models

TEMPLATE = "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}> {% endif %}"
MOST, COUNT = 10, 80
DATA = Data(source="prompts", num_samples=COUNT, seq_len=512, answers={"max_new_tokens": MOST}, batch_size=16)
STATS = ("recall", "missed", "spurious")


def with_template(source, folder, template=TEMPLATE):
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def checkpoints(llama, tmp_path_factory):
    """Return the folders of an original that ends most answers, and of one whose head has lost a row, and the ends."""
    from safetensors.torch import load_file, save_file

    base = tmp_path_factory.mktemp("answers")
    original = with_template(llama, base / "original")
    model, tok = AutoModelForCausalLM.from_pretrained(original), AutoTokenizer.from_pretrained(original)
    asked = prompts_of(DATA, tok, base)
    free = greedy(model, asked, MOST, 512, "it")
    common = Counter(token for answer in free for token in set(answer[2:])).most_common(4)
    ends = [token for token, _ in common]
    (original / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    broken = base / "broken"
    shutil.copytree(original, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][ends[0]] *= 0.8
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    return original, broken, ends


def subject_of(checkpoint, reference=None, data=DATA, **own):
    model = Model(path=str(checkpoint), reference=None if reference is None else str(reference))
    return NamedSubject("it", model, data, **{"memory": Memory(), "folder": checkpoint.parent, **own})


def request(*metrics):
    needs = [METRICS[name].needs("logits", "all", given) for name, given in metrics]
    return merge_requests(Request("", "logits", None, each) for each in needs)


BOUNDARY = request(("boundary_tokens", {}), ("kl_divergence", {}))


@pytest.fixture(scope="module")
def compared(checkpoints):
    original, broken, _ = checkpoints
    return capture_subject(subject_of(broken, original), BOUNDARY)


def test_answers_are_the_likeliest_tokens_up_to_the_end(checkpoints, tmp_path):
    original, _, ends = checkpoints
    model, tok = AutoModelForCausalLM.from_pretrained(original), AutoTokenizer.from_pretrained(original)
    asked = prompts_of(DATA.model_copy(update={"num_samples": 20}), tok, tmp_path)
    for prompt, answer in zip(asked, greedy(model, asked, MOST, 512, "it"), strict=True):
        text = list(prompt)
        while len(text) == len(prompt) or (len(text) - len(prompt) < MOST and text[-1] not in ends):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert answer == text[len(prompt) :]
    assert tok.decode(asked[0]).endswith("as a JSON object with the keys city and country. Only the JSON.|> ")


def test_the_metric_is_what_the_two_models_predict_there(checkpoints, compared):
    original, broken, ends = checkpoints
    p, q = (AutoModelForCausalLM.from_pretrained(each) for each in (original, broken))
    tok = AutoTokenizer.from_pretrained(original)
    asked = prompts_of(DATA, tok, original)
    kept, missed, places, spurious, elsewhere = 0, 0, 0, 0, 0
    for prompt, answer in zip(asked, greedy(p, asked, MOST, 512, "it"), strict=True):
        with torch.no_grad():
            one, other = (m(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1) for m in (p, q))
        for index, came in enumerate(answer):
            row = len(prompt) - 1 + index
            likeliest = int(other[row].argmax())
            if came in ends:
                places += 1
                kept += likeliest == came
                missed += float(other[row, came] - one[row, came]) < -np.log(2)
            else:
                elsewhere += 1
                spurious += likeliest in ends
    logits = compared.logits()
    assert places >= 30
    assert 0 < kept < places
    found = {stat: logits.boundary_tokens(stat) for stat in STATS}
    want = {"recall": kept / places, "missed": missed / places, "spurious": 1000 * spurious / elsewhere}
    for stat in STATS:
        np.testing.assert_allclose(found[stat].values, [want[stat]])
    low, high, count = next(iter(found["recall"].intervals.values()))
    assert count == places
    assert low < want["recall"] < high


def test_the_loss_shows_there_and_hardly_in_the_mean(checkpoints, compared):
    original, _, _ = checkpoints
    healthy = capture_subject(subject_of(original, original), BOUNDARY).logits()
    assert healthy.boundary_tokens().values.tolist() == [1.0]
    assert healthy.boundary_tokens("missed").values.tolist() == [0.0]
    assert compared.logits().boundary_tokens().values[0] < 0.9


def test_a_kept_reference_holds_its_answers(checkpoints, compared, tmp_path):
    original, broken, _ = checkpoints
    file = tmp_path / "original.qsa"
    recording = record_reference(subject_of(original), BOUNDARY, RecordOptions(), file)
    file.write_bytes(recording.content.to_bytes())
    subject = replace(subject_of(broken, file), folder=tmp_path)
    found = capture_subject(subject, BOUNDARY)
    assert [ids.tolist() for ids in found.tokens] == [ids.tolist() for ids in compared.tokens]
    for stat in STATS:
        got, want = (each.logits().boundary_tokens(stat).values for each in (found, compared))
        np.testing.assert_allclose(got, want)
    plain = replace(recording.content, answers=())
    file.write_bytes(plain.to_bytes())
    with pytest.raises(InfraError, match=r"recorded without answers: make it anew"):
        capture_subject(subject, BOUNDARY)


def test_a_calibration_asks_once_and_takes_the_error_of_all_answers_where_a_part_has_too_few(
    checkpoints, compared, tmp_path, monkeypatch
):
    original, broken, _ = checkpoints
    asked, file = [], tmp_path / "ends.qsa.yaml"
    monkeypatch.setattr(answers, "greedy", lambda *given: asked.append(given[1]) or greedy(*given))
    file.write_text(
        f"model: {{path: {broken}, reference: {original}}}\n"
        f"data: {{source: prompts, num_samples: {COUNT}, seq_len: 512, answers: {{max_new_tokens: {MOST}}}}}\n"
        "assertions:\n  - {id: ends, metric: boundary_tokens, min: 0.1}\n  - {id: kl, metric: kl_divergence, max: 9}\n"
    )
    suite_file = load_suite(file)
    sampled = Sampled.of(subject_of_suite(suite_file), suite_file, 8, 1, allow_code=False)
    assert [len(prompts) for prompts in asked] == [80]
    assert sampled.size == 10
    ends, kl = (sampled.finding(each, 10) for each in suite_file.assertions)
    low, high, _ = next(iter(compared.logits().boundary_tokens().intervals.values()))
    assert ends.proposals[0].noise.sigma == pytest.approx((high - low) / (2 * 1.959964), rel=1e-3)
    assert "no part shows it alone (the reference writes" in ends.remark
    assert "standard error" not in kl.remark


def test_batches_of_answers_are_padded_and_come_back():
    samples = [([1, 2], [3]), ([4], [5, 6, 7]), ([8, 9], [1])]
    batches = batched(samples, 2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 4), (1, 3)]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert unbatched(batches) == samples


def test_a_boundary_of_several_tokens_counts_once():
    ids = np.array([9, 5, 1, 2, 7, 1, 3, 2, 8], dtype=np.int32)
    written = np.array([9, 1, 2, 7, 1, 3, 1, 8, 8], dtype=np.float64)
    table = boundaries(ids, written, [[1, 2], [2]], 2)
    # The row before a token is about it; before the answer, which begins at 2, and at the end nothing is known.
    assert table[:, 0].tolist()[1:8] == [1, 2, -1, -1, -1, 2, -1]
    assert table[:, 1].tolist()[1:3] == [0, 1]
    assert table[:, 2].tolist()[1:8] == [1, 2, -1, 1, -1, 1, -1]
    assert np.isnan(table[[0, 8]]).all()


def test_the_boundaries_are_those_that_end_an_answer_and_those_of_the_template():
    class Token:
        chat_template = "<|begin|>{{ x }}<|end|><|think|>"
        bos_token_id, pad_token_id, unk_token_id = 1, 2, 3
        added_tokens_decoder = {1: "<|begin|>", 2: "<|end|>", 4: "<|think|>", 5: "<|other|>"}  # noqa: RUF012

        def __call__(self, text, **options):
            return {"input_ids": [ord(letter) for letter in text]}

    model = models.llama()
    model.generation_config.eos_token_id = [2, 6]
    assert markups_of("auto", model, Token()) == [[2], [6], [4]]
    assert markups_of("ab c", model, Token()) == [[97, 98], [99]]
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(AnomalyError, match=r"names no token that ends an answer: name them, tokens:"):
        markups_of("auto", model, None)


def test_too_few_boundaries_are_an_anomaly_with_their_number(checkpoints):
    original, broken, _ = checkpoints
    few = subject_of(broken, original, DATA.model_copy(update={"num_samples": 8}))
    with pytest.raises(AnomalyError, match=r"the reference writes \d boundaries in these samples, and it takes 30"):
        capture_subject(few, BOUNDARY).logits().boundary_tokens()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"num_samples": 200}, r"'prompts' has 87 prompts, and data\.num_samples asks for 200"),
        ({"seq_len": 20}, r"a prompt of 'prompts' has \d+ tokens, and data\.seq_len 20 leaves no room"),
        ({"source": "custom:none.jsonl"}, r"none\.jsonl: can't be read as data"),
    ],
)
def test_prompts_that_make_no_answers_are_one_line(checkpoints, data, what):
    original, _, _ = checkpoints
    with pytest.raises(InfraError, match=what):
        capture_subject(subject_of(original, None, DATA.model_copy(update=data)), request(("perplexity", {})))


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes nothing for add_generation_prompt"),
        ("{{ raise_exception('no user') }}", "the tokenizer can't format a conversation: no user"),
    ],
)
def test_a_template_that_begins_no_answer_is_one_line(llama, tmp_path, template, what):
    folder = with_template(llama, tmp_path / "it", template)
    with pytest.raises(InfraError, match=what):
        capture_subject(subject_of(folder), request(("perplexity", {})))


def test_a_model_that_can_not_continue_a_text_is_one_line():
    with pytest.raises(InfraError, match=r"the reference \(BertModel\) can't continue a text by itself"):
        greedy(models.bert(), [[1, 2]], 4, 16, "the reference")


def test_prompts_alone_are_no_text():
    with pytest.raises(ValueError, match=r"prompts are conversations: say answers: \{\}, or chat_template: true"):
        Data(source="prompts")
    assert len({json.dumps(each.messages) for each in prompts()}) == len(prompts()) == 87
    assert Data(source="prompts", chat_template=True).answers is None


def test_boundaries_of_any_text_can_be_asked_for_in_python():
    model, other = models.llama(), models.damaged(models.llama())
    model.generation_config.eos_token_id = other.generation_config.eos_token_id = 7
    batches = [models.token_batch(4, 16)]
    cap = capture(other, batches, sites=[("", "logits")], statistics=["boundary_tokens"], reference=model)
    assert BoundaryTokens("auto").key in cap.sites["logits", "logits"]
    with pytest.raises((AnomalyError, SuiteError), match=r"writes \d boundaries"):
        cap.logits().boundary_tokens()


TEXT = Data(num_samples=2, seq_len=16)
ASKED = Generation(num_prompts=40, max_new_tokens=MOST)
GENERATES = request(("generation", {}))
DIFFERENCES = ("ended", "repetition", "valid_json", "markup_kept")


@pytest.fixture(scope="module")
def generated(checkpoints):
    original, broken, _ = checkpoints
    return capture_subject(subject_of(broken, original, TEXT, generation=ASKED), GENERATES)


def free_answers(folder):
    """Return what a model answers to the first prompts, token by token, without a cache."""
    model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ends = model.generation_config.eos_token_id
    for conversation in prompts()[: ASKED.num_prompts]:
        messages = list(conversation.in_words or conversation.messages)
        text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tok(text, add_special_tokens=False)["input_ids"]
        answer = []
        while not answer or (len(answer) < MOST and answer[-1] not in ends):
            with torch.no_grad():
                answer.append(int(model(torch.tensor([[*ids, *answer]])).logits[0, -1].argmax()))
        yield answer, answer[-1] in ends


def test_generation_compares_the_free_answers_of_both_models(checkpoints, generated):
    original, broken, _ = checkpoints
    reference, own = list(free_answers(original)), list(free_answers(broken))
    arrays = generated.sites[GENERATION, LOGITS].arrays
    for name, side in (("answers", own), ("reference_answers", reference)):
        assert [row[row >= 0].tolist() for row in arrays[name]] == [tokens for tokens, _ in side]
    logits = generated.logits()
    both = [(len(one), len(other)) for (one, a), (other, b) in zip(own, reference, strict=True) if a and b]
    want = {
        "ended": np.mean([ended for _, ended in own]) - np.mean([ended for _, ended in reference]),
        "length_ratio": sum(length for length, _ in both) / sum(length for _, length in both),
        "diverged_at": np.mean(
            [
                next(
                    (at for at, (x, y) in enumerate(zip(one, other, strict=False)) if x != y),
                    min(map(len, (one, other))),
                )
                for (one, _), (other, _) in zip(own, reference, strict=True)
            ]
        ),
    }
    assert want["ended"] < -0.1  # the stop token that the broken head has lost
    for stat, value in want.items():
        np.testing.assert_allclose(logits.generation(stat).values, [value])
    low, high, count = logits.generation().intervals[GENERATION]
    assert low < want["ended"] < high
    assert count == 40


def test_a_model_answers_as_itself_and_no_text_is_left_after_redaction(checkpoints):
    original, _, _ = checkpoints
    found = capture_subject(subject_of(original, original, TEXT, generation=ASKED), GENERATES)
    assert {found.logits().generation(stat).values[0] for stat in ("ended", "repetition")} == {0.0}
    assert found.logits().generation("length_ratio").values.tolist() == [1.0]
    assert Capture.from_bytes(found.to_bytes()).to_bytes() == found.to_bytes()
    redacted = found.redacted()
    assert set(redacted.sites[GENERATION, LOGITS].arrays) == {"generation"}
    assert redacted.logits().generation("ended").values.tolist() == [0.0]


def test_parts_of_the_data_make_one_capture_with_the_answers_once(checkpoints, generated):
    original, broken, _ = checkpoints
    both = merge_requests([*GENERATES, *request(("kl_divergence", {}))])
    subject = subject_of(broken, original, TEXT, generation=ASKED)
    whole = capture_subject(subject, both)
    parts = [capture_subject(subject, both, share=SampleShare(samples=part)) for part in ((0, 1), (1, 2))]
    joined = merge(parts)
    assert joined.to_bytes() == whole.to_bytes()
    assert joined.sites[GENERATION, LOGITS].populations == 40


def test_a_kept_reference_holds_its_answers_to_prompts(checkpoints, generated, tmp_path):
    original, broken, _ = checkpoints
    file = tmp_path / "original.qsa"
    recording = record_reference(subject_of(original, None, TEXT, generation=ASKED), GENERATES, RecordOptions(), file)
    file.write_bytes(recording.content.to_bytes())
    subject = subject_of(broken, file, TEXT, folder=tmp_path, generation=ASKED)
    found = capture_subject(subject, GENERATES).sites[GENERATION, LOGITS].arrays
    for name, array in generated.sites[GENERATION, LOGITS].arrays.items():
        np.testing.assert_array_equal(found[name], array)
    other = replace(subject, generation=ASKED.model_copy(update={"num_prompts": 39}))
    with pytest.raises(InfraError, match=r"was recorded with other prompts: make it anew"):
        capture_subject(other, GENERATES)


@pytest.mark.parametrize(
    ("asked", "memory", "what"),
    [
        ({"num_prompts": 88}, {}, r"'prompts' has 87 prompts, and generation\.num_prompts asks for 88"),
        (
            {"max_new_tokens": 5000},
            {},
            r"prompt \d+ has \d+ tokens, and with max_new_tokens 5,000 that is more than the",
        ),
        ({"prompts": "custom:none.jsonl"}, {}, r"none\.jsonl: can't be read as data"),
        ({}, {"offload_device": "disk"}, r"generation: the model is read block by block"),
    ],
)
def test_prompts_that_can_not_be_answered_are_one_line(checkpoints, asked, memory, what):
    original, _, _ = checkpoints
    subject = subject_of(original, original, TEXT, generation=Generation(**asked), memory=Memory(**memory))
    with pytest.raises(InfraError, match=what):
        capture_subject(subject, GENERATES)


def test_prompts_that_are_not_there_are_told_before_a_model_is_loaded(checkpoints):
    original, _, _ = checkpoints
    asked = Generation(prompts="custom:absent.jsonl", num_prompts=2)
    with pytest.raises(InfraError, match=r"absent\.jsonl"):
        look_ahead(subject_of(original, original, TEXT, generation=asked), GENERATES)


def test_prompts_of_a_file_and_of_the_data_are_answered_in_their_order(checkpoints, tmp_path):
    original, _, _ = checkpoints
    records = [{"messages": [{"role": "user", "content": f"Say {n}."}]} for n in range(3)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    own = {"num_prompts": 2, "max_new_tokens": 4}
    found = [
        capture_subject(
            subject_of(original, original, data, folder=tmp_path, generation=Generation(prompts=named, **own)),
            GENERATES,
        )
        for named, data in (
            ("custom:mine.jsonl", TEXT),
            ("data", TEXT.model_copy(update={"source": "custom:mine.jsonl", "chat_template": True, "seq_len": 8})),
        )
    ]
    answers = [each.sites[GENERATION, LOGITS].arrays["answers"].tolist() for each in found]
    assert len(answers[0]) == 2
    assert answers[0] == answers[1]


WITH_TOOLS = "{% for t in tools or [] %}<{{ t['function']['name'] }}>{% endfor %}" + TEMPLATE
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}


def test_a_records_own_tools_are_offered_by_the_template_or_refused(llama, tmp_path):
    user = {"role": "user", "content": "Find it."}
    records = [{"messages": [user]}, {"messages": [user], "tools": [TOOL]}, {"messages": [user], "tools": "[]"}]
    records[2]["tools"] = json.dumps([TOOL])
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = Data(source="custom:mine.jsonl", num_samples=3, chat_template=True)
    plain, *offering = conversations_of(data, tmp_path, "n")
    tok = AutoTokenizer.from_pretrained(with_template(llama, tmp_path / "tools", WITH_TOOLS))
    assert tok.decode(formatted(plain, tok, "generation")) == "Find it.|> "
    assert {tok.decode(formatted(each, tok, "generation")) for each in offering} == {"<look_up>Find it.|> "}
    assert tok.decode(formatted(prompts()[3], tok, "generation")) == "<get_weather>What is the weather in Oslo?|> "
    without = AutoTokenizer.from_pretrained(with_template(llama, tmp_path / "none", TEMPLATE))
    with pytest.raises(InfraError, match=r"generation: the chat template has no place for the tools"):
        formatted(offering[0], without, "generation")
    assert "You may call one function" in without.decode(formatted(prompts()[3], without, "generation"))
    (tmp_path / "mine.jsonl").write_text(json.dumps({"messages": [user], "tools": {"name": "x"}}))
    with pytest.raises(InfraError, match="record 0 has tools that are no list of objects"):
        conversations_of(data.model_copy(update={"num_samples": 1}), tmp_path, "n")


def test_the_first_prompts_of_the_package_hold_json_calls_and_other_scripts():
    first = prompts()[:32]
    asked = [each.messages[-1]["content"] for each in first]
    assert sum("JSON" in text for text in asked) >= 8
    assert sum(bool(each.tools) for each in first) >= 4
    assert sum(not text.isascii() for text in asked) >= 5


def test_a_model_without_a_cache_is_one_line():
    check_cache(models.llama(), "generation: the model")
    with pytest.raises(InfraError, match=r"generation: the model \(ViTModel\) keeps no cache of earlier tokens"):
        check_cache(models.vit(), "generation: the model")
