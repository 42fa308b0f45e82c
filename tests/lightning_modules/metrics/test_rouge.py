"""ROUGE: that of the rouge-score package for English to the last digit, and words in every other script."""

from __future__ import annotations

import unicodedata

import pytest
from rouge_score.rouge_scorer import RougeScorer

from lightning_modules.metrics.functional import ROUGE_KINDS, has_words, rouge_f1, rouge_recall

# Texts of our own. Accents, quotes, digits and symbols are what rouge-score makes of them: white space.
ENGLISH = [
    ("The novel was written by José Álvarez in 1987.", "Jose Alvarez wrote the novels in 1987"),
    ("Zoë\u2019s café served “crème brûlée” \u2013 twice daily.", "Zoe's cafe serves creme brulee twice a day"),
    ("It weighs 5 µm², or ½ of 10 ª; see №3 (ﬁnally).", "5 m 2 or 1 2 of 10 see 3 finally"),
    ("Running runners ran; flies were flying.\nTwo lines.", "The runner runs and a fly flew.\nTwo line"),
    ("Œuvre, İstanbul, Kelvin K and naïve façade.", "oeuvre istanbul kelvin k naive facade"),
    ("no word in common", "Something else"),
]


@pytest.mark.parametrize("use_stemmer", [True, False])
@pytest.mark.parametrize("kind", ROUGE_KINDS)
def test_english_scores_are_those_of_the_package_to_the_last_digit(kind: str, use_stemmer: bool) -> None:
    scorer = RougeScorer([kind], use_stemmer=use_stemmer)
    for pair in ENGLISH:
        for target, prediction in (pair, pair[::-1], (pair[0], pair[0]), (pair[0], "")):
            expected = scorer.score(target, prediction)[kind].recall
            assert rouge_recall(prediction, target, kind, use_stemmer) == expected


SCRIPTS = {
    "Russian": ("Она живёт в Риге.", "Он живёт в Лиме", 2 / 4),
    "Greek": ("\u0397 Αθήνα, το 2004!", "η αθήνα", 2 / 4),
    "Arabic": ("أين تسكن الكاتبة؟", "تسكن الكاتبة", 2 / 3),
    "Hebrew": ("היכן גרה הסופרת", "גרה", 1 / 3),
    "Hindi": ("वह लीमा में रहती है", "वह लीमा में है", 4 / 5),
    "Korean": ("작가는 서울에 산다", "서울에", 1 / 3),
    "Chinese": ("她住在北京。", "她住在上海", 3 / 5),
    "Japanese": ("東京タワー", "京都タワー", 4 / 5),
    "mixed": ("Пушкин writes it", "Пушкин is writing it", 3 / 3),
    "Vietnamese": ("Ở đ", "ở đâu", 1 / 2),
    "digits": ("٢٠٠٤", "٢٠٠٤", 1.0),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_words_of_every_script_count(script: str) -> None:
    target, prediction, expected = SCRIPTS[script]
    assert rouge_recall(target, target) == 1.0
    assert rouge_recall(prediction, target) == pytest.approx(expected)
    assert rouge_recall("something else", target) == 0.0
    if script != "Vietnamese":  # whose decomposed letters are plain ones
        assert rouge_recall(unicodedata.normalize("NFD", prediction), target) == rouge_recall(prediction, target)


@pytest.mark.parametrize("target", ["", "?!", "😀 … \u2014", "²"])
def test_a_target_without_a_word_is_told_and_scores_what_the_package_says(target: str) -> None:
    assert not has_words(target)
    assert rouge_recall("anything", target) == 0.0
    assert all(has_words(target) for target, _ in [*ENGLISH, *(pair[:2] for pair in SCRIPTS.values())])


@pytest.mark.parametrize("prediction", ["The novel живёт of Lima", "The novel 住 of Lima"])
def test_words_of_other_scripts_part_the_pairs_of_a_recall_and_not_those_of_a_published_f1(prediction: str) -> None:
    target = "The novel of Lima"  # three pairs of words, the second of which has another word in between
    assert rouge_recall(prediction, target, "rouge2") == pytest.approx(2 / 3)
    assert (
        rouge_f1(prediction, target, "rouge2") == RougeScorer(["rouge2"]).score(target, prediction)["rouge2"].fmeasure
    )
    assert rouge_f1(prediction, target, "rouge2") == 1.0
