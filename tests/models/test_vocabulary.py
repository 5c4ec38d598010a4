"""A cut vocabulary: the user's texts are split and predicted as before, and plain transformers opens what is saved."""

import copy

import pytest
import torch

from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.models import hf
from modhifi_cli.models.vocabulary import cut_vocabulary_, read_texts
from tests.decoders import tiny

TEXT = "the cat sat on the mat. the cat ate the rat, and that was that.\n\n" * 3
OTHER = "zebras quiz; jinxed! Ünï"


def trained(kind, size=120):
    """A tokenizer of a kind, trained on other words than the texts alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = ["the cat sat on the mat and ate that rat", "zebras quizzed jinxed oxen, quick brown foxes jump over"] * 5
    special = ["<s>", "</s>", "<unk>"]
    if kind == "BPE":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size + 256, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>")
    else:
        made = Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=special)
    made.train_from_iterator([*words, TEXT, OTHER], trainer)
    first = ("<s>", made.token_to_id("<s>"))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[first])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def network(tokenizer, **changed):
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    return tiny("llama", vocab_size=len(tokenizer) + 4, **ids, **changed).float()  # rows beyond the tokenizer are usual


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordLevel"])
def test_the_texts_are_split_and_predicted_as_before(kind, tied, tmp_path):
    tokenizer = trained(kind)
    model = network(tokenizer, tie_word_embeddings=tied)
    dense = copy.deepcopy(model)
    smaller, cut = cut_vocabulary_(model, tokenizer, [TEXT])
    before, after = tokenizer(TEXT)["input_ids"], smaller(TEXT)["input_ids"]
    assert cut.before == len(tokenizer) + 4 and len(smaller) == len(cut.kept) < len(tokenizer)
    assert [int(cut.kept[number]) for number in after] == before and smaller.bos_token_id == after[0]
    with torch.no_grad():
        wanted = dense(torch.tensor([before[:40]])).logits[..., cut.kept]
        found = model(torch.tensor([after[:40]])).logits
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.vocab_size == len(cut.kept) and model.config.eos_token_id == smaller.eos_token_id

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model.save_pretrained(tmp_path)
    smaller.save_pretrained(tmp_path)
    opened, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert words(TEXT)["input_ids"] == after and words(OTHER)["input_ids"] == smaller(OTHER)["input_ids"]
    with torch.no_grad():
        assert torch.allclose(opened(torch.tensor([after[:40]])).logits, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_any_text_can_still_be_written(kind):
    tokenizer = trained(kind)
    smaller, _ = cut_vocabulary_(network(tokenizer), tokenizer, [TEXT])
    ids = smaller(OTHER)["input_ids"]
    before = tokenizer(OTHER)["input_ids"]
    assert smaller.decode(ids, skip_special_tokens=True) == tokenizer.decode(before, skip_special_tokens=True)
    assert len(ids) >= len(before)


def test_rare_tokens_go_and_the_texts_come_back():
    tokenizer = trained("BPE")
    often, _ = cut_vocabulary_(network(tokenizer), tokenizer, [TEXT + OTHER], least=2)
    every, _ = cut_vocabulary_(network(tokenizer), tokenizer, [TEXT + OTHER])
    assert len(often) < len(every)
    assert often.decode(often(OTHER)["input_ids"], skip_special_tokens=True) == OTHER


def test_a_tokenizer_without_a_fast_form_or_of_another_kind_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = trained("BPE")
    with pytest.raises(ConfigError, match=r"object\) has no tokenizer.json that could be cut; leave model.vocabulary out"):
        cut_vocabulary_(network(tokenizer), object(), [TEXT])
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1})))
    with pytest.raises(ConfigError, match="a tokenizer of type WordPiece cannot be cut"):
        cut_vocabulary_(network(tokenizer), pieces, [TEXT])


def test_a_network_with_other_rows_for_tokens_is_refused():
    tokenizer = trained("BPE")
    model = network(tokenizer)
    model.register_parameter("scales", torch.nn.Parameter(torch.ones(len(tokenizer) + 4)))
    with pytest.raises(UnsupportedModelError, match="scales has .* rows or columns as well"):
        cut_vocabulary_(model, tokenizer, [TEXT])


def test_a_tokenizer_of_another_network_is_refused():
    tokenizer = trained("BPE")
    with pytest.raises(ConfigError, match="the network has 64 rows; give the tokenizer that belongs to the network"):
        cut_vocabulary_(tiny("llama"), tokenizer, [TEXT])


def test_texts_that_are_missing_empty_or_unreadable(tmp_path):
    with pytest.raises(DataError, match="model.vocabulary: no text at"):
        read_texts(str(tmp_path / "absent.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text; give the texts that the model is to be used for"):
        read_texts(str(tmp_path / "empty.txt"))
    (tmp_path / "rows.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl cannot be read \(KeyError"):
        read_texts(str(tmp_path / "rows.jsonl"))


def test_how_often_must_be_a_number():
    tokenizer = trained("BPE")
    with pytest.raises(ConfigError, match="model.vocabulary_least must be a whole number from 1; got 0"):
        cut_vocabulary_(network(tokenizer), tokenizer, [TEXT], least=0)


def test_the_loader_says_what_was_cut(tmp_path):
    tokenizer = trained("BPE")
    network(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "mine.txt").write_text(TEXT)
    loaded = hf.load(path=str(tmp_path / "model"), vocabulary=str(tmp_path / "mine.txt"))
    assert "vocabulary cut from" in loaded.weights and loaded.preprocess.vocabulary == loaded.model.config.vocab_size
    again = hf.build(**loaded.architecture["kwargs"])
    assert again.get_input_embeddings().weight.shape == loaded.model.get_input_embeddings().weight.shape
