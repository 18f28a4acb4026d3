"""The calibration text: a file of any size, of which no more is tokenized than is run through the model."""

import codecs
import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..errors import CheckpointError, reason_of

_BYTES_AT_ONCE = 1 << 20

# The first part, which shows how many characters a token has.
_CHARACTERS_AT_FIRST = 1 << 16

# A token depends on what follows it, as a word on its end, but not on what is this many tokens away.
_MARGIN = 64


def text_sha256(path: Path) -> str:
    """Of the whole file, which is read a piece at a time.

    Raises:
        CheckpointError: it does not exist, cannot be read, or is not UTF-8, be it after all that calibration reads.
    """
    digest, decoder, offset = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with open(path, "rb") as file:
            while piece := file.read(_BYTES_AT_ONCE):
                digest.update(piece)
                _decode(decoder, piece, offset, path)
                offset += len(piece)
            _decode(decoder, b"", offset, path)
    except FileNotFoundError:
        raise CheckpointError(f"calibration text {path} does not exist; give a UTF-8 file or 'none'") from None
    except OSError as error:
        raise CheckpointError(f"calibration text {path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _decode(decoder: codecs.IncrementalDecoder, piece: bytes, offset: int, path: Path) -> None:
    held_back = len(decoder.getstate()[0])
    try:
        decoder.decode(piece, final=not piece)
    except UnicodeDecodeError as error:
        place = offset - held_back + error.start
        raise CheckpointError(
            f"calibration text {path} cannot be read as UTF-8: {error.reason} at byte {place}; convert it to UTF-8"
        ) from None


def load_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer of a checkpoint's folder; runs no remote code.

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # Every kind of tokenizer has code of its own, and a library that raises plain exceptions.
        raise CheckpointError(f"{directory} has no tokenizer that transformers can read: {reason_of(error)}") from None


def first_tokens(path: Path, tokenizer: Any, num_tokens: int) -> torch.Tensor:
    """The first `num_tokens` ids of a UTF-8 text, or all where it has fewer, int64 (n,).

    They are those that the whole text would begin with. What is read and tokenized grows with `num_tokens` and not with
    the file: a part of the text that turns out too short is replaced by a longer one.

    Raises:
        CheckpointError: the tokenizer fails on the text.
    """
    characters = _CHARACTERS_AT_FIRST
    while True:
        # Line ends as they are.
        with open(path, encoding="utf-8", newline="") as file:
            text, is_whole = file.read(characters), not file.read(1)
        try:
            ids: torch.Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        except Exception as error:
            raise CheckpointError(f"the checkpoint's tokenizer fails on {path}: {reason_of(error)}") from None
        if is_whole or len(ids) >= num_tokens + _MARGIN:
            return ids[:num_tokens].long()
        wanted = 1.1 * characters * (num_tokens + _MARGIN) / max(1, len(ids))
        characters = int(min(max(wanted, 2 * characters), 16 * characters))
