"""A smaller vocabulary: rows of embedding and head that a user's texts never use go, the tokenizer is cut with them.

What stays: every token that the texts use, the special tokens, what the configuration names, and whatever any text can
be spelled with (bytes, single characters), so that nothing becomes unreadable; text of another kind becomes longer. Of a
BPE tokenizer every token stays that some merge on the way to a used token makes, so the user's texts are split exactly
as before: a merge that was ever applied to them gives a token that is on the way to a used one. A unigram tokenizer
finds its best split among fewer pieces, of which the former best are all left. Both are checked on the texts.
"""

import copy
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError, need_whole
from modhifi_cli.graph.decoder import decoder_layers

_KINDS = ("BPE", "Unigram", "WordLevel")
_SUFFIXES = (".txt", ".jsonl")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "unk_token_id")
_CHECKED = 2_000_000  # characters of the texts on which old and new splits are compared


@dataclass(frozen=True)
class Cut:
    """What is left of a vocabulary.

    Attributes:
        kept: Old ids in the order of the new ones, ``[kept]`` int64 sorted.
        before: Rows that there were.
        used: How many of the kept the texts use.
    """

    kept: Tensor
    before: int
    used: int

    @property
    def account(self) -> str:
        """For the report."""
        return f"vocabulary cut from {self.before:,} to {len(self.kept):,} tokens, of which the texts use {self.used:,}"


def read_texts(path: str) -> list[str]:
    """Texts of a file or of a folder's files: ``.txt`` as they are, ``.jsonl`` by their field ``text``.

    Raises:
        DataError: If nothing is there, a file cannot be read, or there is no text in it.
    """
    place = Path(os.path.expanduser(path))
    files = sorted(file for file in place.iterdir() if file.suffix in _SUFFIXES) if place.is_dir() else [place]
    if not files or not place.exists():
        raise DataError(f"model.vocabulary: no text at {place}, expected a .txt or .jsonl file or a folder of them.")
    texts: list[str] = []
    for file in files:
        try:
            content = file.read_text(encoding="utf-8")
            lines = content.splitlines() if file.suffix == ".jsonl" else []
            rows = [json.loads(line)["text"] for line in lines if line] if file.suffix == ".jsonl" else [content]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"model.vocabulary: {file} cannot be read ({type(error).__name__}: {error}); give UTF-8 text, or JSON "
                "objects with a field text, one a line."
            ) from error
        texts += [row for row in rows if row.strip()]
    if not texts:
        raise DataError(f"model.vocabulary: {place} holds no text; give the texts that the model is to be used for.")
    return texts


def cut_vocabulary_(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, least: int = 1) -> tuple[Any, Cut]:
    """Cut embedding and head of a decoder in place.

    Args:
        model: Causal decoder of transformers.
        tokenizer: Its tokenizer; left as it is.
        texts: What the model is to be used for.
        least: How often a token must come up in them to stay.

    Returns:
        The cut tokenizer, and what is left.

    Raises:
        ConfigError: If the tokenizer cannot be cut, or `least` is out of range.
        UnsupportedModelError: If something else in the network has a row for every token.
    """
    need_whole("model.vocabulary_least", least, 1)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = embedding.weight.shape[0]
    _refuse_other_rows(model, embedding, head, rows)
    described = _described(tokenizer)
    kind = described["model"]["type"]
    ids = {token: number for number, token in enumerate(_tokens(described["model"]))} | _added(described)
    used = {number for number, count in _counts(tokenizer, texts).items() if count >= least}
    wanted = used | set(_added(described).values()) | _named(model)
    chosen = {token for token, number in ids.items() if number in wanted} | _spelling(described["model"], ids)
    if kind == "BPE":
        _add_ways_(chosen, described["model"])
    kept = sorted(ids[token] for token in chosen)
    outside = [number for number in kept if number >= rows]
    if outside:
        raise ConfigError(
            f"model.vocabulary: the tokenizer knows id {outside[0]}, and the network has {rows} rows; give the "
            "tokenizer that belongs to the network (model.tokenizer)."
        )
    place = {old: new for new, old in enumerate(kept)}
    smaller = _rebuilt(tokenizer, _narrowed(described, chosen, ids, place))
    _check(tokenizer, smaller, texts, place, exactly=least == 1)
    index = torch.tensor(kept)
    _cut_rows_(model, embedding, head, index, place)
    return smaller, Cut(index, rows, len(used & set(kept)))


# ---------------------------------------------------------------------------------------------------------- tokenizer


def _described(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    name = type(tokenizer).__name__
    if backend is None:
        raise ConfigError(
            f"model.vocabulary: the tokenizer ({name}) has no tokenizer.json that could be cut; leave model.vocabulary "
            "out."
        )
    described = json.loads(backend.to_str())
    kind = described["model"].get("type")
    if kind not in _KINDS:
        raise ConfigError(
            f"model.vocabulary: a tokenizer of type {kind} cannot be cut, expected {', '.join(_KINDS)}; leave "
            "model.vocabulary out."
        )
    return described


def _tokens(described: Mapping[str, Any]) -> list[str]:
    """Tokens in the order of their ids."""
    vocabulary = described["vocab"]
    if isinstance(vocabulary, list):
        return [piece for piece, _ in vocabulary]
    ordered = sorted(vocabulary, key=vocabulary.get)
    if [vocabulary[token] for token in ordered] != list(range(len(ordered))):
        raise ConfigError(
            "model.vocabulary: the tokenizer's ids have gaps, so it cannot be cut; leave model.vocabulary out."
        )
    return ordered


def _added(described: Mapping[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in described.get("added_tokens") or ()}


def _counts(tokenizer: Any, texts: Sequence[str]) -> Counter[int]:
    """How often each id comes up, read as a whole, by paragraphs or by lines: the most of the three."""
    found: Counter[int] = Counter()
    for separator in (None, "\n\n", "\n"):
        counted: Counter[int] = Counter()
        for text in texts:
            for part in [text] if separator is None else [part for part in text.split(separator) if part]:
                counted.update(tokenizer(part)["input_ids"])
        found |= counted
    return found


def _named(model: nn.Module) -> set[int]:
    """Ids that the network's configurations name."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        for key in _IDS:
            value = getattr(config, key, None)
            found |= {number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)}
    return found


def _spelling(described: Mapping[str, Any], ids: Mapping[str, int]) -> set[str]:
    """What any text can be spelled with: bytes, single characters, what no merge makes, and the unknown token."""
    found = {described["unk_token"]} if described.get("unk_token") in ids else set()
    if described["type"] == "WordLevel":
        return found
    tokens = _tokens(described)
    if described["type"] == "Unigram":
        unknown = described.get("unk_id")
        found |= {tokens[unknown]} if unknown is not None else set()
        return found | {token for token in tokens if len(token) == 1 or (token.startswith("<0x") and len(token) == 6)}
    made = {token for token, _, _ in _merges(described)}
    return found | {token for token in tokens if token not in made}


def _merges(described: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Result and two parts of every merge, in their order."""
    prefix = described.get("continuing_subword_prefix") or ""
    for merge in described["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first + second.removeprefix(prefix), first, second


def _add_ways_(chosen: set[str], described: Mapping[str, Any]) -> None:
    """Add every token that a merge on the way to a chosen one is made of."""
    parts: dict[str, list[str]] = {}
    for token, first, second in _merges(described):
        parts.setdefault(token, []).extend((first, second))
    waiting = list(chosen)
    while waiting:
        for part in parts.get(waiting.pop(), ()):
            if part not in chosen:
                chosen.add(part)
                waiting.append(part)


def _narrowed(
    described: Mapping[str, Any], chosen: set[str], ids: Mapping[str, int], place: Mapping[int, int]
) -> dict[str, Any]:
    """The description with the chosen tokens alone, by their new ids."""
    made = copy.deepcopy(dict(described))
    model = made["model"]
    if isinstance(model["vocab"], list):
        unknown = model.get("unk_id")
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in chosen]
        if unknown is not None:
            model["unk_id"] = place[unknown]
    else:
        model["vocab"] = {token: place[number] for token, number in model["vocab"].items() if token in chosen}
    if "merges" in model:
        whole = zip(model["merges"], _merges(model), strict=True)
        model["merges"] = [merge for merge, tokens in whole if all(token in chosen for token in tokens)]
    for token in made.get("added_tokens") or ():
        token["id"] = place[token["id"]]
    if made.get("padding"):
        made["padding"]["pad_id"] = place[made["padding"]["pad_id"]]
    _renumber_(made.get("post_processor"), place)
    return made


def _renumber_(processor: Any, place: Mapping[int, int]) -> None:
    if not isinstance(processor, dict):
        return
    for one in processor.get("processors") or ():
        _renumber_(one, place)
    special = processor.get("special_tokens")
    for token in special.values() if isinstance(special, dict) else ():
        token["ids"] = [place[number] for number in token["ids"]]
    for key in ("sep", "cls"):
        if isinstance(processor.get(key), list):
            processor[key][1] = place[processor[key][1]]


def _rebuilt(tokenizer: Any, described: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer

    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = Tokenizer.from_str(json.dumps(described))
    return smaller


def _check(tokenizer: Any, smaller: Any, texts: Sequence[str], place: Mapping[int, int], *, exactly: bool) -> None:
    """The new tokenizer must give the old split, or (where rare tokens went) at least the same text back."""
    seen = 0
    for text in texts:
        part = text[: _CHECKED - seen]
        before, after = tokenizer(part)["input_ids"], smaller(part)["input_ids"]
        wanted = [place.get(number) for number in before]
        same = after == wanted if exactly else smaller.decode(after) == tokenizer.decode(before)
        if not same and len(part) == len(text):  # a part cut in the middle of a word may hold what no text holds
            raise ConfigError(
                "model.vocabulary: the cut tokenizer splits the texts in another way than before, so it cannot be "
                "cut; leave model.vocabulary out."
            )
        seen += len(part)
        if seen >= _CHECKED:
            return


# ------------------------------------------------------------------------------------------------------------ network


def _refuse_other_rows(model: nn.Module, embedding: Any, head: Any, rows: int) -> None:
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or head.out_features != rows:
        raise UnsupportedModelError(
            f"model.vocabulary: {type(model).__name__} has no embedding and linear head with a row for each token; "
            "leave model.vocabulary out."
        )
    own = {id(tensor) for module in (embedding, head) for tensor in module.parameters()}
    layers = decoder_layers(model)
    for name, tensor in model.named_parameters():
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        if id(tensor) not in own and not inside and rows in tensor.shape and rows != embedding.embedding_dim:
            raise UnsupportedModelError(
                f"model.vocabulary: {name} has {rows} rows or columns as well, so the vocabulary cannot be cut; leave "
                "model.vocabulary out."
            )


def _cut_rows_(
    model: nn.Module, embedding: nn.Embedding, head: nn.Linear, kept: Tensor, place: Mapping[int, int]
) -> None:
    tied = head.weight is embedding.weight

    def chosen(tensor: Tensor) -> nn.Parameter:
        rows = tensor.detach().index_select(0, kept.to(tensor.device)).contiguous()
        return nn.Parameter(rows, requires_grad=tensor.requires_grad)

    embedding.weight = chosen(embedding.weight)
    embedding.num_embeddings = len(kept)
    if embedding.padding_idx is not None:
        embedding.padding_idx = place.get(embedding.padding_idx)
    head.weight = embedding.weight if tied else chosen(head.weight)
    head.out_features = len(kept)
    if head.bias is not None:
        head.bias = chosen(head.bias)
    for config in (model.config, getattr(model, "generation_config", None)):
        for key in _IDS:
            value = getattr(config, key, None)
            if isinstance(value, list):
                setattr(config, key, [place[number] for number in value])
            elif isinstance(value, int):
                setattr(config, key, place[value])
    model.config.vocab_size = len(kept)
    if hasattr(model, "vocab_size"):
        model.vocab_size = len(kept)
