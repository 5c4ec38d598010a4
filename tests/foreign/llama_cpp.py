"""An unmodified llama.cpp by ctypes: logits of token ids, and what its tokenizer makes of a text.

The folder with ``libllama*.so`` is named by MODHIFI_LLAMA_CPP; ``bash scripts/fetch.sh llama_cpp FOLDER`` makes it.
"""

import ctypes
import functools
import os
from pathlib import Path

import numpy
import pytest

_REASON = "no llama.cpp: bash scripts/fetch.sh llama_cpp FOLDER, then MODHIFI_LLAMA_CPP=FOLDER"


class _Opaque(ctypes.Structure):
    """Parameters as the library gives them: passed on by value, and longer than they are in any version."""

    _fields_ = [("start", ctypes.c_uint32 * 4), ("rest", ctypes.c_uint64 * 62)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


@functools.cache
def _library():
    folder = Path(os.environ.get("MODHIFI_LLAMA_CPP", "none"))
    found = sorted(file for file in folder.glob("libllama*.so*") if "common" not in file.name)
    if not found:
        return None
    ggml = ctypes.CDLL(str(next(file for file in folder.glob("libggml.*so*"))), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    lib = ctypes.CDLL(str(found[0]))
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    lib.llama_log_set(silent, None)
    lib.silent = silent  # kept alive as long as the library
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
    for name, result, given in (
        ("llama_model_default_params", _Opaque, []),
        ("llama_context_default_params", _Opaque, []),
        ("llama_model_load_from_file", pointer, [text, _Opaque]),
        ("llama_init_from_model", pointer, [pointer, _Opaque]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_batch_init", _Batch, [number, number, number]),
        ("llama_batch_free", None, [_Batch]),
        ("llama_decode", number, [pointer, _Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_set_n_threads", None, [pointer, number, number]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("llama_tokenize", number, [pointer, text, number, pointer, number, ctypes.c_bool, ctypes.c_bool]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, given
    lib.llama_backend_init()
    return lib


def required():
    """The library; the test is skipped with the reason where it is absent."""
    if _library() is None:
        pytest.skip(_REASON)
    return _library()


class Llama:
    """One GGUF file in llama.cpp, on the CPU."""

    def __init__(self, path: Path, *, length: int = 512, threads: int = 1) -> None:
        self._lib = lib = required()
        model = lib.llama_model_default_params()
        self._model = lib.llama_model_load_from_file(str(path).encode(), model)
        if not self._model:
            raise ValueError(f"llama.cpp refuses {path}")
        context = lib.llama_context_default_params()
        context.start[0] = context.start[1] = context.start[2] = length  # n_ctx, n_batch, n_ubatch
        self._context = lib.llama_init_from_model(self._model, context)
        assert self._context, "llama.cpp makes no context"
        lib.llama_set_n_threads(self._context, threads, threads)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocabulary = lib.llama_vocab_n_tokens(self._vocab)

    def logits(self, tokens: list[int]) -> numpy.ndarray:
        """Logits behind every token, ``[tokens, vocabulary]``."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return self._decode(tokens, 0)

    def follow(self, tokens: list[int], count: int) -> list[int]:
        """The greedy continuation of `count` tokens, one after another with the cache."""
        token, said = int(self.logits(tokens)[-1].argmax()), []
        for number in range(count):
            said.append(token)
            if number < count - 1:
                token = int(self._decode([token], len(tokens) + number)[0].argmax())
        return said

    def _decode(self, tokens: list[int], start: int) -> numpy.ndarray:
        lib = self._lib
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, start + place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        assert lib.llama_decode(self._context, batch) == 0, "llama.cpp cannot decode"
        found = numpy.ctypeslib.as_array(lib.llama_get_logits(self._context), (len(tokens), self.vocabulary)).copy()
        lib.llama_batch_free(batch)
        return found

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, with what the file says about its beginning."""
        room = (ctypes.c_int32 * (len(text.encode()) + 8))()
        raw = text.encode()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), room, len(room), True, False)
        return list(room[:count])

    def close(self) -> None:
        """Give the memory back."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
