"""Random damage by a seed: to trees of JSON and YAML, to text, and to bytes. The campaign draws its inputs here."""

from __future__ import annotations

import copy
import math
import os
import random

SEED = int(os.environ.get("QSA_CAMPAIGN_SEED", "0"))
WHOLE = os.environ.get("QSA_CAMPAIGN", "") not in ("", "0")
"""Whether the whole campaign runs (`make campaign`) or, beside the other tests, a sample of it."""
FACTOR = int(os.environ.get("QSA_CAMPAIGN") or 1)
"""How many times the campaign's own count of inputs."""

NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 0.5, -0.0, 1e308, 1e-320, math.inf, -math.inf, math.nan)
MARKS = ("", " ", "a\nb", "\x00", "\x1b[31m", "\u202e", "é" * 300, "a" * 5000, "9" * 5000, "$(touch canary)")
WORDS = r"""
. .. / ~ - * [ ( { \ ² ٣ 1e999 0x10 1_000 2027-02-30 ::error::x ##[group] re:[ (a+)+$ a{99999999} %s%n {0}
canary:make org/name hf:./x custom:canary.py ../../etc/passwd /etc/passwd /dev/zero file:///etc layers\.0
absmax rms output int8 compressed-tensors gptq
"""
TREES = ([], {}, [[]], [None], {"": 1}, {"a": {"b": {}}}, [1, "a", None], ["re:("], {"max": "x"}, [{}] * 50)
ODD = (None, True, False, *NUMBERS, *MARKS, *WORDS.split(), *TREES, list(range(500)))
"""What stands where something else should."""


def draws(kind, sample, whole):
    """Yield the number and the generator of each input of a kind: any of them can be made again alone."""
    count = whole * FACTOR if WHOLE else sample
    for number in range(count):
        yield number, random.Random(f"{SEED} {kind} {number}")


def damaged_tree(rng, tree, edits=3):
    """Return a copy of a tree of mappings, lists and scalars in which one to `edits` places were changed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, edits)):
        holder, key = rng.choice(list(_places(tree)) or [(None, None)])
        if holder is not None:
            _damage(rng, holder, key)
    return tree


def _places(tree):
    keys = tree if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from _places(tree[key])


def _damage(rng, holder, key):
    way = rng.randrange(6)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[_name(rng, key)] = holder.pop(key)
    elif way == 2 and isinstance(holder, list):
        holder[key:key] = [copy.deepcopy(holder[key])] * rng.choice((1, 3, 300))
    elif way == 3 and isinstance(holder, dict):
        holder[_name(rng, key)] = copy.deepcopy(rng.choice(ODD))
    elif way == 4:
        holder[key] = nested(rng.choice((1, 10, 60)), holder[key], rng.random() < 0.5)
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))


def _name(rng, key):
    odd = [each for each in ODD if isinstance(each, str)]
    return rng.choice(
        (
            *odd,
            f"{key}s",
            str(key).upper(),
            f"{key}\x00",
            f"[{key}",
            "id",
            "metric",
            "path",
            "extends",
            "trust_remote_code",
        )
    )


def nested(depth, inner, lists):
    """Return a value inside of so many lists, or mappings."""
    for _ in range(depth):
        inner = [inner] if lists else {"a": inner}
    return inner


def damaged_text(rng, text):
    """Return a text with one to four places cut, doubled, exchanged or overwritten."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        to = min(len(text), at + rng.choice((1, 1, 3, 10, 80)))
        odd = rng.choice([each for each in ODD if isinstance(each, str)])
        marks = (
            ":",
            "- ",
            "{",
            "}",
            "[",
            "]",
            "&a ",
            "*a",
            "!!python/object/apply:os.system [touch canary]",
            "!!binary x",
            "<<: ",
            "|",
            "'",
            '"',
            "\t",
            "#",
            "---\n",
            "\ufeff",
        )
        between = rng.choice(
            ("", odd, "[" * 5000, rng.choice(marks), text[at:to] * 2, text[at:to][::-1], rng.choice(text.split("\n")))
        )
        text = text[:at] + between + text[to:]
    return text


def damaged_bytes(rng, content):
    """Return bytes of which some were flipped, cut, doubled, or overwritten by zeros."""
    way, at = rng.randrange(5), rng.randrange(len(content))
    if way == 0:
        return content[:at]
    if way == 1:
        return content + content[at:]
    if way == 2:
        return content[:at] + bytes(rng.choice((1, 8, 4096))) + content[at + 1 :]
    flips = bytearray(content)
    for _ in range(rng.choice((1, 8, 200))):
        flips[rng.randrange(min(len(flips), 2000) if way == 3 else len(flips))] ^= 1 << rng.randrange(8)
    return bytes(flips)
