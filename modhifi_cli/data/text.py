"""Text as token windows: from text, JSON, JSONL and Parquet files or the hub, for calibration and for perplexity.

Calibration draws windows of one length with a seed; evaluation walks over the text from its beginning. Both say in
their protocol what they took, and carry the hash of the very tokens.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from modhifi_cli.data.sources import settings_group, sha256_of_samples
from modhifi_cli.errors import ConfigError, DataError, first_line, is_number, is_whole, package_missing
from modhifi_cli.records import Preprocess, TextInput

# Field names that hold a document's text, most specific first; several of a tuple are joined by a newline.
_FIELDS = (("text",), ("content",), ("instruction", "input", "output"), ("prompt", "completion"), ("document",))
_JOINT = "\n\n"  # between documents of one stream
_NOT_SCORED = -100
SEQUENCES, LENGTH = 128, 1024  # of a calibration set, and tokens of each, as in the paper
_OVERLAP = 32  # tokens in a row that two texts must share to count as overlapping


@dataclass(frozen=True)
class TokenWindows:
    """Windows of tokens that can be walked through any number of times; an `ImageSource` of token ids.

    Attributes:
        windows: Each ``[length]`` int64; all of one length for calibration.
        context: For each window, how many of its first tokens are context only and not scored (0: all but the first).
        protocol: As `ImageSource`; ``sha256`` is that of the tokens.
        text: How the text was read; it carries the tokenizer.
    """

    windows: Sequence[Tensor]
    context: Sequence[int]
    protocol: Mapping[str, Any]
    text: TextInput | None = None

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.windows)

    @property
    def longest(self) -> int:
        """Tokens of the longest window."""
        return max(len(window) for window in self.windows)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens ``[batch, length]`` int64 and labels of the same shape: the token itself, −100 where it is not scored.

        A batch holds windows of one length, so that nothing is padded.
        """
        start = 0
        while start < len(self.windows):
            stop = start + 1
            while stop < min(len(self.windows), start + batch_size) and len(self.windows[stop]) == len(
                self.windows[start]
            ):
                stop += 1
            tokens = torch.stack(list(self.windows[start:stop]))
            labels = tokens.clone()
            for row, skipped in enumerate(self.context[start:stop]):
                labels[row, : max(skipped, 1)] = _NOT_SCORED
            yield tokens, labels
            start = stop


def load(
    *,
    path: str | None = None,
    hub: Mapping[str, str] | None = None,
    field: str | None = None,
    separator: str | None = None,
    part: Sequence[float] | None = None,
    layout: str = "stream",
    sequences: int | None = SEQUENCES,
    length: int = LENGTH,
    stride: int | None = None,
    tokens: int | None = None,
    bos: bool | str = "auto",
    seed: int = 0,
    preprocess: Preprocess | TextInput,
    labelled: bool,
) -> TokenWindows:
    """Token windows of a text.

    One parameter for each key of the YAML, and for what every one of the kind is given.

    For calibration (``labelled=False``) windows are drawn: of one document without overlap, of several documents from
    a stream of them in a drawn order. For evaluation the stream is read from its beginning in its own order.

    Args:
        path: ``.txt`` (one document, or several with `separator`), ``.jsonl``, ``.json`` (a list) or ``.parquet`` file.
        hub: Instead of a file, arguments of `datasets.load_dataset`: ``{path: …, name: …, split: …}``.
        field: Name of the field that holds the text; None finds it (text, content, instruction + input + output …).
        separator: What stands between documents in a ``.txt`` file; None: it is one document.
        part: ``(begin, end)``, shares in [0, 1] of the source in its own order: only what lies between is looked at, so
            that one file can calibrate and test. Whole documents where there are several, else characters. Parts that do
            not overlap share no document.
        layout: ``"stream"`` joins documents by an empty line and cuts windows, ``"documents"`` takes one window from
            the beginning of every document, at most `length` tokens of it.
        sequences: How many windows; None takes all there are.
        length: Tokens of a window.
        stride: Tokens from the beginning of one window to that of the next; None is `length`, no overlap. With less,
            the tokens that were in the window before are context and not scored again.
        tokens: Look at the first so many tokens of the text only.
        bos: Whether every window begins with the token that begins a sequence, in place of one of its tokens;
            ``"auto"``: for documents if the tokenizer has one, never for a stream.
        seed: Of the draw.
        preprocess: The network's `TextInput`.
        labelled: Whether this is evaluation text.

    Raises:
        ConfigError: If a setting is out of range, or the network reads images.
        DataError: If the file cannot be read, holds no text, or less than was asked for.
    """
    place = settings_group(labelled=labelled)
    if not isinstance(preprocess, TextInput):
        raise ConfigError(f"{place}=text is for language models, and this network reads images; give {place}=folder.")
    if preprocess.tokenizer is None:
        raise DataError(f"{place}: the network has no tokenizer to read text with; set model.tokenizer=FOLDER.")
    _check(place, sequences, length, stride, tokens, layout, preprocess)
    documents, account = _documents(place, path, hub, field, separator)
    if part is not None:
        documents, account = _part(place, documents, account, part)
    return windows_of(
        documents, account, layout=layout, sequences=sequences, length=length, stride=stride, tokens=tokens, bos=bos,
        seed=seed, preprocess=preprocess, labelled=labelled,
    )  # fmt: skip


def windows_of(
    documents: Sequence[str],
    account: str,
    *,
    layout: str = "stream",
    sequences: int | None = SEQUENCES,
    length: int = LENGTH,
    stride: int | None = None,
    tokens: int | None = None,
    bos: bool | str = "auto",
    seed: int = 0,
    preprocess: TextInput,
    labelled: bool,
) -> TokenWindows:
    """Token windows of documents at hand, as `load` makes them of a file's.

    One parameter for each key of the YAML that does not say where the text comes from.

    Args:
        documents: Texts, none of them empty.
        account: What to call them.
        layout, sequences, length, stride, tokens, bos, seed, preprocess, labelled: As of `load`.

    Raises:
        ConfigError: If a setting is out of range.
        DataError: If they hold less than was asked for.
    """
    place = settings_group(labelled=labelled)
    _check(place, sequences, length, stride, tokens, layout, preprocess)
    with_bos = _with_bos(place, layout, bos, preprocess)
    generator = torch.Generator().manual_seed(seed)
    order = list(range(len(documents)))
    if not labelled and len(documents) > 1:
        order = torch.randperm(len(documents), generator=generator).tolist()
    own = length - with_bos
    stride = own if stride is None else stride
    if layout == "documents":
        windows, context, available = _of_documents(preprocess, documents, order, sequences, own, tokens)
    else:
        whole = labelled or len(documents) == 1
        enough = tokens if whole or sequences is None else sequences * own
        stream = _stream(preprocess, documents, order, enough if tokens is None or whole else min(enough, tokens))
        windows, context, available = _cut(stream, own, stride, keep_rest=labelled)
        if not labelled and len(documents) == 1 and sequences is not None:
            chosen = torch.randperm(available, generator=generator)[:sequences].tolist()
            windows, context = [windows[number] for number in chosen], [0] * len(chosen)
    if sequences is not None and len(windows) < sequences and not labelled:
        raise DataError(
            f"{place}: {account} gives {len(windows)} windows of {length} tokens, {sequences} were asked for; "
            f"lower {place}.sequences or {place}.length, or give more text."
        )
    windows, context = windows[:sequences], context[:sequences]
    if not windows:
        raise DataError(f"{place}: {account} holds less than one window of {length} tokens; lower {place}.length.")
    if with_bos:
        windows = [functional.pad(window, (1, 0), value=preprocess.bos) for window in windows]
        context = [skipped + 1 if skipped else 0 for skipped in context]
    digest = sha256_of_samples(window.numpy().tobytes() for window in windows)
    protocol = {
        "source": "text",
        "path": account,
        "layout": layout,
        "sequences": len(windows),
        "available": available,
        "length": length,
        "stride": stride,
        "bos": with_bos,
        "tokens": sum(len(window) for window in windows),
        "sha256": digest,
    }
    if not labelled:
        protocol |= {"seed": seed}
    return TokenWindows(windows, context, protocol, preprocess)


def _with_bos(place: str, layout: str, bos: bool | str, preprocess: TextInput) -> bool:
    """Whether windows begin with the token that begins a sequence."""
    wanted = layout == "documents" and preprocess.bos is not None if bos == "auto" else bool(bos)
    if wanted and preprocess.bos is None:
        raise ConfigError(f"{place}.bos=true: the tokenizer has no token that begins a sequence; set it to false.")
    return wanted


def of_tokens(tokens: Sequence[Tensor], *, preprocess: TextInput, most: int | None = None) -> TokenWindows:
    """Windows of ids that somebody has in memory already; every token but the first of a window is scored.

    Args:
        tokens: Windows ``[length]`` int64, or batches of them ``[windows, length]``.
        preprocess: The network's `TextInput`.
        most: Windows at most; None takes all. Those behind them are looked at, too.

    Raises:
        DataError: If there is no window of two tokens or more, or an id is not in the vocabulary.
    """
    windows = [row.detach().cpu().to(torch.int64) for batch in tokens for row in (batch if batch.dim() > 1 else [batch])]
    if not windows or min(map(len, windows)) < 2:
        raise DataError("batches: expected token ids [sequences, length] of two tokens or more, got none.")
    low, high = min(int(row.min()) for row in windows), max(int(row.max()) for row in windows)
    if low < 0 or high >= preprocess.vocabulary:
        raise DataError(
            f"batches: expected token ids from 0 to {preprocess.vocabulary - 1}, the network's vocabulary, got {low} to "
            f"{high}; make them with the network's own tokenizer."
        )
    windows = windows[:most]
    protocol = {
        "source": "tokens",
        "sequences": len(windows),
        "length": max(map(len, windows)),
        "tokens": sum(map(len, windows)),
        "sha256": sha256_of_samples(row.numpy().tobytes() for row in windows),
    }
    return TokenWindows(windows, [0] * len(windows), protocol, preprocess)


def overlap(calibration: TokenWindows, evaluation: TokenWindows) -> float:
    """Share of evaluation windows that hold 32 tokens in a row which calibration windows hold too, 0 … 1.

    Looked for at every eighth place of the evaluation text, so that a shared passage of 40 tokens is always found.
    """
    known = set()
    for window in calibration.windows:
        ids = window.tolist()
        known.update(tuple(ids[at : at + _OVERLAP]) for at in range(len(ids) - _OVERLAP + 1))
    shared = 0
    for window in evaluation.windows:
        ids = window.tolist()
        shared += any(tuple(ids[at : at + _OVERLAP]) in known for at in range(0, len(ids) - _OVERLAP + 1, 8))
    return shared / len(evaluation.windows)


def _check(
    place: str,
    sequences: int | None,
    length: int,
    stride: int | None,
    tokens: int | None,
    layout: str,
    text: TextInput,
) -> None:
    for key, value in (("sequences", sequences), ("length", length), ("stride", stride), ("tokens", tokens)):
        lowest = 2 if key == "length" else 1
        if value is None and key != "length":
            continue
        if not is_whole(value) or value < lowest:
            raise ConfigError(f"{place}.{key}: expected a whole number from {lowest}, got {value!r}.")
    if length > text.max_length:
        raise ConfigError(
            f"{place}.length={length}: the network was made for at most {text.max_length} tokens in a row; lower it."
        )
    if stride is not None and stride > length:
        raise ConfigError(f"{place}.stride={stride} skips text: it must be at most {place}.length={length}.")
    if layout not in ("stream", "documents"):
        raise ConfigError(f"{place}.layout must be stream or documents, got '{layout}'.")


def _documents(
    place: str, path: str | None, hub: Mapping[str, str] | None, field: str | None, separator: str | None
) -> tuple[list[str], str]:
    """All documents of a source, and what to call it."""
    if (path is None) == (hub is None):
        raise ConfigError(f"{place}: give either {place}.path=FILE or {place}.hub (a data set's name on the hub).")
    if hub is not None:
        rows, account = _from_hub(place, hub)
    else:
        file = Path(os.path.expanduser(str(path)))
        account = file.name
        if not file.is_file():
            raise DataError(f"{place}.path: no file at {file}; give a .txt, .jsonl, .json or .parquet file.")
        if file.suffix not in (".jsonl", ".json", ".parquet"):
            text = _read(place, file)
            pieces = [text] if separator is None else text.split(separator)
            found = [piece.strip() if separator is not None else piece for piece in pieces]
            return _not_empty(place, account, found), account
        rows = _rows(place, file)
    return _not_empty(place, account, _texts(place, account, rows, field)), account


def _part(place: str, documents: list[str], account: str, part: Sequence[float]) -> tuple[list[str], str]:
    """What lies between two shares of a source, and what to call it."""
    shares = list(part) if isinstance(part, Sequence) and not isinstance(part, str) else []
    if len(shares) != 2 or not all(map(is_number, shares)) or not 0 <= shares[0] < shares[1] <= 1:
        raise ConfigError(f"{place}.part: expected two shares of the text, [begin, end] with 0 <= begin < end <= 1, got {part!r}.")
    whole: Sequence[Any] = documents if len(documents) > 1 else documents[0]
    begin, end = (round(share * len(whole)) for share in shares)
    chosen = whole[begin:end]
    found = [chosen] if isinstance(chosen, str) else list(chosen)
    return _not_empty(place, f"{account} from {shares[0]:g} to {shares[1]:g}", found), f"{account} [{shares[0]:g}, {shares[1]:g}]"


def _read(place: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place}.path: {file} cannot be read as text ({error}); give UTF-8 text.") from error


def _rows(place: str, file: Path) -> list[Any]:
    if file.suffix == ".parquet":
        try:
            import pandas

            return pandas.read_parquet(file).to_dict("records")
        except Exception as error:  # pandas and pyarrow raise many types of their own
            raise DataError(f"{place}.path: {file} cannot be read as Parquet ({error}).") from error
    text = _read(place, file)
    try:
        if file.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise DataError(f"{place}.path: {file} is damaged, not JSON ({error}).") from error
    if not isinstance(rows, list):
        raise DataError(f"{place}.path: {file} holds {type(rows).__name__}, expected a list of documents.")
    return rows


def _texts(place: str, account: str, rows: Sequence[Any], field: str | None) -> list[str]:
    if rows and all(isinstance(row, str) for row in rows):
        return list(rows)
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise DataError(f"{place}: {account} holds no documents; expected strings, or objects with a text field.")
    choices = [(field,)] if field is not None else _FIELDS
    names = next((names for names in choices if all(names[0] in row for row in rows)), None)
    if names is None:
        raise DataError(
            f"{place}: the rows of {account} have the fields {', '.join(sorted(rows[0]))}, and none is known to hold "
            f"text; name it with {place}.field=NAME."
        )
    return ["\n".join(str(row[name]) for name in names if row.get(name)) for row in rows]


def _from_hub(place: str, hub: Mapping[str, str]) -> tuple[list[Any], str]:
    account = "/".join(str(part) for part in hub.values())
    try:
        import datasets
    except ImportError as error:
        raise package_missing(f"{place}: fetching {account} from the hub", "datasets") from error
    try:
        return list(datasets.load_dataset(**hub)), account
    except Exception as error:  # connection errors of several libraries, unknown names, damaged caches
        first = first_line(error, "no message")[:200]
        raise DataError(
            f"{place}.hub: {account} could not be fetched ({type(error).__name__}: {first}); connect to the network "
            f"once, or give a local file with {place}=text {place}.path=FILE."
        ) from error


def _not_empty(place: str, account: str, documents: Sequence[str]) -> list[str]:
    found = [document for document in documents if document]
    if not found:
        raise DataError(f"{place}: {account} holds no text.")
    return found


def _encode(text: TextInput, document: str) -> list[int]:
    # The tokenizer warns of texts above the network's length; they are cut into windows right here.
    return text.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]


def _stream(text: TextInput, documents: Sequence[str], order: Sequence[int], enough: int | None) -> Tensor:
    ids: list[int] = []
    for number in order:
        document = documents[number]
        ids += _encode(text, document if not ids else _JOINT + document)
        if enough is not None and len(ids) >= enough:
            break
    return torch.tensor(ids[:enough], dtype=torch.int64)


def _cut(stream: Tensor, length: int, stride: int, *, keep_rest: bool) -> tuple[list[Tensor], list[int], int]:
    """Windows of a stream, and for each how many tokens the window before it has scored already."""
    windows, context = [], []
    for start in range(0, len(stream), stride):
        window = stream[start : start + length]
        if len(window) < length and not (keep_rest and len(window) > (length - stride if start else 1)):
            break
        windows.append(window)
        context.append(length - stride if start else 0)
        if start + length >= len(stream):
            break
    return windows, context, len(windows)


def _of_documents(
    text: TextInput,
    documents: Sequence[str],
    order: Sequence[int],
    sequences: int | None,
    length: int,
    tokens: int | None,
) -> tuple[list[Tensor], list[int], int]:
    windows: list[Tensor] = []
    seen = 0
    for number in order:
        ids = torch.tensor(_encode(text, documents[number])[:length], dtype=torch.int64)
        if len(ids) > 1 and (tokens is None or seen + len(ids) <= tokens):
            windows.append(ids)
            seen += len(ids)
        if sequences is not None and len(windows) == sequences:
            break
    return windows, [0] * len(windows), len(documents)
