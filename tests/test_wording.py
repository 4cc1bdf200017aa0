"""Questions that are unlike any of training are remarked on, and no others."""

import pytest

from tasks.wording import LIKE, Familiar, trigrams

LEARNT = ["Is there a pleural effusion?", "which organ is shown?", "is  there a PLEURAL effusion?", "图像中有什么器官?"]


class Split:
    """A training split of which only the records count."""

    def __init__(self, questions):
        self.questions = questions

    def read_records(self):
        return [{"question": question, "answer": "yes"} for question in self.questions]


@pytest.fixture(scope="module")
def familiar():
    return Familiar({"own": (Split(LEARNT[:2]), None), "other": (Split(LEARNT[2:]), [])})


def test_trigrams_are_those_of_words_alone():
    assert trigrams("Is it?") == trigrams(" is  it ") == {" is", "is ", "s i", " it", "it "}
    assert trigrams("肺") == {" 肺 "} and trigrams("?!") == trigrams("") == {" "}


@pytest.mark.parametrize("question, likeness", [
    ("is there a pleural effusion", 1), ("which organ is shown?", 1), ("qqq", 0), ("", 0), ("???", 0),
    ("which organ", 11 / 20)])  # all 11 of its own, of the other's 20
def test_likeness_by_hand(familiar, question, likeness):
    assert familiar.nearest(question)[0] == pytest.approx(likeness)


@pytest.mark.parametrize("question", ["Is there an effusion?", "which organ is it?", "is there any fluid?", "图像中有什么器官"])
def test_nothing_is_said_of_questions_like_those_of_training(familiar, question):
    assert familiar.remark(question) == ""


def test_what_is_unlike_is_said_with_the_nearest(familiar):
    remark = familiar.remark("how many grams of aspirin are given in a day?")
    assert remark.startswith("unlike any question that it was trained on; the nearest is \"")
    assert 0 < familiar.nearest("how many grams of aspirin are given in a day?")[0] < LIKE
    assert familiar.remark("which side is it?") and familiar.nearest("which side is it?")[0] == pytest.approx(7 / 29)
    assert familiar.remark("боль?") == "unlike any question that it was trained on"


def test_a_question_is_learnt_once_and_a_left_out_sample_is_not(familiar):
    assert familiar.questions == ["is there a pleural effusion?", "which organ is shown?", "图像中有什么器官?"]
    assert Familiar({"own": (Split(LEARNT[:2]), [0])}).questions == ["which organ is shown?"]


def test_where_training_is_not_known_that_is_said():
    remark = Familiar("shards/own/train, which the run was trained on, is not here").remark("is there an effusion?")
    assert remark == ("whether it was trained on such questions is not known: shards/own/train, which the run was "
                      "trained on, is not here")


def test_a_long_question_is_shown_in_part():
    familiar = Familiar({"own": (Split([f"one two three {'x' * 300}?"]), None)})
    assert familiar.remark("one day").endswith(f'"one two three {"x" * 83}..."')
