# SPDX-License-Identifier: Apache-2.0
"""Scores: by hand, and against lmms-eval's own functions on thousands of answers, to the last digit."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from vtprune.errors import ConfigError
from vtprune.eval import metrics
from vtprune.eval.tasks import Example

# fmt: off
PIECES = [
    "yes", "no", "Yes.", "NO", "y", "n", "N.", "not", "yes it is", "know", "other", "A", "B.", "(C)", "D)", "a",
    "b", "two", "2", "ten", "none", "zero", "0.5", "5%", "50%", "1,000", "1000", "10,5", "3.14.15", "1e3", "-2",
    "nan", "inf", "a", "an", "the", "The cat", "dont", "don't", "shouldntve", "shouldn'tve", "couldn'tve",
    "yall'd've", "hes", "thats", "red-blue", "red/blue", "red /blue", "[red]", "o'clock", "oclock", "it's",
    "dog's", "dogs'", "what?", "so,so", ",", "\n", "\t", "  ", ".", "...", ". . .", "x" * 40, "." * 40, "ｆｕｌｌ",
    "　", "é", "中文", "ß", "İ", "café", "CAFÉ", "color", "colour", "Colour!", "kitten", "sitting", "answer: B",
    "The answer is (B).", "None of these", "A cat", "\\frac{a}{b}",
]
# fmt: on


def answers(count: int, seed: int) -> list[str]:
    """Random answers of one to four pieces."""
    rng = random.Random(seed)
    joins = (" ", "", ", ", ". ", "\n", "/")
    return [rng.choice(joins).join(rng.choices(PIECES, k=rng.randint(1, 4))) for _ in range(count)]


def example(answer: str, metric: str, **more: Any) -> Example:
    return Example("t", "1", "all", (), answer, metric=metric, **more)


@pytest.mark.parametrize(
    ("metric", "given", "right", "value"),
    [
        ("exact", "red", ("red",), 1),
        ("exact", "Red", ("red",), 0),
        ("exact-ignoring-case", "Red", ("blue", "red"), 1),
        ("vqa", "2", ("two",) * 3 + ("3",) * 7, 0.9),  # three agree: the three see two others, the seven all three
        ("vqa", "The dog", ("dog",) * 10, 1),
        ("vqa", "dont", ("don't",) * 4 + ("do",) * 6, 1),
        ("vqa", "1,000", ("1000",) * 10, 1),
        ("textvqa", "stop?", ("stop",) * 2 + ("go",) * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("pope", "YES ", ("yes",), 1),
        ("pope", "yes.", ("yes",), 0),
        ("mme", "Yes, there is", ("Yes",), 1),
        ("mme", "I know", ("No",), 0),
        ("anls", "kittens", ("kitten",), 1 - 1 / 7),
        ("anls", "dog", ("kitten",), 0),
        ("relaxed", "104", ("100",), 1),
        ("relaxed", "106", ("100",), 0),
        ("relaxed", "Blue", ("blue",), 1),
        ("contains", "it says STOP here", ("stop",), 1),
        ("formula", "x + Y", ("x+y",), 0),
        ("letter", "b", ("B",), 1),
        ("letter", "B. because", ("B",), 1),
        ("letter", "Because", ("B",), 0),
    ],
)
def test_by_hand(metric: str, given: str, right: tuple[str, ...], value: float) -> None:
    assert metrics.score(given, example(right[0], metric, answers=right)) == pytest.approx(value, abs=1e-12)


def test_empty_broken_and_unknown() -> None:
    for metric in metrics.METRICS:
        assert metrics.score("", example("yes", metric, choices=("yes",))) == 0
        assert metrics.score("  ", example("a", metric, answers=("the", "a"))) == 0
        assert metrics.score("yes", example("yes", metric, broken="no picture")) == 0
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        metrics.score("x", example("x", "exakt"))


def rows(metric: str, said: list[str], wanted: list[str], **more: Any) -> list[dict[str, Any]]:
    made = []
    for i, (given, answer) in enumerate(zip(said, wanted, strict=True)):
        value = metrics.score(given, example(answer, metric))
        made.append({"metric": metric, "prediction": given, "answer": answer, "score": value, "kind": "all", **more})
        made[-1]["group"] = str(i // 2)
    return made


def test_totals_by_hand() -> None:
    found = metrics.totals(rows("pope", ["yes", "yes", "no", "no"], ["yes", "no", "yes", "no"]))
    assert found == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    assert metrics.totals(rows("pope", ["yes", "yes"], ["no", "no"]))["yes_ratio"] == 1
    mme = rows("mme", ["yes", "no", "yes", "yes"], ["Yes", "No", "Yes", "No"])
    assert metrics.totals(mme) == {"acc_plus": 0.5, "perception": 125.0, "cognition": 0.0}
    with pytest.raises(ConfigError, match="two questions about each picture; 1 of all has 1"):
        metrics.totals(mme[:3])
    assert metrics.totals(rows("exact", ["a"], ["a"])) == {}


class TestAgainstLmmsEval:
    """The same numbers as lmms-eval 0.7.3; where they differ, the test says where and why."""

    COUNT = 4000

    @pytest.fixture(autouse=True)
    def _there(self) -> None:
        pytest.importorskip("lmms_eval")

    def people(self, seed: int) -> list[list[str]]:
        """Ten answers each; few words, so that they agree often."""
        rng = random.Random(seed)
        return [[rng.choice(pool) for _ in range(10)] for pool in (answers(3, seed + i) for i in range(self.COUNT))]

    def test_vqav2(self) -> None:
        from lmms_eval.tasks.vqav2.utils import vqav2_process_results

        rng, told, scores = random.Random(1), self.people(1), set()
        for own, other in zip(told, answers(self.COUNT, 2), strict=True):
            given = rng.choice([*own, other])
            people = [{"answer": text, "answer_id": i} for i, text in enumerate(own)]
            theirs = vqav2_process_results({"question_id": 1, "answers": people}, [given])["exact_match"]
            if given.strip():  # an answer without a word is worth nothing here, and may be "right" there
                assert metrics.score(given, example(own[0], "vqa", answers=tuple(own))) == theirs, (given, own)
                scores.add(theirs)
        assert len(scores) > 4

    def test_textvqa(self) -> None:
        from lmms_eval.tasks.textvqa.utils import textvqa_process_results

        rng, told, scores = random.Random(2), self.people(3), set()
        for own, other in zip(told, answers(self.COUNT, 4), strict=True):
            given = rng.choice([*own, other])
            doc = {"question_id": 1, "answers": copy.copy(own)}
            theirs = textvqa_process_results(doc, [given])["exact_match"]
            if given.strip():
                assert metrics.score(given, example(own[0], "textvqa", answers=tuple(own))) == theirs, (given, own)
                scores.add(theirs)
        assert len(scores) > 4

    def test_normalisation_tables(self) -> None:
        from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

        assert metrics.CONTRACTIONS == EvalAIAnswerProcessor.CONTRACTIONS
        table = EvalAIAnswerProcessor()
        for text in [*PIECES, *answers(self.COUNT, 5), *metrics.CONTRACTIONS, *metrics.NUMBERS]:
            assert metrics.textvqa_normalise(text) == table(text), text

    def test_pope(self) -> None:
        from lmms_eval.tasks.pope import utils

        rng, given = random.Random(3), answers(self.COUNT, 6)
        wanted = [rng.choice(["yes", "no"]) for _ in given]
        told = [rng.choice([text, "yes", "no", "Yes"]) for text in given]
        docs = [{"question_id": i, "answer": a} for i, a in enumerate(wanted)]
        theirs = [
            utils.pope_process_results(doc, [text])["pope_f1_score"] for doc, text in zip(docs, told, strict=True)
        ]
        for start in range(0, self.COUNT, 500):
            part = slice(start, start + 500)
            ours = rows("pope", told[part], wanted[part])
            totals = metrics.totals(ours)
            assert sum(row["score"] for row in ours) / 500 == utils.pope_aggregate_accuracy(theirs[part])
            assert totals["precision"] == utils.pope_aggregate_precision(theirs[part])
            assert totals["recall"] == utils.pope_aggregate_recall(theirs[part])
            assert totals["f1"] == utils.pope_aggregate_f1_score(theirs[part])
            # Ours is the share of answers that are yes; theirs the share of questions whose answer is yes.
            assert totals["yes_ratio"] == sum(text.lower().strip() == "yes" for text in told[part]) / 500
            assert utils.pope_aggregate_yes_ratio(theirs[part]) == wanted[part].count("yes") / 500

    def test_mme(self) -> None:
        from lmms_eval.tasks.mme import utils

        rng, given = random.Random(4), answers(self.COUNT, 7)
        kinds = ["count", "OCR", "code_reasoning", "text_translation"]
        ours: list[dict[str, Any]] = []
        theirs: dict[str, list[dict[str, Any]]] = {"mme_perception_score": [], "mme_cognition_score": []}
        for i, text in enumerate(given):
            told, wanted = rng.choice([text, "Yes", "no."]), rng.choice(["Yes", "No"])
            assert metrics.mme_label(told) == utils.parse_pred_ans(told), told
            doc = {"question_id": str(i // 2), "answer": wanted, "category": kinds[i // 2 % 4]}
            for key, value in utils.mme_process_results(doc, [told]).items():
                theirs[key].append(value)
            ours += rows("mme", [told], [wanted])
            # An answer without a word is worth nothing in both.
            ours[-1] |= {"group": doc["question_id"], "kind": doc["category"]}
        found = metrics.totals(ours)
        assert found["perception"] == pytest.approx(
            utils.mme_aggregate_results(theirs["mme_perception_score"]), abs=1e-9
        )
        assert found["cognition"] == pytest.approx(utils.mme_aggregate_results(theirs["mme_cognition_score"]), abs=1e-9)

    def test_anls(self) -> None:
        from lmms_eval.api.metrics import anls

        rng, given = random.Random(5), answers(self.COUNT, 8)
        for text, other, third in zip(given, answers(self.COUNT, 9), answers(self.COUNT, 10), strict=True):
            wanted = [other, text[: rng.randint(1, 8)] + third[:2]]
            assert metrics.anls(text, wanted) == anls(wanted, [text])["anls"], (text, wanted)

    def test_relaxed(self) -> None:
        from lmms_eval.tasks.chartqa.utils import relaxed_correctness

        rng = random.Random(6)
        sizes = [rng.choice([0, 1, 5, 100, 2000]) * rng.uniform(0.9, 1.1) for _ in range(self.COUNT)]
        numbers = [
            f"{rng.choice(['', '-'])}{size:.{rng.randint(0, 3)}f}{rng.choice(['', '%', '%%'])}" for size in sizes
        ]
        pool = [*numbers, *answers(self.COUNT, 11), "nan", "inf", "-inf", "1e400", "0", "0%"]
        for _ in range(self.COUNT):
            given, wanted = rng.choice(pool), rng.choice(pool)
            assert metrics.relaxed(given, wanted) == relaxed_correctness(given, wanted), (given, wanted)
            assert metrics.relaxed(given, given.upper()) == relaxed_correctness(given, given.upper())

    def test_ocrbench(self) -> None:
        from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results

        rng, given = random.Random(7), answers(self.COUNT, 12)
        for text, other in zip(given, answers(self.COUNT, 13), strict=True):
            wanted = [other, text[rng.randint(0, 2) : rng.randint(3, 9)]]
            wanted = [answer for answer in wanted if answer.strip()] or ["x"]
            for data, metric in (("other", "contains"), ("HME100k", "formula")):
                doc = {"answer": wanted, "dataset": data, "question_type": "Doc-oriented VQA"}
                theirs = ocrbench_process_results(doc, [text])["ocrbench_accuracy"]["score"]
                assert metrics.contains(text, wanted, metric == "formula") == bool(theirs), (text, wanted)

    def test_scienceqa(self) -> None:
        from lmms_eval.tasks.scienceqa.utils import sqa_process_results

        rng = random.Random(8)
        for text in answers(self.COUNT, 14):
            number = rng.randrange(4)
            given = rng.choice([text, "abcd"[number], f"{'ABCD'[rng.randrange(4)]}. {text}"])
            theirs = sqa_process_results({"choices": [1, 2, 3, 4], "answer": number}, [given])["exact_match"]
            assert float(metrics.letter(given, "ABCD"[number])) == theirs, given

    def test_mmbench(self) -> None:
        evals = pytest.importorskip("lmms_eval.tasks.mmbench.mmbench_evals")
        judge = evals.MMBench_Evaluator.__new__(evals.MMBench_Evaluator)
        rng = random.Random(9)
        named = set()
        for text in answers(self.COUNT, 15):
            choices = dict(zip("ABCD", rng.sample(["cat", "dog", "red", "the cat", "café", "2"], 4), strict=True))
            letter = rng.choice("ABCDE")
            given = rng.choice(
                [text, letter, f"({letter})", f"{letter}. {text}", f"It is {letter}", choices["A"], f"A {text}"]
            )
            theirs = judge.can_infer(given, copy.copy(choices))
            assert metrics.mmbench_choice(given, choices) == (theirs or ""), (given, choices)
            named.add(theirs)
        assert len(named) > 4

    def test_exact_match(self) -> None:
        from lmms_eval.api.metrics import exact_match_hf_evaluate

        rng = random.Random(10)
        for text, other in zip(answers(self.COUNT, 16), answers(self.COUNT, 17), strict=True):
            wanted = rng.choice([text, text.upper(), other])
            if not text.strip() or not wanted.strip():
                continue
            for metric, ignore in (("exact", False), ("exact-ignoring-case", True)):
                theirs = exact_match_hf_evaluate([text], [wanted], ignore_case=ignore)["exact_match"]
                if text == text.rstrip("\0") and wanted == wanted.rstrip("\0"):
                    assert metrics.score(text, example(wanted, metric)) == theirs, (text, wanted)
