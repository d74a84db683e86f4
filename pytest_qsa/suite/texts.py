"""The texts that the package brings: a sample, a long document and prompts; the last two are made by rules, not kept.

The same text on every machine: `random.Random` of a fixed seed draws by `random()` alone, which Python keeps stable.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

Message = dict[str, str]

DOCUMENT_CHARACTERS = 200_000
"""The least length of the document: about 45,000 tokens of an English vocabulary."""
_NAMES = (
    *("Adela", "Bruno", "Ciara", "Dario", "Edith", "Felix", "Greta", "Hamid", "Irene", "Jonas", "Katya", "Lorenz"),
    *("Mirela", "Niels", "Olga", "Pavel", "Ruth", "Stefan", "Tamar", "Ulrich", "Vera", "Wanda", "Yusuf", "Zofia"),
)
_FAMILIES = (
    "Arend",
    "Birk",
    "Castell",
    "Dorn",
    "Ebner",
    "Falk",
    "Gruber",
    "Hald",
    "Iversen",
    "Jansen",
    "Keller",
    "Lund",
)
_TOWNS = ("Altmark", "Brenz", "Corvey", "Dunhall", "Eastmere", "Farnov", "Glenby", "Hochtal", "Islay", "Korsund")
_TRADES = ("clockmaker", "ferryman", "bookbinder", "glassblower", "surveyor", "baker", "printer", "beekeeper", "mason")
_GOODS = ("lamp oil", "brass wire", "rye flour", "window glass", "roof slate", "blue ink", "copper nails", "beeswax")
_MONTHS = ("April", "May", "June", "July", "August", "September")
_WEATHER = (
    "Rain fell until noon.",
    "The morning was clear and cold.",
    "Fog lay over the harbour.",
    "It was a warm day.",
)


class _Chronicle:
    """A register of a county, entry by entry; later entries come back to what earlier ones have said."""

    def __init__(self) -> None:
        self._chance = random.Random(18)
        self._people: list[tuple[str, str, str, int]] = []
        self._debts: list[tuple[int, str, str, int]] = []

    def _one(self, choices: Sequence[str]) -> str:
        return choices[int(self._chance.random() * len(choices))]

    def _number(self, low: int, high: int) -> int:
        return low + int(self._chance.random() * (high - low))

    def entry(self, number: int) -> str:
        kinds = [self._arrival, self._purchase, self._payment, self._visit, self._reading]
        kind = self._arrival if len(self._people) < 3 else kinds[int(self._chance.random() * len(kinds))]
        day = number // 4  # four entries a day
        date = f"{1 + day % 28} {_MONTHS[day // 28 % len(_MONTHS)]} {1820 + day // 28 // len(_MONTHS)}"
        return f"Entry {number}, {date}. {self._one(_WEATHER)} {kind(number)}"

    def _arrival(self, number: int) -> str:
        person = (f"{self._one(_NAMES)} {self._one(_FAMILIES)}", self._one(_TRADES), self._one(_TOWNS), number)
        self._people.append(person)
        return f"{person[0]}, a {person[1]} from {person[2]}, was entered in the register of the county."

    def _person(self) -> tuple[str, str, str, int]:
        return self._people[int(self._chance.random() * len(self._people))]

    def _purchase(self, number: int) -> str:
        (name, trade, _, _), goods, price = self._person(), self._one(_GOODS), self._number(12, 480)
        self._debts.append((number, name, goods, price))
        return f"{name}, the {trade}, bought {self._number(2, 40)} measures of {goods} and owes {price} crowns for it."

    def _payment(self, number: int) -> str:
        if not self._debts:
            return self._purchase(number)
        entry, name, goods, price = self._debts.pop(int(self._chance.random() * len(self._debts)))
        return f"{name} paid the {price} crowns owed for the {goods} of entry {entry}, and the debt is struck out."

    def _visit(self, number: int) -> str:
        name, trade, town, entry = self._person()
        host, craft, home, _ = next(person for person in iter(self._person, None) if person[3] != entry)
        return (
            f"{name}, who had come from {town} as a {trade} in entry {entry}, called on {host}, the {craft}, "
            f"and they spoke of the road to {home}."
        )

    def _reading(self, number: int) -> str:
        places = "; ".join(f"{name}, {trade}, from {town}" for name, trade, town, _ in self._people[-4:])
        return f"The clerk read out the last names in the register: {places}."


@lru_cache(1)
def long_document() -> str:
    """Return one document of 200 kB that refers back over its whole length."""
    chronicle, entries, length = _Chronicle(), ["The register of the county of Wendmoor"], 0
    while length < DOCUMENT_CHARACTERS:
        entries.append(chronicle.entry(len(entries)))
        length += len(entries[-1]) + 2
    return "\n\n".join(entries)


_QUESTIONS = (
    *("What is the capital of Norway?", "Name one metal that is liquid at room temperature.", "Why is the sky blue?"),
    *("What does a compass show?", "How many days has a leap year?", "What is photosynthesis?", "Who wrote Hamlet?"),
    *("What is the opposite of cold?", "Name a fruit that is yellow.", "What do bees make?", "What is 12 plus 30?"),
    *("What is a glacier?", "Name the largest ocean.", "What is a thermometer for?", "Why do leaves fall in autumn?"),
)
_FUNCTIONS = (
    *("adds two numbers", "reverses a string", "returns the largest item of a list", "says whether a number is even"),
    *(
        "counts the vowels of a word",
        "returns the factorial of n",
        "removes duplicates from a list",
        "squares a number",
    ),
    *("joins words by commas", "returns the last character of a string", "converts Celsius to Fahrenheit"),
    *("says whether a word is a palindrome", "returns the mean of a list", "merges two dictionaries", "doubles a list"),
    "returns the first n even numbers",
)
_RECORDS = (
    *(("the city of Paris in France", "city and country"), ("a red car with 4 doors", "colour and doors")),
    *(("the book Emma, which has 120 pages", "title and pages"), ("a square of side 5", "shape and side")),
    *(("a meeting on Monday at noon", "day and time"), ("water, which boils at 100 degrees", "name and boiling_point")),
    *(("a bill of 20 euros", "amount and currency"), ("the player Ana with 7 points", "player and points")),
    *(("a blue pen", "colour and item"), ("a flight from Rome to Oslo", "from and to")),
    *(("a dog that weighs 12 kg", "animal and weight"), ("two apples and one pear", "apples and pears")),
)
_LISTS = (
    *("three colours", "two planets", "four fruits", "the days of a weekend", "three animals", "two rivers"),
    *(
        "the four seasons",
        "three tools",
        "two languages",
        "three vegetables",
        "two metals",
        "three musical instruments",
    ),
)
_CALLS = (
    *("What is the weather in Oslo?", "What is the weather in Lima?", "Will it rain in Kyoto?", "How warm is Cairo?"),
    *("Tell me the weather of Quito.", "Is it cold in Tromsø today?", "Weather in Perth, please.", "And in Dakar?"),
    *("How is the weather in Turin?", "Do I need a coat in Riga?", "Is it sunny in Malaga?", "Is it windy in Bergen?"),
    *("Look up the weather in Hanoi.", "What about Tunis?", "How hot is Dubai now?", "Weather report for Graz."),
)
_FOREIGN = (
    *("法国的首都是哪里？", "水的化学式是什么？", "用一句话介绍长城。", "一年有几个月？", "日本の首都はどこですか。"),
    *("空はなぜ青いのですか。", "りんごは何色ですか。", "Назови столицу Италии.", "Сколько дней в неделе?"),
    *(
        "Что такое снег?",
        "ما هي عاصمة مصر؟",
        "كم عدد أيام الأسبوع؟",
        "भारत की राजधानी क्या है?",
        "한국의 수도는 어디입니까?",
    ),
    *("Ποια είναι η πρωτεύουσα της Ελλάδας;", "מהי בירת ספרד?"),
)
_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Returns the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_TOOL_IN_WORDS = (
    'You may call one function: get_weather(city). To call it, answer with <tool_call>{{"name": "get_weather", '
    '"arguments": {{"city": "…"}}}}</tool_call> and nothing else. {}'
)


def _call(city: str) -> str:
    return f'<tool_call>{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}</tool_call>'


@dataclass(frozen=True)
class Conversation:
    """Messages that wait for an answer.

    `tools`: what the answer may call, as OpenAI's API describes it. `in_words`: messages that say the same, for a chat
    template that has no place for tools; without them such a template can't be asked.
    """

    messages: Sequence[Any]
    tools: Sequence[Any] = ()
    in_words: Sequence[Any] = ()


def conversation_of(text: Any) -> Conversation:
    """Return a text, or the messages of a conversation, as one."""
    if isinstance(text, Conversation):
        return text
    return Conversation([_said("user", text)] if isinstance(text, str) else list(text))


@lru_cache(1)
def prompts() -> tuple[Conversation, ...]:
    """Return 87 conversations that wait for an answer: questions, JSON, code, tool calls, other scripts.

    Kinds alternate, so that the first n hold some of each: of the first 32 eleven ask for JSON and five for a call.
    Those that ask for JSON, or for a call in words, begin with an answered example, which small models need.
    """
    kinds: list[list[Conversation]] = [
        [_asked(f"{text} Answer in one sentence.") for text in _QUESTIONS],
        [_asked(_record(*each), before=(_record(*_A_RECORD[:2]), _A_RECORD[2])) for each in _RECORDS],
        [_asked(f"Write a short Python function that {text}. Only the code.") for text in _FUNCTIONS],
        [_call_of(text) for text in _CALLS],
        [_asked(_list(text), before=(_list(_A_LIST[0]), _A_LIST[1])) for text in _LISTS],
        [_asked(text) for text in _FOREIGN],
    ]
    longest = max(map(len, kinds))
    return tuple(kind[index] for index in range(longest) for kind in kinds if index < len(kind))


_A_RECORD = ("a cat named Tom who is 3 years old", "name and age", '{"name": "Tom", "age": 3}')
_A_LIST = ("two oceans", '["Atlantic", "Pacific"]')


def _record(what: str, keys: str) -> str:
    return f"Write {what} as a JSON object with the keys {keys}. Only the JSON."


def _list(what: str) -> str:
    return f"Name {what} as a JSON list of strings. Only the JSON."


def _asked(text: str, before: tuple[str, str] | None = None) -> Conversation:
    """Return a conversation of one prompt. `before`: another one and its answer, which come first."""
    return Conversation(_messages(text, before))


def _messages(text: str, before: tuple[str, str] | None = None) -> list[Message]:
    example = [_said("user", before[0]), _said("assistant", before[1])] if before else []
    return [*example, _said("user", text)]


def _said(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _call_of(text: str) -> Conversation:
    """Return a prompt that a call of the tool answers."""
    in_words = _messages(text, (_TOOL_IN_WORDS.format("What is the weather in Rome?"), _call("Rome")))
    return Conversation(_messages(text), [_TOOL], in_words)


def _sample() -> str:
    return resources.files("pytest_qsa.suite").joinpath("data/sample.txt").read_text(encoding="utf-8")


SHIPPED: Mapping[str, Callable[[], str]] = {"sample": _sample, "document": long_document}
"""The texts by the name that `data.source` has for them."""
