"""Tests of the quickstart model's exercises: the split, determinism and the grader."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from tests.quickstart.files import TOOLS, tasks

SIZES = {"sum": 300, "sort": 300, "story": 50}


def take(seed: int, n: int) -> list[tasks.Item]:
    return list(itertools.islice(tasks.training_items(seed), n))


def test_training_items_are_never_heldout():
    trained = {(item.task, item.prompt) for item in take(seed=1, n=20_000)}
    assert not any(tasks.is_heldout(item.task, item.key) for item in take(seed=1, n=2_000))
    for task, n in SIZES.items():
        assert not {(task, prompt) for prompt, _ in tasks.heldout(task, n)} & trained


def test_swapped_operands_are_on_the_same_side_of_the_split():
    assert tasks.sum_item(12, 345).key == tasks.sum_item(345, 12).key


def test_shuffled_entries_are_on_the_same_side_of_the_split():
    keys = {tasks.sort_item(list(order)).key for order in itertools.permutations(["9", "30", "4"])}
    assert keys == {"4 9 30"}


def test_one_digit_sums_are_all_for_training():
    keys = [tasks.sum_item(a, b).key for a in range(10) for b in range(10)]
    assert not any(tasks.is_heldout("sum", key) for key in keys)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_heldout_items_are_the_same_for_the_same_seed(task):
    assert tasks.heldout(task, 40) == tasks.heldout(task, 40)
    assert tasks.heldout(task, 40) != tasks.heldout(task, 40, seed=1)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_heldout_items_are_different_and_as_many_as_asked_for(task):
    assert len({prompt for prompt, _ in tasks.heldout(task, SIZES[task])}) == SIZES[task]


def test_training_items_are_the_same_for_the_same_seed():
    assert take(seed=3, n=500) == take(seed=3, n=500)
    assert take(seed=3, n=500) != take(seed=4, n=500)


def test_items_are_the_same_in_another_process():
    code = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import itertools, tasks;"
        "print([i.prompt for i in itertools.islice(tasks.training_items(3), 50)])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        encoding="utf-8",
        env={"PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"},
    )
    assert result.stdout.strip() == str([item.prompt for item in take(seed=3, n=50)])


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_grader_accepts_the_heldout_answers(task):
    for prompt, answer in tasks.heldout(task, SIZES[task]):
        assert tasks.is_correct(task, prompt, answer)


def test_the_grader_accepts_every_training_answer():
    for item in take(seed=5, n=2_000):
        assert tasks.is_correct(item.task, item.prompt, item.answer)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_grader_rejects_answers_to_other_prompts(task):
    (prompt, answer), (_, other) = tasks.heldout(task, 2)
    assert answer != other
    assert not tasks.is_correct(task, prompt, other)


@pytest.mark.parametrize(
    ("task", "prompt", "text", "right"),
    [
        ("sum", "347+85=", "432", True),
        ("sum", "347+85=", " 432", True),
        ("sum", "347+85=", "431", False),
        ("sum", "347+85=", "4320", False),
        ("sum", "347+85=", "0432", False),
        ("sum", "347+85=", "432 432", False),
        ("sum", "347+85=", "", False),
        ("sort", "sort 42 7 93:", " 7 42 93", True),
        ("sort", "sort 42 7 93:", " 42 7 93", False),
        ("sort", "sort 42 7 93:", " 7 42", False),
        ("sort", "sort 42 7 93:", " 7  42 93", False),
        ("sort", "sort d a c:", " a c d", True),
        ("sort", "sort d a c:", " a c", False),
    ],
)
def test_the_grader_tells_right_from_wrong(task, prompt, text, right):
    assert tasks.is_correct(task, prompt, text) is right


def test_the_grader_accepts_every_story_of_the_grammar_and_nothing_else():
    prompt = "Story: Mia, fox, lake."
    likely = (
        " Mia went to the lake. There she saw a small fox. The fox was hungry."
        " Mia gave it some bread. Then they were friends."
    )
    other = (
        " One day Mia walked to the lake. There she met a brown fox. The fox was tired."
        " Mia made it a warm bed. Now they play together every day."
    )
    assert tasks.is_correct("story", prompt, likely)
    assert tasks.is_correct("story", prompt, other)
    assert not tasks.is_correct("story", prompt, likely.replace("fox", "dog"))
    assert not tasks.is_correct("story", prompt, likely.replace("she", "he"))
    assert not tasks.is_correct("story", prompt, likely.replace("hungry", "sad"))
    assert not tasks.is_correct("story", prompt, likely.removesuffix(" Then they were friends."))


def test_chinese_stories_are_graded_like_english_ones():
    prompt = "故事：小红，猫，公园。"
    text = "小红去公园玩。她看见一只猫。猫很饿。小红给它一条鱼。他们成了朋友。"
    assert tasks.is_correct("story", prompt, text)
    assert not tasks.is_correct("story", prompt, text.replace("她", "他"))


@pytest.mark.parametrize(
    ("task", "prompt"),
    [("sum", "sort 1 2:"), ("sort", "1+2="), ("story", "Story: Bob, fox, lake.")],
)
def test_a_prompt_of_another_form_is_an_error_that_names_it(task, prompt):
    with pytest.raises(ValueError, match="is not of task"):
        tasks.is_correct(task, prompt, "3")


def test_an_unknown_task_is_an_error_that_lists_the_tasks():
    with pytest.raises(ValueError, match="sum, sort, story"):
        tasks.heldout("product", 1)


def test_more_stories_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="there are"):
        tasks.heldout("story", 10_000)


def test_tasks_do_not_import_torch():
    code = "import sys, tasks; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True, cwd=TOOLS
    )
    assert result.stdout.strip() == "False"
