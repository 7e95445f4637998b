"""tools/judge.py: the table, judge.json and judge.txt, the plot, and what is left out."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sacrebleu", reason="pip install -r requirements-extra.txt")

from conftest import ROOT
from storygpt.corpus import nursery
from storygpt.corpus.dataset import Split
from storygpt.corpus.tokenizer import END_OF_TEXT, Tokenizer
from tools import judge
from tools.judging import novelty, text

FLAGS = ["--num_samples=12", "--max_new_tokens=60"]


@pytest.fixture
def result(run, capsys):
    """A function that runs the judge: returns the table as label → cells, the other lines, and stderr."""
    def result(*argv):
        capsys.readouterr()
        judge.main([*argv, *FLAGS])
        out, err = capsys.readouterr()
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[0] == "|"]
        return {label: cells for label, *cells in lines}, [x for x in out.splitlines() if x[0] != "|"], err
    return result


def test_the_table_and_judge_json(result):
    table, lines, err = result("out/tiny")
    assert table["measure [95% interval]"] == ["out/tiny", "held-out (6)"] and not err
    assert all(section in table for section in judge.MEASURES)
    assert table["minimal pairs (word order), % right; chance 50"][1] == "–" != table["loss, tokens 0–15 of a story"][0]
    assert "[" not in table["words and marks per story"][1] and "[" in table["words and marks per story"][0]  # of 6, 12
    assert "distinct 2-grams in 10 stories, %" in table and "self-BLEU of 100 stories, %" not in table
    assert [line.split(":")[0] for line in lines] == ["out/tiny", "held-out (6)"] and "longest copied span" in lines[0]

    found = json.loads(Path("out/tiny/judge.json").read_text(encoding="utf-8"))
    assert found["checkpoint"] == "out/tiny/ckpt.pt" and found["seed"] == 1 and found["dataset"] == "nursery-bpe300"
    assert set(found["measures"]["words"]) == {"value", "low", "high"} and found["measures"]["self_bleu"] is None
    assert found["reference"]["ends"] == {"value": 1, "low": None, "high": None}
    assert "loss_window_end" not in found["reference"]
    assert len(found["curves"]["loss_by_window_position"]) == 16 and len(found["curves"]["novelty"]) == 12
    stories = Path("out/tiny/judge.txt").read_text(encoding="utf-8").split(f"\n{END_OF_TEXT}\n")
    assert len(stories) == 12 and found["longest_copy"]["text"] in stories[found["longest_copy"]["story"]]
    assert found["longest_copy"]["text"] in found["longest_copy"]["source"]


def test_the_result_of_a_checkpoint_is_read_from_judge_json(result):
    table, state, path = result("out/tiny")[0], judge.load("out/tiny/ckpt.pt"), Path("out/tiny/judge.json")
    heading, *lines = judge.read_result("out/tiny", state).splitlines()
    assert heading == (
        "Measured by `python -m tools.judge` (num_samples 12, start '', temperature 0.8, top_k 200, top_p 1.0, "
        "max_new_tokens 60, seed 1); the aim is the value of the held-out stories of nursery-bpe300.")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    assert rows[0][1:] == ["this model", "held-out stories"]
    assert {label: cells for label, *cells in rows[2:]} == dict(list(table.items())[2:])

    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(found | {"reference": None, "dataset": None}), encoding="utf-8")
    assert "held-out" not in judge.read_result("out/tiny", state)
    assert not judge.read_result("out/tiny", state | {"tokens": 5})  # another checkpoint
    for damage in ({"measures": {"ends": 1}}, {"top_p": None, "reference": {"ends": {"value": 1}}}):
        path.write_text(json.dumps(found | damage), encoding="utf-8")
        with pytest.raises(judge.UserError, match="out/tiny/judge.json is damaged: remove it, or run  .* out/tiny  ag"):
            judge.read_result("out/tiny", state)
    path.unlink()
    assert judge.read_result("out/tiny", state) == ""


def test_the_same_seed_gives_the_same_result(result):
    first, second, other = (result("out/tiny", f"--seed={seed}")[0] for seed in (3, 3, 4))
    assert first == second != other


def test_stories_that_were_cut_have_not_ended(run):
    args = judge.parse_args(["out/tiny", "--num_samples=3", "--max_new_tokens=2", "--temperature=0"])
    stories, ended = judge.generate_stories(*judge.load_model("out/tiny/ckpt.pt")[:2], args)
    assert len(stories) == 3 and ended == [False] * 3


def test_judge_txt_can_be_judged_without_the_model(result):
    with_model = result("out/tiny")[0]
    table, _, err = result("out/tiny/judge.txt", "--dataset", "nursery-bpe300")
    assert table["stories that end, %"] == ["–", "100.0"]  # a file does not say
    for label, (cell, _) in table.items():
        if cell not in ("", "–", "out/tiny/judge.txt") and label[0] != "-":
            assert with_model[label][0] == cell, label
    assert "loss, second half of the window" not in table and not err


def test_several_columns_and_controls(result):
    Path("stories.txt").write_text(f"\n{END_OF_TEXT}\n".join(nursery.stories(20, seed=9)), encoding="utf-8")
    table, _, _ = result("out/tiny", "stories.txt", "--controls")
    assert table["measure [95% interval]"] == ["out/tiny", "stories.txt", "trigram model", "shuffled sentences",
                                               "held-out (6)"]
    one_hero = [cell.split()[0] for cell in table["stories with one consistent hero, %"]]
    assert one_hero[1] == one_hero[-1] == "100.0"
    assert table["3-grams not in the training text, %"][2] == "0.0"  # what defines a trigram model


def test_an_opening(result):
    tokenizer = Tokenizer.load("out/tiny")
    held_out = judge.split_stories(tokenizer, Split("data/nursery-bpe300", "validation", 1).tokens)
    opening = held_out[2][:40]
    table, _, err = result("out/tiny", "--start", opening)
    count = sum(story.startswith(opening) for story in held_out)
    assert table["measure [95% interval]"][1] == f"held-out ({count})" and 0 < count < 6 and not err
    stories = Path("out/tiny/judge.txt").read_text(encoding="utf-8").split(f"\n{END_OF_TEXT}\n")
    assert len(held_out) == 6 and len(stories) == 12 and all(story.startswith(opening) for story in stories)
    inside = held_out[2][40:80]
    _, _, err = result("out/tiny", "--start", inside)
    assert err == f"note: no held-out story of data/nursery-bpe300 begins with {inside!r}: comparing with others\n"


def test_held_out_stories_are_spread_and_names_are_those_of_the_training_text(run):
    tokenizer = Tokenizer.load("out/tiny")
    training, held_out = (judge.split_stories(tokenizer, Split("data/nursery-bpe300", split, 1).tokens)
                          for split in ("train", "validation"))
    args = judge.parse_args(["out/tiny", "--num_samples=3"])
    dataset = judge.load_dataset({"out/tiny": Path("out/tiny/ckpt.pt")}, args)
    assert dataset.stories == held_out[::2]
    assert dataset.names == text.learn_names(training) != text.learn_names(held_out)


def test_the_longest_copy_is_that_of_all_stories(run):
    tokenizer = Tokenizer.load("out/tiny")
    tokens = Split("data/nursery-bpe300", "train", 1).tokens
    training = judge.split_stories(tokenizer, tokens)
    column = judge.Column("", ["Xyz.", training[4][:100] + " Xyz", training[7][:50]], None)
    judge.measure_novelty(column, tokenizer, novelty.TrainingText(tokens, tokenizer.end_of_text))
    copy = column.longest_copy
    assert copy["story"] == 1 and copy["training_story"] == 5 and copy["source"] == training[4]
    assert training[4][:90] in copy["text"]


def test_without_the_data_the_rest_is_measured(result, run):
    Path("data").rename("elsewhere")
    table, lines, err = result("out/tiny")
    assert err.startswith("note: data/nursery-bpe300, the dataset of out/tiny, is not here: left out are")
    assert err.count("\n") == 1 and not lines
    assert table["measure [95% interval]"] == ["out/tiny"] and "words and marks per story" in table
    assert "Copied or new" not in table
    assert json.loads(Path("out/tiny/judge.json").read_text(encoding="utf-8"))["reference"] is None


def test_stories_without_a_dataset(result):
    Path("stories.txt").write_text("A cat sat.\n<|endoftext|>\n\n<|endoftext|>\nA dog ran.\n", encoding="utf-8")
    table, _, err = result("stories.txt")
    assert "note: no --dataset: left out are held-out stories, copies and --controls" in err
    assert "note: stories.txt: 1 of 3 stories are empty and left out" in err
    assert table["words and marks per story"] == ["4.0"]


@pytest.mark.parametrize("content", [
    b"A\ncat.\n<|endoftext|>\nA dog.\n", b"\xef\xbb\xbfA\r\ncat.\r\n<|endoftext|>\r\nA dog.\r\n",
    b"A\ncat.<|endoftext|>A dog.<|endoftext|>", b"A\ncat.\n<|endoftext|>\nA dog.\n<|endoftext|>\n"])
def test_files_of_other_programs(run, content):
    Path("stories.txt").write_bytes(content)
    assert judge.read_stories("stories.txt").stories == ["A\ncat.", "A dog."]


def test_other_training_text(result, run):
    import prepare
    prepare.main(["nursery", "--tokenizer", "data/nursery-bpe300", "--max_stories", "50", "--name", "fewer"])
    table, _, err = result("out/tiny", "--dataset=fewer")
    assert "note: out/tiny was trained on other text than data/fewer: what it copied from that is not found" in err
    assert "Copied or new" in table


def test_the_plot(result):
    _, lines, _ = result("out/tiny", "--picture=plots/judge.png")
    assert lines[-1] == "plot: plots/judge.png" and Path("plots/judge.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_one_line(run, fails, monkeypatch):
    assert "no run and no UTF-8 stories in out/typo: name a run's folder" in fails(judge.main, ["out/typo"])
    assert "no checkpoint in data" in fails(judge.main, ["out/tiny", "data"])
    assert "no run and no UTF-8 stories in out/tiny/ckpt.pt: name a run's" in fails(judge.main, ["out/tiny/ckpt.pt"])
    assert "no data in data/typo" in fails(judge.main, ["out/tiny", "--dataset=typo"])
    assert "did you mean --num_samples?" in fails(judge.main, ["out/tiny", "--num-samples=3"], code=2)
    assert "from 1 to 100000" in fails(judge.main, ["out/tiny", "--num_samples=0"], code=2)
    Path("empty.txt").touch()
    assert "empty.txt has only empty stories (1)" in fails(judge.main, ["empty.txt", "--dataset=nursery-bpe300"])
    assert not Path("out/tiny/judge.json").exists()
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    assert "pydivsufsort halted; None in sys.modules: pip install -r" in fails(judge.main, ["out/tiny"])


def test_a_model_that_writes_nothing(run, fails):
    checkpoint = torch.load("out/tiny/ckpt.pt", weights_only=True)
    shutil.copytree("out/tiny", "out/silent", dirs_exist_ok=True)
    end_of_text = checkpoint["model"]["transformer.wte.weight"][299]
    end_of_text *= 100
    checkpoint["model"]["transformer.ln_f.bias"] = 100 * end_of_text  # the most likely token everywhere
    torch.save(checkpoint, "out/silent/ckpt.pt")
    assert "out/silent has only empty stories (12)" in fails(judge.main, ["out/silent", *FLAGS])


def test_the_documentation_explains_every_measure():
    def words(line):
        return set(re.findall(r"[a-zA-Z]{2,}", line))
    rows = [words(line.split("|")[1]) for line in (ROOT / "docs/judging.md").read_text(encoding="utf-8").splitlines()
            if line.startswith("| ")]
    for measures in judge.MEASURES.values():
        for label in measures.values():
            assert any(words(label) - {"chance", "tokens"} <= row for row in rows), label
