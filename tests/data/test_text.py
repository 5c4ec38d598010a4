"""Text as token windows: every format, the seeded draw, BOS, stride, and what is said of bad input."""

import json

import pytest
import torch

from modhifi_cli.data import text
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.records import Preprocess, TextInput
from tests.decoders import tokenizer

LETTERS = "".join(chr(ord("!") + number % 60) for number in range(600))


@pytest.fixture
def words():
    made = tokenizer()
    return TextInput(made, len(made), 64, made.bos_token_id)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "text.txt").write_text(LETTERS)
    return tmp_path / "text.txt"


def load(path, words, labelled=False, **settings):
    return text.load(path=str(path), preprocess=words, labelled=labelled, **{"sequences": 4, "length": 20} | settings)


def test_calibration_is_a_seeded_draw_of_windows_that_do_not_overlap(file, words):
    one, two, other = (load(file, words, seed=seed) for seed in (0, 0, 1))
    assert [w.tolist() for w in one.windows] == [w.tolist() for w in two.windows]
    assert one.protocol["sha256"] == two.protocol["sha256"] != other.protocol["sha256"]
    assert len(one) == 4 and one.protocol["available"] == 30
    starts = sorted((int(window[0]) - 4) for window in one.windows)
    assert all(start % 20 == 0 for start in starts)


def test_every_token_is_scored_once_whatever_the_stride(file, words):
    for stride in (None, 8, 20):
        source = load(file, words, labelled=True, sequences=None, stride=stride)
        scored = sum(int((labels != -100).sum()) for _, labels in source.batches(3))
        first = len(source) if stride in (None, 20) else 1  # tokens without any context
        assert scored == 600 - first


def test_a_window_begins_with_bos_where_it_is_asked_for(file, words):
    plain, begun = load(file, words), load(file, words, bos=True)
    assert all(len(window) == 20 and window[0] == 0 for window in begun.windows)
    assert plain.protocol["bos"] is False and begun.protocol["bos"] is True
    documents = load(file, words, layout="documents", sequences=1)
    assert documents.protocol["bos"] is True and documents.windows[0][0] == 0


@pytest.mark.parametrize("form", ["jsonl", "alpaca", "parquet", "separated"])
def test_documents_come_from_every_format(form, tmp_path, words):
    documents = [LETTERS[at : at + 50] for at in range(0, 500, 50)]
    path, settings = tmp_path / "d.jsonl", {}
    if form == "jsonl":
        path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    elif form == "alpaca":
        path = tmp_path / "d.json"
        path.write_text(json.dumps([{"instruction": d[:20], "input": "", "output": d[20:]} for d in documents]))
    elif form == "parquet":
        pandas = pytest.importorskip("pandas")
        pytest.importorskip("pyarrow")
        path = tmp_path / "d.parquet"
        pandas.DataFrame({"text": documents}).to_parquet(path)
    else:
        path, settings = tmp_path / "d.txt", {"separator": "|END|"}
        path.write_text("|END|".join(documents).replace("\\", ""))
    source = load(path, words, **settings)
    assert len(source) == 4 and all(len(window) == 20 for window in source.windows)
    assert [w.tolist() for w in source.windows] != [w.tolist() for w in load(path, words, seed=1, **settings).windows]


def test_parts_of_one_source_share_no_document(file, tmp_path, words):
    documents = [LETTERS[at : at + 50] for at in range(0, 60, 6)]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    seen = [load(path, words, layout="documents", sequences=None, length=51, part=part) for part in ([0, 0.3], [0.3, 1])]
    assert [len(source) for source in seen] == [3, 7]
    assert len({tuple(window.tolist()) for source in seen for window in source.windows}) == 10
    front, back = (load(file, words, labelled=True, sequences=None, part=part) for part in ([0, 0.4], [0.4, 1]))
    together = torch.cat([*front.windows, *back.windows])
    assert together.tolist() == torch.cat(list(load(file, words, labelled=True, sequences=None).windows)).tolist()
    assert "[0, 0.4]" in front.protocol["path"] and len(front) == 12 and len(back) == 18


def test_shared_passages_are_found(file, tmp_path, words):
    (tmp_path / "other.txt").write_text(LETTERS[::-1])
    calibration = load(file, words, sequences=12, length=50)
    assert text.overlap(calibration, load(file, words, labelled=True, length=50)) > 0
    assert text.overlap(calibration, load(tmp_path / "other.txt", words, labelled=True, length=50)) == 0


def test_batches_hold_windows_of_one_length(words):
    windows = [torch.arange(length) for length in (5, 5, 5, 3)]
    shapes = [tuple(tokens.shape) for tokens, _ in text.TokenWindows(windows, [0] * 4, {}).batches(2)]
    assert shapes == [(2, 5), (1, 5), (1, 3)]


@pytest.mark.parametrize("settings, said", [
    ({"sequences": 31}, "gives 30 windows of 20 tokens, 31 were asked for"),
    ({"length": 65}, "made for at most 64 tokens"),
    ({"length": 1}, "data.length: expected a whole number from 2"),
    ({"stride": 30}, "skips text"),
    ({"layout": "other"}, "must be stream or documents"),
    ({"part": [0.5, 0.5]}, r"data.part: expected two shares of the text, \[begin, end\]"),
    ({"part": 0.5}, "got 0.5"),
    ({"part": [0, 0.0001]}, "from 0 to 0.0001 holds no text"),
])  # fmt: skip
def test_what_does_not_fit_is_named(file, words, settings, said):
    with pytest.raises((ConfigError, DataError), match=said):
        load(file, words, **settings)


def test_bad_files_are_named(tmp_path, words):
    with pytest.raises(DataError, match="no file at"):
        load(tmp_path / "nothing.txt", words)
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(DataError, match="damaged, not JSON"):
        load(tmp_path / "a.jsonl", words)
    (tmp_path / "b.jsonl").write_text('{"label": 3}')
    with pytest.raises(DataError, match="name it with data.field=NAME"):
        load(tmp_path / "b.jsonl", words)
    (tmp_path / "d.jsonl").write_text("[3]")
    with pytest.raises(DataError, match="holds no documents; expected strings, or objects with a text field"):
        load(tmp_path / "d.jsonl", words)
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        load(tmp_path / "c.txt", words)
    with pytest.raises(ConfigError, match=r"data: give either data.path=FILE or data.hub \(a data set's name on the hub\)"):
        load(tmp_path / "c.txt", words, hub={"path": "wikitext"})
    with pytest.raises(ConfigError, match="this network reads images"):
        load(tmp_path / "c.txt", Preprocess((8, 8), (0.5,), (0.5,)))
