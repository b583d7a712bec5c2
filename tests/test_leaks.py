"""Training rows that stand in what the model is measured on: found, counted, and told, left out or refused."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import chat, chats, write_jsonl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fullft.data import leaks
from fullft.data import pieces as cutting
from fullft.data.sequences import Sequences
from fullft.data.training import open_data
from fullft.errors import BadInput
from fullft.preflight import preflight
from fullft.recipe import Recipe, Source


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@dataclass(frozen=True)
class Opened:
    sets: list[Sequences]
    warnings: list[str]

    @property
    def rows(self) -> list[list[int]]:
        """Row numbers of each set that are in its sequences."""
        return [sorted(one.tokens.place(at)[1] for at in one.slices["document"].tolist()) for one in self.sets]

    def counts(self, evaluated: str = "validation", name: str = r"\S+") -> tuple[int, int]:
        """(equal, overlapping) over all sets, as told."""
        told = [kinds for line in self.warnings if (kinds := counted(line, evaluated, name))]
        return sum(equal for equal, _ in told), sum(overlapping for _, overlapping in told)


def counted(line: str, evaluated: str = "validation", name: str = r"\S+") -> tuple[int, int] | None:
    """(equal, overlapping) rows that a line tells of a training and an evaluation set; None if it tells of others."""
    kinds = r"\((\d+) (?:are )?equal, (\d+) share 13 words in a row\)"
    match = re.match(rf"{name}: (\d+) rows [a-z ]+ {evaluated} {kinds}", line)
    if match is None:
        return None
    total, equal, overlapping = map(int, match.groups())
    assert total == equal + overlapping
    return equal, overlapping


Open = Callable[..., Opened]


@pytest.fixture
def recipe_of(tmp_path: Path, tiny_model: Path) -> Callable[..., Recipe]:
    """recipe_of(train, validation=…, tasks=[(name, rows), …], **settings of the section data); rows go into files."""

    def as_source(name: str, rows: Any) -> Any:
        return {"path": str(write_jsonl(tmp_path / f"{name}.jsonl", rows))} if isinstance(rows, list) else rows

    def recipe(
        train: Any, validation: Any = None, tasks: Any = (), replay: Any = None, name: str = "train", **data: Any
    ) -> Recipe:
        data = {"sequence_length": 1024} | data | {"train": as_source(name, train)}
        if validation is not None:
            data["validation"] = as_source("validation", validation)
        if replay is not None:
            data["replay"] = as_source("replay", replay) | {"fraction": 0.5}
        listed = [{"name": name, "kind": "text", "data": as_source(name, rows)} for name, rows in tasks]
        return Recipe.model_validate(
            {
                "run_dir": str(tmp_path / "run"), "model": {"path": str(tiny_model)}, "data": data,
                "train": {"steps": 2, "global_batch_size": 4, "warmup_steps": 0}, "retention": {"tasks": listed},
                "tracking": {"wandb": "disabled"}, "export": {"dtype": "fp32"},
            }
        )  # fmt: skip

    return recipe


@pytest.fixture
def opened(recipe_of: Callable[..., Recipe], tokenizer: PreTrainedTokenizerBase) -> Open:
    return lambda *arguments, **settings: Opened(*open_data(recipe_of(*arguments, **settings), tokenizer))


def numbered(first: int, count: int, word: str = "word") -> str:
    """Words that stand nowhere else."""
    return " ".join(f"{word}{at}" for at in range(first, first + count))


OTHER = chats(10)


# Equal after normalisation


KNOWN = chat("What is the capital of France?", "It's Paris, of course.")


@pytest.mark.parametrize(
    "row",
    [
        KNOWN,
        chat("what is the CAPITAL of france", "it's paris of course"),
        chat("  What is\nthe capital\tof   France?! ", "It's “Paris” – of course…\n"),
        chat("What is the capital of *France*?", "It's **Paris**, of course."),
        {"messages": [{"role": "system", "content": "You are terse."}, *KNOWN["messages"]]},
        {"messages": [{"role": "developer", "content": "You are terse."}, *KNOWN["messages"]]},
        {
            "conversations": [
                {"from": "human", "value": "What is the capital of France?"},
                {"from": "gpt", "value": "It's Paris, of course"},
            ]
        },
        {"instruction": "What is the capital", "input": "of France?", "output": "It's Paris, of course."},
        {"prompt": KNOWN["messages"][:1], "completion": KNOWN["messages"][1:]},
        {"prompt": "What is the capital of France? ", "completion": "It's Paris, of course."},
        {"text": "What is the capital of France? It's Paris, of course."},
        {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in KNOWN["messages"]]},
    ],
)
def test_a_row_is_found_in_other_case_punctuation_spacing_and_shape(row: dict[str, Any], opened: Open) -> None:
    assert opened([*OTHER, row], [KNOWN]).counts() == (1, 0)
    assert opened([*OTHER, KNOWN], [row]).counts() == (1, 0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Où est le café de Zoë?", unicodedata.normalize("NFD", "Où est le café de Zoë?")),
        ("Die Straße ist groß.", "DIE STRASSE IST GROSS"),
        ("Wait for Ａ and Ｂ, ①.", "Wait for A and B, 1."),
        ("It is _really_ far.", "It is really far."),
        ("東京はどこですか。", "東京はどこですか"),
        ("Где Москва?", "где москва"),
    ],
)
def test_letters_that_look_the_same_are_the_same(one: str, other: str, opened: Open) -> None:
    assert opened([*OTHER, chat(one, "Here.")], [chat(other, "here")]).counts() == (1, 0)


@pytest.mark.parametrize(
    "row",
    [
        chat("What is the capital of France?", "It's Lyon, of course."),
        chat("What is the capital of?", "It's Paris, of course."),
        chat("Paris", "France"),
        {"text": "It's Paris, of course. What is the capital of France?"},
    ],
)
def test_a_row_with_other_words_is_not_found(row: dict[str, Any], opened: Open) -> None:
    assert opened([*OTHER, row], [KNOWN]).warnings == []


def test_rows_without_words_are_found_by_their_signs(opened: Open) -> None:
    found = opened([chat("?", "🙂"), chat("?", "🙃"), chat("!!", "..")], [chat("?", "🙂")])
    assert found.counts() == (1, 0)


def test_token_ids_are_compared_with_token_ids(opened: Open) -> None:
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 8]}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    assert opened(rows, [{"input_ids": [5, 6, 7]}]).counts() == (2, 0)


# 13 words in a row


@pytest.mark.parametrize(("shared", "found"), [(12, 0), (13, 1), (14, 1), (40, 1)])
@pytest.mark.parametrize("place", ["first", "between", "last", "over two turns"])
def test_13_words_in_a_row_are_an_overlap_and_12_are_not(shared: int, found: int, place: str, opened: Open) -> None:
    words = numbered(0, shared)
    before = "" if place == "first" else numbered(0, 20, "before") + ", "
    after = "" if place == "last" else " – " + numbered(0, 20, "after")
    row = chat(f"{before}{words.upper()}{after}", "Yes.")
    if place == "over two turns":
        half = words.split()
        row = chat(before + " ".join(half[:6]), " ".join(half[6:]) + after)
    evaluated = chat(f"{numbered(0, 9, 'other')} {words}?", "No, it is not.")
    assert opened([*OTHER, row], [evaluated]).counts() == (0, found)


def test_13_shared_words_that_are_not_in_a_row_are_no_overlap(opened: Open) -> None:
    apart = " and ".join([numbered(0, 7), numbered(7, 7), numbered(14, 7)])
    backwards = " ".join(reversed(numbered(0, 21).split()))
    assert opened([*OTHER, chat(apart, "a"), chat(backwards, "a")], [chat(numbered(0, 21), "b")]).warnings == []


def test_a_short_evaluation_row_inside_a_training_row_is_no_leak(opened: Open) -> None:
    assert opened([*OTHER, chat("Yes or no?", "Yes. " + numbered(0, 50))], [chat("Yes or no?", "Yes.")]).warnings == []


CHINESE = "北京是中华人民共和国的首都也是全国的政治文化中心拥有悠久的历史和众多的名胜古迹"


def test_text_without_spaces_between_words_overlaps_too(opened: Open) -> None:
    """A whole Chinese sentence is not one word: an exam question with something before and after it is a leak."""
    found = opened([*OTHER, chat(f"请问{CHINESE}吗", "不")], [chat(f"题目：{CHINESE}对不对", "对")])
    assert found.counts() == (0, 1)


def test_vowel_signs_do_not_end_a_word(opened: Open) -> None:
    """Eight words of Hindi are not thirteen."""
    shared = "यह एक छोटा वाक्य है जिसे हम पढ़ते"
    assert len(shared.split()) == 8
    found = opened([*OTHER, chat(f"किताब {shared} रहो", "हाँ")], [chat(f"कहानी {shared} सको", "नहीं")])
    assert found.warnings == []


@pytest.mark.parametrize(("times", "found"), [(10, 5), (11, 0), (30, 0)])
def test_what_stands_in_more_than_ten_evaluation_rows_is_boilerplate(times: int, found: int, opened: Open) -> None:
    boilerplate = numbered(0, 30, "choose")
    evaluated = [chat(f"{boilerplate} {numbered(at * 5, 5)}", "A") for at in range(times)]
    train = [*OTHER, *(chat(f"{boilerplate} {numbered(at * 5, 5, 'mine')}", "B") for at in range(5))]
    assert opened(train, evaluated).counts() == (0, found)


def test_boilerplate_hides_neither_equal_rows_nor_the_rest_of_a_row(opened: Open) -> None:
    boilerplate = numbered(0, 30, "choose")
    evaluated = [chat(f"{boilerplate} {numbered(at * 20, 20)}", "A") for at in range(12)]
    train = [*OTHER, evaluated[3], chat(numbered(100, 20), "B")]
    assert opened(train, evaluated).counts() == (1, 1)


def test_words_repeated_within_one_evaluation_row_are_no_boilerplate(opened: Open) -> None:
    again = " ".join([numbered(0, 14)] * 12)
    assert opened([*OTHER, chat(numbered(0, 14), "B")], [chat(again, "A")]).counts() == (0, 1)


def test_system_messages_are_not_compared(opened: Open) -> None:
    system = {"role": "system", "content": numbered(0, 60, "policy")}
    train = [{"messages": [system, *row["messages"]]} for row in OTHER]
    found = opened(train, [{"messages": [system, *chat("Q?", "A")["messages"]]}, chat(system["content"], "A")])
    # The second evaluation row says it as a user, so it is compared; the training rows' system turn is not.
    assert found.warnings == []


# What is compared with what


EVALUATED = [chat(numbered(0, 20), "one"), chat("Two?", "two"), chat("Three?", "three")]
TRAINED = [*OTHER[:3], chat("Two?", "two"), *OTHER[3:5], chat(f"so {numbered(0, 20)} then", "1"), OTHER[5]]
LEAKING = [4, 7]  # row numbers in TRAINED
CLEAN = [1, 2, 3, 5, 6, 8]


def test_validation_and_tasks_are_each_told(opened: Open) -> None:
    found = opened(TRAINED, [chat("Two?", "two")], tasks=[("general", EVALUATED), ("clean", [chat("New?", "new")])])
    assert found.counts("validation") == (1, 0)
    assert found.counts("general") == (1, 1)
    assert len(found.warnings) == 2


def test_a_row_in_two_evaluation_sets_is_left_out_once(opened: Open) -> None:
    found = opened(TRAINED, EVALUATED, tasks=[("general", EVALUATED)], on_leak="drop")
    assert found.rows == [CLEAN]
    assert found.sets[0].summary["left_out"] == 2


def test_replay_sets_are_looked_through_too(opened: Open) -> None:
    found = opened(OTHER, EVALUATED, replay=TRAINED, on_leak="drop")
    assert found.rows == [list(range(1, 11)), CLEAN]
    assert len(found.warnings) == 1
    assert found.counts(name="replay") == (1, 1)


def test_several_validation_sets_are_one(opened: Open, tmp_path: Path) -> None:
    paths = [str(write_jsonl(tmp_path / f"v{at}.jsonl", [row])) for at, row in enumerate(EVALUATED)]
    assert opened(TRAINED, {"path": str(tmp_path / "v*.jsonl")}).counts() == (1, 1)
    assert opened(TRAINED, paths[0]).counts() == (0, 1)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "json", "pieces"])
def test_rows_of_any_kind_of_file_are_found_by_their_number(
    kind: str, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, table = tmp_path / f"data.{kind}", datasets.Dataset.from_list(TRAINED)
    match kind:
        case "parquet":
            table.to_parquet(path, batch_size=3)
        case "arrow":
            table.save_to_disk(path)
        case "json":
            path.write_text(str(TRAINED).replace("'", '"'))
        case "pieces":
            path = write_jsonl(tmp_path / "a.jsonl", TRAINED)
            monkeypatch.setattr(cutting, "_SMALLEST_PIECE", 200)
            monkeypatch.setattr(cutting, "_PIECES", 1 << 30)
    assert opened({"path": str(path)}, EVALUATED, on_leak="drop").rows == [CLEAN]
    with pytest.raises(BadInput) as caught:
        opened({"path": str(path)}, EVALUATED, on_leak="error")
    assert f"{path} row 4 stands in validation" in caught.value.problems
    assert f"{path} row 7 shares 13 words with validation" in caught.value.problems


def test_rows_of_several_files_are_found_by_file_and_number(opened: Open, tmp_path: Path) -> None:
    for name, rows in (("a", OTHER), ("b", TRAINED), ("c", [chat("Two?", "two")])):
        write_jsonl(tmp_path / f"part-{name}.jsonl", rows)
    train = {"path": str(tmp_path / "part-*.jsonl")}
    with pytest.raises(BadInput) as caught:
        opened(train, EVALUATED, on_leak="error")
    told = "\n".join(caught.value.problems)
    assert "part-b.jsonl row 4 stands" in told
    assert "part-b.jsonl row 7 shares" in told
    assert "part-c.jsonl row 1 stands" in told
    assert opened(train, EVALUATED, on_leak="drop").rows == [sorted([*range(1, 11), *CLEAN])]


def test_only_the_rows_that_a_limit_takes_are_compared(opened: Open, tmp_path: Path) -> None:
    train = str(write_jsonl(tmp_path / "t.jsonl", TRAINED))
    validation = str(write_jsonl(tmp_path / "v.jsonl", EVALUATED))
    assert opened({"path": train, "limit": 5}, validation).counts() == (1, 0)
    assert opened(train, {"path": validation, "limit": 1}).counts() == (0, 1)


def test_fields_of_other_names_are_compared(opened: Open, tmp_path: Path) -> None:
    row = {"question": "Two?", "answer": "two"}
    fields = {"instruction": "question", "output": "answer"}
    train = {
        "path": str(write_jsonl(tmp_path / "t.jsonl", [row, *({"question": "Q", "answer": "A"},)])),
        "fields": fields,
    }
    assert opened(train, EVALUATED).counts() == (1, 0)


ODD = [
    "{broken", "[]", {"other": 1}, {"text": ""}, chat("Two?", ""),
    '{"messages": [{"role": "user", "content": "Q \\ud83d"}, {"role": "assistant", "content": "A"}]}',
    '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\\ud83d"}]}',
]  # fmt: skip


@pytest.mark.parametrize("odd", range(len(ODD)))
@pytest.mark.parametrize("where", ["train", "validation"])
def test_rows_that_cannot_be_used_disturb_nothing(where: str, odd: int, opened: Open) -> None:
    train, evaluated = list[Any](TRAINED), list[Any](EVALUATED)
    (train if where == "train" else evaluated).insert(1, ODD[odd])
    found = opened(train, evaluated, on_bad_row="skip", on_leak="drop")
    shift = where == "train"
    assert found.rows == [[at + (shift and at > 1) for at in CLEAN]]
    assert found.counts() == (1, 1)


# warn, drop, error


def test_leaking_rows_are_told_and_kept_by_default(opened: Open) -> None:
    found = opened(TRAINED, EVALUATED)
    assert found.rows == [list(range(1, 9))]
    (line,) = found.warnings
    assert counted(line, name="train") == (1, 1)
    assert line.endswith("; data.on_leak=drop leaves them out")


@pytest.mark.parametrize("packing", [True, False])
def test_leaking_rows_are_left_out_of_the_sequences_on_request(opened: Open, packing: bool) -> None:
    kept = opened(TRAINED, EVALUATED, packing=packing)
    found = opened(TRAINED, EVALUATED, on_leak="drop", packing=packing)
    assert found.rows == [CLEAN]
    (line,) = found.warnings
    assert counted(line, name="train") == (1, 1)
    assert line.endswith("; they are left out")
    has, had = found.sets[0].summary, kept.sets[0].summary
    lost = sum(int(kept.sets[0].tokens.documents["length"][at - 1]) for at in LEAKING)
    assert had["tokens"] - has["tokens"] == lost
    assert int(found.sets[0].lengths.sum()) == has["tokens"]
    assert has["documents"] == 6
    # And back again, from the same cache.
    assert opened(TRAINED, EVALUATED, packing=packing).rows == kept.rows
    assert opened(TRAINED, packing=packing).rows == kept.rows


def test_leaking_rows_are_refused_on_request_with_the_first_of_them(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        opened(TRAINED, EVALUATED, on_leak="error")
    file = tmp_path / "train.jsonl"
    line, *examples = caught.value.problems
    assert counted(line, name="train") == (1, 1)
    assert examples == [f"{file} row 4 stands in validation", f"{file} row 7 shares 13 words with validation"]
    assert opened(OTHER, EVALUATED, on_leak="error").warnings == []


def test_many_leaks_are_counted_and_some_are_shown(opened: Open) -> None:
    rows = [chat(f"{at}?", f"{at}!") for at in range(50)]
    with pytest.raises(BadInput) as caught:
        opened(rows, rows, on_leak="error")
    assert counted(caught.value.problems[0]) == (50, 0)
    assert len(caught.value.problems) < 15


def test_leaks_of_all_sets_are_refused_together(opened: Open) -> None:
    with pytest.raises(BadInput) as caught:
        opened(TRAINED, EVALUATED, replay=TRAINED, on_leak="error")
    assert [
        counted(line, name=name)
        for name in ("train", "replay")
        for line in caught.value.problems
        if counted(line, name=name)
    ] == [(1, 1), (1, 1)]


def test_nothing_is_left_when_all_rows_leak(opened: Open) -> None:
    with pytest.raises(BadInput, match=r"nothing left to train on \(3 rows were left out\)"):
        opened(EVALUATED, EVALUATED, on_leak="drop")


@pytest.mark.parametrize("on_leak", ["warn", "drop", "error"])
def test_a_launch_tells_leaks(on_leak: str, recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(TRAINED, EVALUATED, tasks=[("general", EVALUATED[:1])], on_leak=on_leak, sequence_length=512)
    if on_leak == "error":
        with pytest.raises(BadInput) as caught:
            preflight(recipe, 1, on_gpu=False)
        assert (0, 1) in [counted(line, "general") for line in caught.value.problems]
        return
    inputs = preflight(recipe, 1, on_gpu=False)
    assert Opened([], inputs.warnings).counts("validation") == (1, 1)
    assert Opened([], inputs.warnings).counts("general") == (0, 1)
    held = {row["row"] for step in range(20) for row in inputs.batches.rows_of_step(step)}
    assert held == set(CLEAN if on_leak == "drop" else range(1, 9))


# What is remembered


def searched(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by one for each training set that is read for leaks."""
    found: list[Path] = []
    write = leaks._write

    def noted(tokens: Any, *arguments: Any) -> None:
        found.append(tokens.folder)
        write(tokens, *arguments)

    monkeypatch.setattr(leaks, "_write", noted)
    return found


def test_a_changed_evaluation_set_is_looked_for_anew(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = searched(monkeypatch)
    assert opened(TRAINED, EVALUATED).counts() == (1, 1)
    assert opened(TRAINED, EVALUATED).counts() == (1, 1)
    assert len(looked) == 1
    assert opened(TRAINED, EVALUATED[1:]).counts() == (1, 0)
    assert opened(TRAINED, [*EVALUATED, TRAINED[0]], on_leak="drop").rows == [CLEAN[1:]]
    assert len(looked) == 3
    assert opened(TRAINED, EVALUATED).counts() == (1, 1)
    assert len(looked) == 3


def test_a_changed_training_set_is_looked_through_anew(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = searched(monkeypatch)
    assert opened(TRAINED, EVALUATED).counts() == (1, 1)
    assert opened([*TRAINED, chat("Three?", "three")], EVALUATED).counts() == (2, 1)
    assert opened(TRAINED, EVALUATED, on_leak="drop", sequence_length=512).rows == [CLEAN]
    assert len(looked) == 2


def test_an_evaluation_file_that_is_not_there_is_told_and_not_left_out(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        leaks.index("validation", [Source(path=str(tmp_path / "nope.jsonl"))], tmp_path)
    assert opened(TRAINED).rows


@pytest.mark.parametrize("changed", ["train", "validation"])
def test_files_that_change_while_they_are_compared_are_told_and_nothing_is_remembered(
    changed: str, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = opened(TRAINED, EVALUATED, on_leak="drop").rows
    for file in [*tmp_path.rglob("leaks-*"), *tmp_path.rglob("evaluation-*")]:
        file.unlink()
    read = leaks.read_piece if changed == "train" else leaks.read_rows
    file = tmp_path / f"{changed}.jsonl"
    content = file.read_bytes()

    def changing(*arguments: Any) -> Any:
        file.write_bytes(b"".join(reversed(content.splitlines(keepends=True))))
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(leaks, read.__name__, changing)
        with pytest.raises(BadInput, match=f"data set {changed}: its files changed"):
            opened(TRAINED, EVALUATED, on_leak="drop")
    assert not list(tmp_path.rglob("leaks-*.json" if changed == "train" else "evaluation-*.npz"))
    file.write_bytes(content)
    assert opened(TRAINED, EVALUATED, on_leak="drop").rows == before


def test_a_damaged_index_is_made_anew(opened: Open, tmp_path: Path) -> None:
    evaluated = [chat(numbered(0, 21), "b")]
    before = opened(TRAINED, evaluated).warnings
    (index,) = tmp_path.rglob("evaluation-*.npz")
    for damage in (b"", index.read_bytes()[:-40]):
        index.write_bytes(damage)
        assert opened(TRAINED, evaluated).warnings == before


def test_without_evaluation_sets_nothing_is_read_for_leaks(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of gigabytes are not read a second time to be compared with nothing."""
    looked = searched(monkeypatch)
    assert opened(TRAINED).rows == [list(range(1, 9))]
    assert looked == []


def test_an_evaluation_set_is_not_read_again_by_each_rank(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch is to start in seconds; its words are hashed once, and then are in the cache."""
    evaluated = [chat(numbered(at * 50, 50), "A") for at in range(4000)]
    opened(TRAINED, evaluated)
    hashed = 0
    missing = leaks._WordHashes.__missing__

    def noted(self: Any, word: str) -> int:
        nonlocal hashed
        hashed += 1
        return missing(self, word)

    monkeypatch.setattr(leaks._WordHashes, "__missing__", noted)
    opened(TRAINED, evaluated)
    assert hashed < 1000
