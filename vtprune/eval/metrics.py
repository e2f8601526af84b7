# SPDX-License-Identifier: Apache-2.0
"""How an answer is scored: the public benchmarks' own rules, as numbers in [0, 1] per answer and sums over a task.

A metric gives one number per answer (`score`). Some benchmarks add numbers over all of their questions, such as POPE's
F1 or MME's acc+ (`totals`). ``tests/eval/test_metrics.py`` holds each of them to the functions of lmms-eval 0.7.3, to
the last digit; where the two differ on purpose, the metric says so.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from ..registry import nearest
from .tasks import Example

Row = dict[str, Any]

# -- VQA: soft accuracy ------------------------------------------------------------------------------------------------

#: Contractions as VQA's evaluation writes them; it finds them where an apostrophe is left out.
_APOSTROPHES = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd how'd how'll how's "
    "he's I'm I've isn't it'd it'll ma'am might've mightn't must've mustn't needn't o'clock oughtn't shan't "
    "should've shouldn't that's there'd there're there's they'd they'll they're they've wasn't we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're "
    "why's won't would've wouldn't y'all you'd you'll you're you've hadn't've he'd've couldn't've I'd've "
    "it'd've mightn't've she'd've shouldn't've somebody'll someone'd someone'll someone's something'd "
    "something'll they'd've there'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've "
    "somebody'd've someone'd've something'd've"
)
#: Its table has these irregular ones, some of them by mistake; scores depend on them.
_IRREGULAR = {
    "let's": "let's", "she's": "she's", "notve": "not've", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at", "somebody'd": "somebodyd", "somebodys": "somebody's", "twas": "'twas",
}  # fmt: skip
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(value) for value, word in enumerate(_DIGITS)}
NUMBERS["none"] = "0"
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"(?<=\d),+(?=\d)")


def _contractions() -> dict[str, str]:
    """By each way to leave out one apostrophe."""
    table = dict(_IRREGULAR)
    for word in _APOSTROPHES.split():
        for at, mark in enumerate(word):
            if mark == "'":
                table[word[:at] + word[at + 1 :]] = word
    return table


CONTRACTIONS = _contractions()


def vqa_punctuation(text: str) -> str:
    """Without punctuation: taken out beside a space or in a number with commas, else a space."""
    out = text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text or _COMMA.search(text) is not None
        out = out.replace(mark, "" if beside else " ")
    # The official code hands a flag to the place of a count: it stops after 32 periods. So must we.
    return _PERIOD.sub("", out, count=32)


def vqa_words(text: str) -> str:
    """Lower case; number words as digits, no articles, contractions with their apostrophes."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_normalise(text: str) -> str:
    """As VQAv2's evaluation does."""
    return vqa_words(vqa_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def textvqa_normalise(text: str) -> str:
    """As TextVQA's evaluation (EvalAI) does: commas and question marks go first, and ``'s`` is a word."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_normalise(text)


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """Mean over people of ``min(1, agreeing others / 3)``; both sides normalised already (arXiv:1505.00468)."""
    same = [given == answer for given in people]
    return float(statistics.mean(min(1, float(sum(same) - own) / 3) for own in same))


def _vqa(given: str, example: Example) -> float:
    return soft_accuracy(vqa_normalise(given), [vqa_normalise(answer) for answer in all_answers(example)])


def _textvqa(given: str, example: Example) -> float:
    return soft_accuracy(textvqa_normalise(given), [textvqa_normalise(answer) for answer in all_answers(example)])


# -- yes or no ---------------------------------------------------------------------------------------------------------


def pope_label(given: str) -> str:
    """What POPE compares: the whole answer in lower case."""
    return given.lower().strip()


def mme_label(given: str) -> str:
    """``"yes"``, ``"no"`` or ``"other"``, read from the first four letters of an answer."""
    text = given.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def _pope(given: str, example: Example) -> float:
    return float(pope_label(given) == pope_label(example.answer))


def _mme(given: str, example: Example) -> float:
    return float(mme_label(given) == example.answer.lower().strip().replace(".", ""))


# -- texts and numbers -------------------------------------------------------------------------------------------------


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: letters put in, taken out or changed."""
    before = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != other)))
        before = row
    return before[-1]


def anls(given: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity (arXiv:1907.00490): best over answers, 0 below the threshold."""
    text = " ".join(given.lower().split())
    shares = []
    for answer in answers:
        # The length is that of the texts as they were, the distance that of the texts with single spaces.
        length = max(len(answer.upper()), len(given.upper()))
        shares.append(edit_distance(" ".join(answer.lower().split()), text) / length if length else 0.0)
    best = 1 - min(shares)
    return float(best) if best >= threshold else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed(given: str, answer: str, tolerance: float = 0.05) -> bool:
    """ChartQA's accuracy (arXiv:2203.10244): a number within 5 % of the answer, any other text letter for letter."""
    number, wanted = _number(given), _number(answer)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= tolerance
    return given.lower() == answer.lower()


def _fold(text: str) -> str:
    """Full-width letters and spaces as their ASCII."""
    narrow = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
    return text.translate(narrow)


def contains(given: str, answers: Sequence[str], formulas: bool = False) -> bool:
    """OCRBench's accuracy (arXiv:2305.07895): an answer stands anywhere in the text; formulas (HME100k) keep their case
    and lose their spaces."""
    if formulas:
        text = given.strip().replace("\n", " ").replace(" ", "")
        return any(answer.strip().replace("\n", " ").replace(" ", "") in text for answer in answers)
    text = _fold(given.strip()).lower().strip().replace("\n", " ")
    return any(_fold(answer).lower().strip().replace("\n", " ") in text for answer in answers)


# -- multiple choice ---------------------------------------------------------------------------------------------------


def letter(given: str, answer: str) -> bool:
    """ScienceQA's: the letter alone in any case, or a capital letter and a period before anything else."""
    text = given.strip()
    if text.lower() == answer.strip().lower():
        return True
    return len(text) >= 2 and text[0].isupper() and text[1] == "." and text[0].lower() == answer.strip().lower()


#: What may stand around MMBench's letter, in the order in which it is looked for.
_AROUND = (
    *(("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)


def mmbench_choice(given: str, choices: Mapping[str, str]) -> str:
    """The option that an answer names, by its letter or else by its text; "" where it names none or several.

    Parameters
    ----------
    given
        The answer.
    choices
        Text of each option by its letter.
    """
    words = given.split()
    for before, after in _AROUND:
        named = [c for c in "ABCDE" if f"{before}{c}{after}" in words]
        if len(named) == 1 and ((before or after) or not ("A" in words and len(words) > 3)):
            return named[0]  # a bare A in a sentence is an article
    named = [c for c, text in choices.items() if str(text).lower() in given.lower()]
    return named[0] if len(named) == 1 else ""


def _mmbench(given: str, example: Example) -> float:
    choices = dict(zip("ABCDE", example.choices, strict=False))
    return float(mmbench_choice(given.strip(), choices) == example.answer.strip())


# -- all of them -------------------------------------------------------------------------------------------------------


def all_answers(example: Example) -> tuple[str, ...]:
    """Every accepted answer."""
    return example.answers or (example.answer,)


#: Score in [0, 1] of an answer, by metric.
METRICS: dict[str, Callable[[str, Example], float]] = {
    "exact": lambda given, example: float(given in all_answers(example)),
    "exact-ignoring-case": lambda given, example: float(given.lower() in [a.lower() for a in all_answers(example)]),
    "vqa": _vqa,
    "textvqa": _textvqa,
    "pope": _pope,
    "mme": _mme,
    "anls": lambda given, example: anls(given, all_answers(example)),
    "relaxed": lambda given, example: float(any(relaxed(given, answer) for answer in all_answers(example))),
    "contains": lambda given, example: float(contains(given, all_answers(example))),
    "formula": lambda given, example: float(contains(given, all_answers(example), formulas=True)),
    "letter": lambda given, example: float(letter(given, example.answer)),
    "mmbench": _mmbench,
}


def score(given: str, example: Example) -> float:
    """What an answer is worth, in [0, 1]. An empty answer, and any to a broken question, is worth nothing.

    Raises
    ------
    ConfigError
        The example's metric is unknown.
    """
    if example.scorer is not None:
        return example.scorer(given) if given.strip() and not example.broken else 0.0
    if example.metric not in METRICS:
        raise ConfigError(
            f"unknown metric {example.metric!r}{nearest(example.metric, list(METRICS))}; known: {', '.join(METRICS)}"
        )
    if example.broken or not given.strip():
        return 0.0
    return METRICS[example.metric](given, example)


def row_score(row: Row, given: str) -> float:
    """What another answer to the question of a row would be worth."""
    answers = tuple(row.get("answers", ()))
    metric = row.get("metric", "exact")
    if metric not in METRICS or metric == "mmbench":
        return float(given == row["answer"])  # of another harness; or options that the row does not have
    example = Example(row["task"], row["id"], row["kind"], (), row["answer"], answers, metric)
    return score(given, replace(example, broken=row.get("error", "")))


#: MME's categories that are not perception.
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def totals(rows: Sequence[Row]) -> dict[str, float]:
    """What benchmarks report over all questions of a task beside a mean; nothing for most.

    ``pope``: ``precision``, ``recall``, ``f1`` and ``yes_ratio``, the share of answers that are yes, as in the paper
    (arXiv:2305.10355). lmms-eval 0.7.3 reports the share of *questions* whose answer is yes under that name, which is
    the same for every model. ``mme``: ``acc_plus``, the share of pictures with both questions right, and
    ``perception`` and ``cognition``, sums over categories of 100 * (acc + acc+) (arXiv:2306.13394).

    Parameters
    ----------
    rows
        Answers to one task under one method.

    Raises
    ------
    ConfigError
        A picture of MME has not two questions.
    """
    metric = rows[0].get("metric") if rows else None
    if metric == "pope":
        said = [pope_label(row["prediction"]) for row in rows]
        wanted = [pope_label(row["answer"]) for row in rows]
        both = sum(a == b == "yes" for a, b in zip(said, wanted, strict=True))
        precision = both / said.count("yes") if "yes" in said else 0.0
        # Answers that are neither yes nor no count for no recall, as in lmms-eval.
        asked = sum(a in ("yes", "no") and b == "yes" for a, b in zip(said, wanted, strict=True))
        recall = both / asked if asked else 0.0
        f1 = 2 * (precision * recall) / (precision + recall) if precision + recall else 0.0
        return {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": said.count("yes") / len(said)}
    if metric == "mme":
        pictures: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            pictures.setdefault(row["kind"], {}).setdefault(row["group"], []).append(row["score"])
        for kind, groups in pictures.items():
            odd = next((name for name, scores in groups.items() if len(scores) != 2), None)
            if odd is not None:
                raise ConfigError(
                    f"MME asks two questions about each picture; {odd} of {kind} has {len(groups[odd])}: give an even "
                    "count, or the whole set"
                )
        plus = [sum(scores) == 2 for groups in pictures.values() for scores in groups.values()]
        sums = {"perception": 0.0, "cognition": 0.0}
        for kind, groups in pictures.items():
            points = [sum(s) / len(s) * 100.0 + (sum(s) == 2) * 100.0 for s in groups.values()]
            sums["cognition" if kind in COGNITION else "perception"] += sum(points) / len(points)
        return {"acc_plus": sum(plus) / len(plus), **sums}
    return {}
