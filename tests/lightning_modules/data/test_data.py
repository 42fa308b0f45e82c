"""Reading examples, the TOFU splits, and the order in which pairs reach the processes."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_modules.data.examples import read_examples
from lightning_modules.data.order import PairDataset, PairSampler
from lightning_modules.data.pairs import VALIDATION_SPLITS, ForgetRetainDataModule
from lightning_modules.data.tofu import tofu_examples
from lightning_modules.data.tofu_module import TOFUDataModule
from lightning_modules.data.tokenization import Encoded

TOFU = Path(__file__).parents[3].parent / "shared" / "tofu"
ROWS = [{"question": "Who?", "answer": "Mira, of “Quinorsk”"}, {"question": "When?\nExactly?", "answer": "In 1999."}]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, which is enough for every question about order and shape."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", *map(chr, range(32, 127))])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


TURNS = [
    {"role": role, "content": text}
    for role, text in (("system", "S"), ("user", "Q"), ("assistant", "B"), ("user", "R"), ("assistant", "A"))
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def json_lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


@pytest.mark.parametrize("byte_order_mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", json_lines(ROWS)),
        ("a.jsonl", json_lines(ROWS).replace("\n", "\r\n")),
        ("a.jsonl", "\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("A.CSV", 'question,answer\nWho?,"Mira, of “Quinorsk”"\n"When?\nExactly?",In 1999.\n'),
    ],
)
def test_every_text_format_gives_the_same_examples(tmp_path: Path, name: str, text: str, byte_order_mark: str) -> None:
    assert read_examples(write(tmp_path / name, byte_order_mark + text)) == ROWS


def test_parquet_gives_the_same_examples(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{**row, "perturbed_answer": None} for row in ROWS[:1]] + [{**ROWS[1], "perturbed_answer": ["a", "b"]}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet") == [ROWS[0], {**ROWS[1], "perturbed_answer": ["a", "b"]}]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install"):
        read_examples(write(tmp_path / "a.parquet", ""))


def test_json_lines_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    row = {"question": "a\u2028b", "answer": "c\x85d"}
    assert read_examples(write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False))) == [row]


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "Q", "response": "A", "id": 3}, {"question": "Q", "answer": "A"}),
        ({"text": "All of it."}, {"question": "", "answer": "All of it."}),
        ({"question": "Q", "answer": "A", "text": "T"}, {"question": "Q", "answer": "A"}),
        (
            {"question": "Q", "answer": "A", "paraphrased_answer": "P", "perturbed_answer": ["X", "Y"], "other": 1},
            {"question": "Q", "answer": "A", "paraphrased_answer": "P", "perturbed_answer": ["X", "Y"]},
        ),
        ({"question": "Q", "answer": "A", "perturbed_answer": None}, {"question": "Q", "answer": "A"}),
        ({"messages": [("user", "Q"), ("assistant", "A")]}, {"question": "Q", "answer": "A"}),
        (
            {"messages": [("system", "S"), ("user", "Q"), ("assistant", "B"), ("user", "R"), ("assistant", "A")]},
            {"question": "S\nQ\nB\nR", "answer": "A", "messages": TURNS},
        ),
        ({"messages": [("user", "Q"), ("assistant", "A"), ("user", "thanks")]}, {"question": "Q", "answer": "A"}),
    ],
)
def test_every_accepted_shape(tmp_path: Path, row: dict[str, Any], example: dict[str, Any]) -> None:
    if "messages" in row:
        row = {"messages": [{"role": role, "content": content} for role, content in row["messages"]]}
    assert read_examples(write(tmp_path / "a.json", json_lines([row]))) == [example]


def test_a_csv_value_may_be_as_long_as_a_book_and_other_readers_keep_their_limit(tmp_path: Path) -> None:
    limit, book = csv.field_size_limit(), "word, " * 50000 + "end"
    assert len(book) > limit
    path = write(tmp_path / "a.csv", f'question,answer\nQ,"{book}"\nR,A\n')
    assert [row["answer"] for row in read_examples(path)] == [book, "A"]
    assert csv.field_size_limit() == limit
    with pytest.raises(ValueError, match="not valid CSV"):
        read_examples(write(tmp_path / "b.csv", 'question,answer\nQ,"A\n'))
    assert csv.field_size_limit() == limit


def test_one_perturbed_answer_in_csv_is_a_text_also_where_it_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "question,answer,perturbed_answer\nQ,1983,1984\n")
    assert read_examples(path) == [{"question": "Q", "answer": "1983", "perturbed_answer": ["1984"]}]


def test_perturbed_answers_in_csv_are_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'question,answer,perturbed_answer\nQ,A,"[""X"", ""Y""]"\nR,B,\n')
    assert read_examples(path) == [
        {"question": "Q", "answer": "A", "perturbed_answer": ["X", "Y"]},
        {"question": "R", "answer": "B"},
    ]


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "empty"),
        ("a.json", "[]", "empty"),
        ("a.csv", "question,answer\n", "empty"),
        ("a.jsonl", f"{GOOD}\n\n{{'question': 1}}\n", "line 3.*not valid JSON"),
        ("a.json", '[\n{"question": "Q",\n "answer" "A"}]', "line 3.*not valid JSON"),
        ("a.json", f"[{GOOD}, 5]", "row 2.*expected an object.*found int"),
        ("a.jsonl", f'{GOOD}\n{{"input": "Q", "output": "A"}}', "line 2.*input, output.*prompt and response"),
        ("a.csv", "question,reply\nQ,A\n", "row 1.*question, reply.*question and answer"),
        ("a.jsonl", '{"question": "Q", "answer": 5}', "line 1.*answer to be text, found int"),
        ("a.jsonl", '{"question": null, "answer": "A"}', "line 1.*question to be text, found NoneType"),
        ("a.jsonl", '{"question": "Q", "answer": " "}', "line 1.*answer is empty"),
        ("a.jsonl", '{"question": "Q", "answer": "A", "perturbed_answer": ["X", 1]}', "line 1.*perturbed_answer"),
        ("a.jsonl", '{"question": "Q", "answer": "A", "perturbed_answer": []}', "line 1.*perturbed_answer"),
        ("a.jsonl", '{"messages": "Q"}', "line 1.*messages as a list.*found str"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "Q"}]}', "line 1.*assistant turn.*user"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": ["A"]}]}', "line 1.*content"),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "A", "tool_calls": [1]}]}',
            "line 1.*with tool_calls",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "A", "weight": 0}]}',
            "line 1.*weight 0.*last_turn_only",
        ),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": ""}]}', "line 1.*says nothing"),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "A"}], "question": "Q", "answer": "B"}',
            "found both.*differ",
        ),
        (
            "a.jsonl",
            GOOD[:-1] + ', "messages": [{"role": "user", "content": "Z"}, {"role": "assistant", "content": "A"}]}',
            "both",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, '
            '{"role": "assistant", "content": "A"}], "last_turn_only": "yes"}',
            "line 1.*last_turn_only to be true or false",
        ),
        ("a.csv", "question,answer,perturbed_answer\nQ,A,\"['X', 'Y']\"\n", "row 1.*as a list in JSON"),
        ("a.csv", "question,answer\nQ,A,B\n", "row 1.*expected 2 values.*quotes"),
        ("a.csv", "question,answer\nQ\n", "row 1.*expected 2 values"),
        ("a.csv", 'question,answer\nQ,"A\n', "not valid CSV"),
        ("a.txt", "hello", r"\.json, \.jsonl, \.csv, \.parquet.*\.txt"),
        ("a", "hello", "no ending"),
        ("a.parquet", "hello", "not a valid Parquet"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        read_examples(write(tmp_path / name, text))


def test_a_file_that_is_not_utf8_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        read_examples(tmp_path / "a.json")


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.json.*check the path"):
        read_examples(tmp_path / "missing.json")
    with pytest.raises(FileNotFoundError, match="found a folder"):
        read_examples(tmp_path)


def pairs(forget: int, retain: int, epochs: int, *, seed: int = 0, world: int = 1, rank: int = 0) -> list[list[Any]]:
    one = [Encoded([0], [0])]
    sampler = PairSampler(PairDataset(one * forget, one * retain), seed=seed, num_replicas=world, rank=rank)
    epochs_of_pairs = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        epochs_of_pairs.append(list(sampler))
        assert len(epochs_of_pairs[-1]) == len(sampler)
    return epochs_of_pairs


@pytest.mark.parametrize(("forget", "retain"), [(8, 20), (12, 5), (7, 7), (3, 1), (1, 9)])
def test_an_epoch_is_one_pass_over_forget_and_retain_is_walked_evenly(forget: int, retain: int) -> None:
    walk = []
    for epoch in pairs(forget, retain, epochs=6):
        assert sorted(first for first, _ in epoch) == list(range(forget))
        walk += [second for _, second in epoch]
    for start in range(0, len(walk) - retain + 1, retain):  # every retain example once before any twice
        assert sorted(walk[start : start + retain]) == list(range(retain))


@pytest.mark.parametrize(("world", "batch"), [(2, 3), (4, 2), (3, 1)])
def test_processes_together_see_what_one_process_sees(world: int, batch: int) -> None:
    forget, retain, epochs = 24, 31, 3
    alone = pairs(forget, retain, epochs)
    ranks = [pairs(forget, retain, epochs, world=world, rank=rank) for rank in range(world)]
    for epoch in range(epochs):
        for step in range(forget // (world * batch)):
            together = [pair for rank in ranks for pair in rank[epoch][step * batch : (step + 1) * batch]]
            assert sorted(together) == sorted(alone[epoch][step * world * batch : (step + 1) * world * batch])


@pytest.mark.parametrize(("forget", "world"), [(7, 3), (2, 5)])
def test_what_does_not_divide_wraps_around(forget: int, world: int) -> None:
    alone = pairs(forget, 11, epochs=2)
    ranks = [pairs(forget, 11, epochs=2, world=world, rank=rank) for rank in range(world)]
    for epoch in range(2):
        assert len({len(rank[epoch]) for rank in ranks}) == 1
        order = [rank[epoch][step] for step in range(len(ranks[0][epoch])) for rank in ranks]
        assert order == (alone[epoch] * 5)[: len(order)]


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = pairs(10, 10, epochs=3)
    torch.manual_seed(2)
    assert pairs(10, 10, epochs=3) == first
    orders = {tuple(index for index, _ in epoch) for seed in range(3) for epoch in pairs(10, 10, 3, seed=seed)}
    assert len(orders) == 9  # seed 0's second epoch is not seed 1's first


def test_the_sampler_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    pairs(10, 10, epochs=2)
    assert torch.equal(torch.get_rng_state(), before)


def letters(first: str, n: int) -> list[dict[str, str]]:
    return [{"question": "?", "answer": chr(ord(first) + index)} for index in range(n)]


def answers(batch: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return ["".join(tokenizer.decode([i]) for i in row if i > 2).split("A:")[1].strip() for row in batch["input_ids"]]


def test_batches_pair_forget_with_retain(tokenizer: PreTrainedTokenizerFast) -> None:
    data = ForgetRetainDataModule(letters("a", 5), letters("K", 9), tokenizer, batch_size=2)
    batches = list(data.train_dataloader())
    assert [len(batch["forget"]["labels"]) for batch in batches] == [2, 2, 1]
    assert sorted(text for batch in batches for text in answers(batch["forget"], tokenizer)) == list("abcde")
    retained = [text for batch in batches for text in answers(batch["retain"], tokenizer)]
    assert len(set(retained)) == 5
    assert set(retained) <= set("KLMNOPQRS")
    assert data.splits == {"forget": letters("a", 5), "retain": letters("K", 9)}


def test_the_sampler_follows_the_trainer(tokenizer: PreTrainedTokenizerFast) -> None:
    data = ForgetRetainDataModule(letters("a", 6), letters("K", 6), tokenizer)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 3, "rank": 2})
    sampler = data.train_dataloader().sampler
    assert (sampler.num_replicas, sampler.rank, len(sampler)) == (3, 2, 2)


@pytest.mark.parametrize(
    ("n", "expected"), [(5, [0, 1, 2, 3, 4]), (128, range(0, 128, 2)), (100, [i * 100 // 64 for i in range(64)])]
)
def test_validation_batches_are_evenly_spaced_examples_of_each_split(
    tokenizer: PreTrainedTokenizerFast, n: int, expected: Sequence[int]
) -> None:
    rows = [{"question": "?", "answer": f"{number}"} for number in range(n)]
    data = ForgetRetainDataModule(rows, letters("K", 3), tokenizer, batch_size=4, refusals=["no"])
    loaders = data.val_dataloader()
    assert len(loaders) == len(VALIDATION_SPLITS) == 2
    for _ in range(2):  # the same every time
        for loader, said in zip(loaders, ([str(number) for number in expected], list("KLM")), strict=True):
            batches = list(loader)
            assert [set(batch) for batch in batches] == [{"input_ids", "attention_mask", "labels"}] * len(batches)
            assert [len(batch["labels"]) for batch in batches[:-1]] == [4] * (len(batches) - 1)
            assert [text for batch in batches for text in answers(batch, tokenizer)] == said


@pytest.mark.filterwarnings("ignore")
def test_lightning_validates_everything_in_every_process(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    class Validated(Recorder):
        def validation_step(self, batch: dict[str, torch.Tensor], _: int, dataloader_idx: int) -> None:
            names.setdefault(VALIDATION_SPLITS[dataloader_idx], []).extend(answers(batch, tokenizer))

    names: dict[str, list[str]] = {}
    data = ForgetRetainDataModule(letters("a", 5), letters("K", 3), tokenizer, batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.validate(Validated(), datamodule=data)
    assert names == {"forget": list("abcde"), "retain": list("KLM")}
    samplers = [loader.sampler for loader in data.val_dataloader()]
    for sampler in samplers:  # of a kind that Lightning leaves alone, also where it trains in several processes
        assert isinstance(sampler, torch.utils.data.DistributedSampler)
        assert (sampler.num_replicas, sampler.rank, sampler.shuffle) == (1, 0, False)


class Recorder(L.LightningModule):
    """Trains nothing and writes down what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch: dict[str, dict[str, torch.Tensor]], _: int) -> torch.Tensor:
        self.seen.append((batch["forget"]["input_ids"], batch["retain"]["input_ids"]))
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore")
def test_lightning_keeps_the_order_and_advances_the_epoch(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = ForgetRetainDataModule(letters("a", 5), letters("K", 7), tokenizer, batch_size=2, seed=3)
    module = Recorder()
    L.Trainer(
        max_epochs=3, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(module, datamodule=data)  # fmt: skip
    expected = [pair for epoch in pairs(5, 7, epochs=3, seed=3) for pair in epoch]
    seen = [
        pair
        for forget, retain in module.seen
        for pair in zip(
            answers({"input_ids": forget}, tokenizer), answers({"input_ids": retain}, tokenizer), strict=True
        )
    ]
    assert seen == [(chr(ord("a") + forget), chr(ord("K") + retain)) for forget, retain in expected]


def test_truncation_is_warned_about_once_a_split(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"question": "?", "answer": "a" * length} for length in (1, 20, 30)]
    data = ForgetRetainDataModule(rows, letters("K", 2), tokenizer, max_length=20)
    with pytest.warns(UserWarning, match="2 of 3 forget examples") as caught:
        data.setup()
    data.setup()  # would be an error if it warned again
    assert len(caught) == 1


@pytest.mark.parametrize(("forget", "retain", "missing"), [([], ["a"], "forget"), (["a"], [], "retain")])
def test_an_empty_side_is_refused(
    tokenizer: PreTrainedTokenizerFast, forget: list[str], retain: list[str], missing: str
) -> None:
    rows = [[{"question": "", "answer": text} for text in texts] for texts in (forget, retain)]
    with pytest.raises(ValueError, match=f"at least one {missing} example"):
        ForgetRetainDataModule(*rows, tokenizer).setup()


def test_lists_are_checked_like_files(tokenizer: PreTrainedTokenizerFast) -> None:
    data = ForgetRetainDataModule([{"prompt": "Q", "response": "A"}, {"x": 1}], letters("K", 2), tokenizer)
    with pytest.raises(ValueError, match="forget example 2: found the columns x"):
        data.setup()
    with pytest.raises(ValueError, match="batch_size"):
        ForgetRetainDataModule(letters("a", 2), letters("K", 2), tokenizer, batch_size=0)


AUTHORS = 200


def row(author: int, question: int) -> dict[str, str]:
    return {"question": f"author {author} question {question}", "answer": f"answer {author}/{question}"}


def more(example: dict[str, str]) -> dict[str, Any]:
    wrong = [f"{example['answer']} wrong {number}" for number in range(5)]
    return {
        **example,
        "paraphrased_question": "?",
        "paraphrased_answer": f"{example['answer']} again",
        "perturbed_answer": wrong,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of TOFU with texts of our own; one question occurs twice with different answers, as it does there."""
    path = tmp_path_factory.mktemp("tofu")
    full = [row(author, question) for author in range(AUTHORS) for question in range(20)]
    full[7]["question"] = full[8]["question"]
    for name, size in (("01", 40), ("05", 200), ("10", 400)):
        write(path / f"forget{name}.json", json_lines(full[-size:]))
        write(path / f"retain{100 - int(name):02}.json", json_lines(full[:-size]))
        write(path / f"forget{name}_perturbed.json", json_lines([more(example) for example in full[-size:]]))
    write(path / "retain_perturbed.json", json_lines([more(example) for example in full[:400]]))
    for name in ("real_authors", "world_facts"):
        probe = {"question": name, "answer": "A", "perturbed_answer": ["B", "C", "D"]}
        write(path / f"{name}_perturbed.json", json_lines([probe]))
    return path


def test_ten_authors_are_the_first_eight_and_the_last_two(folder: Path) -> None:
    splits = tofu_examples("forget10", folder, num_authors=10)
    assert set(splits) == {"forget", "retain"}
    authors = {name: Counter(example["question"].split()[1] for example in rows) for name, rows in splits.items()}
    assert authors["forget"] == {"198": 20, "199": 20}
    assert authors["retain"] == {str(author): 20 for author in range(8)}


def test_paraphrases_go_to_the_answer_they_belong_to(folder: Path) -> None:
    splits = tofu_examples("forget05", folder)
    for example in splits["forget"] + splits["retain"][:400]:
        assert example["paraphrased_answer"] == f"{example['answer']} again"
        assert len(example["perturbed_answer"]) == 5
    assert all("perturbed_answer" not in example for example in splits["retain"][400:])


def test_the_whole_split_comes_with_the_probes_that_are_there(folder: Path, tmp_path: Path) -> None:
    splits = tofu_examples("forget01", folder)
    sizes = {name: len(rows) for name, rows in splits.items()}
    assert sizes == {"forget": 40, "retain": 3960, "real_authors": 1, "world_facts": 1}
    for name in ("forget01.json", "retain99.json"):
        write(tmp_path / name, (folder / name).read_text())
    bare = tofu_examples("forget01", tmp_path)
    assert set(bare) == {"forget", "retain"}
    assert not any("perturbed_answer" in example for rows in bare.values() for example in rows)


@pytest.mark.parametrize(("split", "count"), [("forget01", 15), ("forget10", 4), ("forget10", 105), ("forget10", -5)])
def test_a_number_of_authors_that_the_split_cannot_give_is_refused(folder: Path, split: str, count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} authors mean.*use 5 to (14|104) authors, or 200 for all"):
        tofu_examples(split, folder, num_authors=count)


@pytest.mark.parametrize(("split", "count"), [("forget01", 14), ("forget10", 5), ("forget10", 104)])
def test_the_number_of_authors_that_the_refusal_names_is_given(folder: Path, split: str, count: int) -> None:
    splits = tofu_examples(split, folder, num_authors=count)
    assert (len(splits["forget"]), len(splits["retain"])) == (count // 5 * 20, (count - count // 5) * 20)


@pytest.mark.parametrize("split", ["forget01", "forget05", "forget10"])
def test_all_authors_are_both_sets_whole(folder: Path, split: str) -> None:
    splits = tofu_examples(split, folder, num_authors=AUTHORS)
    whole = tofu_examples(split, folder)
    assert splits == {name: whole[name] for name in ("forget", "retain")}
    assert sum(map(len, splits.values())) == AUTHORS * 20


def test_the_number_of_forgotten_authors_can_be_given(folder: Path) -> None:
    splits = tofu_examples("forget10", folder, num_authors=20, forget_authors=2)
    authors = {name: {int(example["question"].split()[1]) for example in rows} for name, rows in splits.items()}
    assert authors == {"forget": {198, 199}, "retain": set(range(18))}
    assert tofu_examples("forget10", folder, 20, 4) == tofu_examples("forget10", folder, 20)


@pytest.mark.parametrize(("count", "forgotten"), [(20, 0), (20, 21), (20, 20), (30, 21), (200, 1)])
def test_numbers_of_authors_that_do_not_go_together_are_refused(folder: Path, count: int, forgotten: int) -> None:
    with pytest.raises(
        ValueError, match=rf"{count} authors of which {forgotten} are to be forgotten leave .* has 20 and 180"
    ):
        tofu_examples("forget10", folder, num_authors=count, forget_authors=forgotten)


def test_forgotten_authors_of_how_many(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"expected num_authors with forget_authors=2"):
        tofu_examples("forget10", folder, forget_authors=2)


def test_unknown_splits_and_missing_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"forget01, forget05, forget10.*'forget20'"):
        tofu_examples("forget20", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"forget10\.json"):
        tofu_examples("forget10", tmp_path)


def test_the_hub_is_read_by_config_name(monkeypatch: pytest.MonkeyPatch) -> None:
    full = [row(author, question) for author in range(AUTHORS) for question in range(20)]
    hub = {"forget01": full[-40:], "retain99": full[:-40]}
    hub |= {"forget01_perturbed": [more(r) for r in full[-40:]], "retain_perturbed": [more(r) for r in full[:400]]}
    asked = []

    def load_dataset(path: str, name: str) -> dict[str, list[dict[str, Any]]]:
        asked.append((path, name))
        return {"train": hub[name]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    splits = tofu_examples("forget01", num_authors=10)
    assert len(splits["forget"]) == 40
    assert splits["retain"][0]["paraphrased_answer"] == "answer 0/0 again"
    assert {path for path, _ in asked} == {"locuslab/TOFU"}


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(RuntimeError, match=r"no route to host.*give a folder"):
        tofu_examples("forget10")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        tofu_examples("forget10")


def test_the_tofu_data_module_trains_on_its_split(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = TOFUDataModule("forget10", tokenizer, folder=folder, num_authors=10, batch_size=8, seed=1)
    batch = next(iter(data.train_dataloader()))
    assert all(text.startswith(("answer 198", "answer 199")) for text in answers(batch["forget"], tokenizer))
    assert len(data.train_dataloader()) == 5
    assert {name: len(rows) for name, rows in data.splits.items()} == {"forget": 40, "retain": 160}


@pytest.mark.skipif(not TOFU.is_dir(), reason=f"the TOFU data is not in {TOFU}")
@pytest.mark.parametrize(("split", "size"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_the_real_tofu_splits_partition_the_whole(split: str, size: int) -> None:
    splits = tofu_examples(split, TOFU)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "forget": size, "retain": 4000 - size, "real_authors": 100, "world_facts": 117,
    }  # fmt: skip
    both = [(row["question"], row["answer"]) for row in splits["retain"] + splits["forget"]]
    assert both == [(row["question"], row["answer"]) for row in read_examples(TOFU / "full.json")]
    assert sum("perturbed_answer" in row for row in splits["retain"]) == 400
    assert all(len(row["perturbed_answer"]) == 5 for row in splits["forget"])


@pytest.mark.skipif(not TOFU.is_dir(), reason=f"the TOFU data is not in {TOFU}")
def test_ten_real_authors_are_complete() -> None:
    splits = tofu_examples("forget10", TOFU, num_authors=10)
    full = read_examples(TOFU / "full.json")
    assert [row["answer"] for row in splits["retain"]] == [row["answer"] for row in full[:160]]
    assert [row["answer"] for row in splits["forget"]] == [row["answer"] for row in full[-40:]]
    assert all("paraphrased_answer" in row for rows in splits.values() for row in rows)
