"""The calibration text: a file of any size, of which no more is tokenized than is run through the model."""

import codecs
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig

from vllm_puzzle.format import Calibration

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.shape import MoEShape
from ..checkpoints.source import SourceCheckpoint
from ..defaults import SEQUENCE_LENGTH
from ..errors import CheckpointError, reason_of
from ..wording import label

# How many tokens an expert sees on average where all fire alike. With fewer most experts see none or one, and are
# weighed by what little the others saw.
_LEAST_TOKENS_PER_EXPERT = 16

_BYTES_AT_ONCE = 1 << 20

# The first part, which shows how many characters a token has.
_CHARACTERS_AT_FIRST = 1 << 16

# A token depends on what follows it, as a word on its end, but not on what is this many tokens away.
_MARGIN = 64


@dataclass(frozen=True)
class CalibrationText:
    """What is read of a text: `token_ids`, int64 (num_sequences, sequence_length), and what to record about them.

    The record's checksum is that of the whole file.
    """

    token_ids: torch.Tensor
    record: Calibration


def read_calibration_text(
    path: Path, checkpoint: SourceCheckpoint, config: PretrainedConfig, max_sequences: int
) -> CalibrationText:
    """The first sequences of a UTF-8 text, each as long as the model allows up to SEQUENCE_LENGTH tokens.

    `config` is the text model's. Text shorter than one sequence is one shorter sequence.

    Raises:
        CheckpointError: the text cannot be read, has too few tokens for the model's experts (a whole sequence is always
            enough), or has a token that the model does not know; or there is no tokenizer.
    """
    sha256 = text_sha256(path)
    tokenizer = load_tokenizer(checkpoint.path)
    longest = min(SEQUENCE_LENGTH, config.max_position_embeddings)
    ids = first_tokens(path, tokenizer, max_sequences * longest)
    length = min(longest, len(ids))
    least = min(longest, _least_tokens(checkpoint.shape))
    if length < least:
        raise CheckpointError(
            f"calibration text {path} has {len(ids)} tokens, and a layer of {checkpoint.shape.num_experts} experts "
            f"needs at least {least}; give some pages of text, or convert without --calibration"
        )
    count = min(max_sequences, len(ids) // length)
    ids = ids[: count * length]
    embedding = f"{checkpoint.shape.layers.removesuffix('layers.')}embed_tokens.weight"
    largest, rows = int(ids.max()), _num_rows(checkpoint, embedding)
    if largest >= rows:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer reads {tokenizer.convert_ids_to_tokens(largest)!r} in {path} as token "
            f"{largest}, and {embedding} has rows for 0 to {rows - 1}; put the model's own tokenizer there"
        )
    record = Calibration(source=label(path), sha256=sha256, sequences=count, sequence_length=length)
    return CalibrationText(ids.reshape(count, length), record)


def _least_tokens(shape: MoEShape) -> int:
    return math.ceil(_LEAST_TOKENS_PER_EXPERT * shape.num_experts / shape.top_k)


def _num_rows(checkpoint: Checkpoint, embedding: str) -> int:
    info = checkpoint.tensors.get(embedding)
    if info is None or len(info.shape) != 2:
        raise CheckpointError(
            f"{checkpoint.path}: {embedding} is missing or no matrix, and calibration needs it; download the "
            f"checkpoint again"
        )
    return info.shape[0]


def text_sha256(path: Path) -> str:
    """The SHA-256 of a whole text file, in hexadecimal digits; the file is read a piece at a time.

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
