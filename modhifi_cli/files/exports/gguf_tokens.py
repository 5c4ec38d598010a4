"""A tokenizer of transformers in the words of a GGUF file.

llama.cpp has byte-level byte-pair encoding (``gpt2``) and SentencePiece's (``llama``). Both are read here from the fast
tokenizer's own description, so that a folder and a file made of it split text alike.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.records import TextInput

_NORMAL, _UNKNOWN, _CONTROL, _OWN, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # types of a token, as llama.cpp numbers them
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is split before its bytes are joined → llama.cpp's name of it.
_SPLITS: Mapping[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", "bytes"): "llama-bpe",
    (rf"{_LETTERS}|\p{{N}}|{_REST}", "bytes"): "qwen2",
}


@dataclass(frozen=True)
class Described:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: ``"gpt2"`` or ``"llama"``.
        pre: Name of the split, ``"default"`` for ``llama``.
        tokens: One for each id.
        types: One for each id.
        scores: One for each id, for ``llama``; empty otherwise.
        merges: In order, for ``gpt2``; empty otherwise.
        space: Whether a space goes in front of a text (``llama``).
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    space: bool


def described(text: TextInput, pre: str | None) -> Described:
    """A network's tokenizer for a GGUF file.

    Args:
        text: With the tokenizer.
        pre: Name of the split, or None to recognise it.

    Raises:
        UnsupportedModelError: If there is none, or llama.cpp has none of its kind.
    """
    backend = getattr(text.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            "export.gguf: the network has no fast tokenizer (tokenizer.json) to write; set model.tokenizer=FOLDER, or "
            "export.gguf.vocabulary=none for programs that hand over token ids."
        )
    whole = json.loads(backend.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        raise UnsupportedModelError(
            f"export.gguf: the tokenizer is of type {model['type']}, and llama.cpp's decoders take byte-pair encodings; "
            "set export.gguf.vocabulary=none for programs that hand over token ids."
        )
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokens, types = _listed(whole, model, text.vocabulary)
    if not model.get("byte_fallback"):
        return Described(
            "gpt2", pre or _split_name(whole), tokens, types, (), tuple(" ".join(pair) for pair in merges), False
        )
    # SentencePiece joins the pair with the best score first: the order of the merges is all that matters of it.
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(pair), number)
    scores = tuple(-float(rank.get(token, len(merges))) for token in tokens)
    return Described("llama", pre or "default", tokens, types, scores, (), "▁" in _prepended(whole))


def write(writer: Any, told: Described, text: TextInput) -> None:
    """Put a tokenizer's keys into a GGUF writer."""
    writer.add_tokenizer_model(told.model)
    writer.add_tokenizer_pre(told.pre)
    writer.add_token_list(list(told.tokens))
    writer.add_token_types(list(told.types))
    if told.scores:
        writer.add_token_scores(list(told.scores))
        writer.add_add_space_prefix(told.space)
    if told.merges:
        writer.add_token_merges(list(told.merges))
    writer.add_vocab_size(len(told.tokens))
    tokenizer = text.tokenizer
    for role in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{role}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{role}_token_id")(int(number))
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _listed(whole: Mapping[str, Any], model: Mapping[str, Any], count: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Text and type of every id; ids that the network has and the tokenizer does not are called unused."""
    tokens = [f"[PAD{number}]" for number in range(count)]
    types = [_UNUSED] * count
    for token, number in model["vocab"].items():
        if number < count:
            tokens[number] = token
            byte = model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            types[number] = _BYTE if byte else _UNKNOWN if token == model.get("unk_token") else _NORMAL
    for added in whole.get("added_tokens") or ():
        number = added["id"]
        if number < count:
            tokens[number] = added["content"]
            unknown = added["content"] == model.get("unk_token")
            types[number] = _UNKNOWN if unknown else _CONTROL if added["special"] else _OWN
    return tuple(tokens), tuple(types)


def _split_name(whole: Mapping[str, Any]) -> str:
    found = tuple(_steps(whole.get("pre_tokenizer")))
    if found not in _SPLITS:
        raise UnsupportedModelError(
            f"export.gguf: how the tokenizer splits text ({', '.join(found)[:120] or 'not at all'}) has no name here; "
            "set export.gguf.pre=NAME to llama.cpp's name of it, such as llama-bpe, qwen2 or gpt-2."
        )
    return _SPLITS[found]


def _steps(node: Mapping[str, Any] | None) -> Sequence[str]:
    if node is None:
        return ()
    if node["type"] == "Sequence":
        return [step for one in node["pretokenizers"] for step in _steps(one)]
    if node["type"] == "Split":
        return [node["pattern"].get("Regex", node["pattern"].get("String", ""))]
    if node["type"] == "ByteLevel" and not node.get("use_regex", True):
        return ["bytes"]
    return [node["type"]]


def _prepended(whole: Mapping[str, Any]) -> str:
    """What is put in front of a text: by a normaliser in older tokenizers, by the splitter in newer ones."""
    said = json.dumps([whole.get("normalizer"), whole.get("pre_tokenizer")], ensure_ascii=False)
    return "▁" if '"Prepend"' in said or re.search(r'"prepend_scheme": "(first|always)"', said) else ""
