"""SQuAD: turning questions into model inputs.

It gives the features of `convert_examples_to_features` in the original's `run_squad.py`. Long
paragraphs are cut into overlapping windows. Each window, together with its question, is one row of
the model's inputs, called a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from finetune.errors import InputError
from finetune.tasks.squad_examples import SquadExample, SquadExamples
from finetune.text.tokenization import Tokenizer

# [CLS] question [SEP] window [SEP]
_NUM_SPECIAL_TOKENS = 3


@dataclass(frozen=True)
class SquadFeatures:
    """Model inputs for windows of paragraphs: n features of s positions, padded with [PAD].

    The features of a question are neighbours, in the order of their windows.

    Attributes:
        input_ids: int32 [n, s], `[CLS] question [SEP] window [SEP]`.
        input_mask: int32 [n, s], 1 for tokens, 0 for padding.
        segment_ids: int32 [n, s], 1 for the window and its [SEP].
        start_positions: int32 [n], position of the answer's first token. It is 0 if the answer is
            not wholly in the window, if there is none, or if the features are not for training.
        end_positions: int32 [n], position of the answer's last token, likewise.
        is_impossible: bool [n], the question has no answer; False if not for training.
        example_index: int32 [n], number of the question.
        doc_span_index: int32 [n], number of the window in its paragraph, from 0.
        token_to_orig: int32 [n, s], number of the paragraph's word at a position; -1 outside the
            window.
        token_is_max_context: bool [n, s], no other window has more context on both sides of the
            token at this position.
        num_tokens: int32 [n], number of positions before the padding.
        vocab_tokens: token of each id.
    """

    input_ids: NDArray[np.int32] = field(repr=False)
    input_mask: NDArray[np.int32] = field(repr=False)
    segment_ids: NDArray[np.int32] = field(repr=False)
    start_positions: NDArray[np.int32] = field(repr=False)
    end_positions: NDArray[np.int32] = field(repr=False)
    is_impossible: NDArray[np.bool_] = field(repr=False)
    example_index: NDArray[np.int32] = field(repr=False)
    doc_span_index: NDArray[np.int32] = field(repr=False)
    token_to_orig: NDArray[np.int32] = field(repr=False)
    token_is_max_context: NDArray[np.bool_] = field(repr=False)
    num_tokens: NDArray[np.int32] = field(repr=False)
    vocab_tokens: tuple[str, ...] = field(repr=False)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> SquadFeatures:
        """Make features from the result of `arrays`."""
        return cls(**arrays, vocab_tokens=_vocab_tokens(tokenizer))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name; each has a row for each feature."""
        names = [name.name for name in fields(self) if name.name != "vocab_tokens"]
        return {name: getattr(self, name) for name in names}

    def __len__(self) -> int:
        return len(self.input_ids)

    def tokens(self, index: int) -> list[str]:
        """Return the tokens of one feature, without padding."""
        ids = self.input_ids[index, : self.num_tokens[index]].tolist()
        return [self.vocab_tokens[i] for i in ids]


def featurize(
    examples: SquadExamples,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    doc_stride: int,
    max_query_length: int,
    is_training: bool,
) -> SquadFeatures:
    """Cut every paragraph into windows and join each window with the question.

    Example:
        >>> features = featurize(
        ...     examples, tokenizer, max_seq_length=384, doc_stride=128, max_query_length=64,
        ...     is_training=True,
        ... )
        >>> features.input_ids.shape
        (88641, 384)

    Args:
        examples: questions, read with the same `is_training`.
        tokenizer: tokenizer of the model.
        max_seq_length: positions of a feature (s), in tokens.
        doc_stride: tokens from the start of a window to the start of the next. If fewer fit into a
            window, the next window begins where it ends, so that no token is left out.
        max_query_length: longer questions are cut to this number of tokens.
        is_training: fill in the positions of the answers.

    Returns:
        The features; none for a question whose paragraph has no tokens.

    Raises:
        InputError: the lengths contradict each other.
    """
    parts = feature_parts(
        examples,
        tokenizer,
        max_seq_length=max_seq_length,
        doc_stride=doc_stride,
        max_query_length=max_query_length,
        is_training=is_training,
        rows=None,
    )
    return next(parts)


def feature_parts(
    examples: SquadExamples,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    doc_stride: int,
    max_query_length: int,
    is_training: bool,
    rows: int | None = 2048,
) -> Iterator[SquadFeatures]:
    """Make the features of `featurize` part by part, so that memory does not grow with the file.

    Args:
        examples: see `featurize`.
        tokenizer: see `featurize`.
        max_seq_length: see `featurize`.
        doc_stride: see `featurize`.
        max_query_length: see `featurize`.
        is_training: see `featurize`.
        rows: most features of a part; a single question may have more. None makes one part.

    Yields:
        Features in order; `example_index` goes on from part to part. At least one part, empty if
        there are no features.

    Raises:
        InputError: the lengths contradict each other.
    """
    _check_lengths(max_seq_length, doc_stride, max_query_length)
    docs = _tokenize_paragraphs(examples, tokenizer)
    queries = _encode_distinct((e.question for e in examples), tokenizer)
    answers = _encode_distinct((e.answer_text for e in examples if e.answer_words), tokenizer)

    def windows_of(example: SquadExample) -> _Windows:
        query_length = min(len(queries[example.question]), max_query_length)
        room = max_seq_length - query_length - _NUM_SPECIAL_TOKENS
        return _doc_windows(len(docs[id(example.paragraph)].ids), room, doc_stride)

    def question_of(example: SquadExample) -> _Question:
        doc = docs[id(example.paragraph)]
        answer = None
        if is_training and not example.is_impossible:
            answer = _answer_tokens(example, doc, answers)
        query = queries[example.question][:max_query_length]
        return _Question(query, doc, windows_of(example), answer)

    def part(first: int, last: int, n: int) -> SquadFeatures:
        features = _empty_features(n, max_seq_length, tokenizer)
        row = 0
        for index in range(first, last):
            end = _fill(features, row, index, question_of(examples[index]), tokenizer)
            features.is_impossible[row:end] = is_training and examples[index].is_impossible
            row = end
        return features

    first, n = 0, 0
    for index, example in enumerate(examples):
        count = len(windows_of(example).starts)
        if rows is not None and n and n + count > rows:
            yield part(first, index, n)
            first, n = index, 0
        n += count
    yield part(first, len(examples), n)


def _fill(
    features: SquadFeatures, row: int, index: int, question: _Question, tokenizer: Tokenizer
) -> int:
    """Write the windows of question number `index` from a row on; return the row after them."""
    windows, answer, doc = question.windows, question.answer, question.doc
    prefix = np.array([tokenizer.cls_id, *question.query, tokenizer.sep_id], np.int32)
    offset = len(prefix)
    for span_index, (start, length) in enumerate(zip(windows.starts, windows.lengths, strict=True)):
        window = slice(start, start + length)
        end = offset + length
        features.input_ids[row, :offset] = prefix
        features.input_ids[row, offset:end] = doc.ids[window]
        features.input_ids[row, end] = tokenizer.sep_id
        features.input_mask[row, : end + 1] = 1
        features.segment_ids[row, offset : end + 1] = 1
        features.token_to_orig[row, offset:end] = doc.token_to_word[window]
        features.token_is_max_context[row, offset:end] = windows.best_window[window] == span_index
        features.num_tokens[row] = end + 1
        features.example_index[row] = index
        features.doc_span_index[row] = span_index
        if answer is not None and start <= answer[0] and answer[1] < start + length:
            features.start_positions[row] = answer[0] - start + offset
            features.end_positions[row] = answer[1] - start + offset
        row += 1
    return row


@dataclass(frozen=True)
class _TokenizedDoc:
    """A paragraph of w words and t tokens: `first_token` has w + 1 entries, the last is t."""

    ids: NDArray[np.int32]  # [t]
    token_to_word: NDArray[np.int32]  # [t]
    first_token: NDArray[np.int32]  # [w + 1]


@dataclass(frozen=True)
class _Windows:
    """The windows of a paragraph, and for each token the window with the most context."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    best_window: NDArray[np.intp]  # [t]


@dataclass(frozen=True)
class _Question:
    """A question in tokens; `answer` is its first and last token in the paragraph, if known."""

    query: list[int]
    doc: _TokenizedDoc
    windows: _Windows
    answer: tuple[int, int] | None


@lru_cache(maxsize=4096)
def _doc_windows(num_tokens: int, room: int, doc_stride: int) -> _Windows:
    """Cut a paragraph into windows of `room` tokens; the last one may be shorter."""
    starts = [0] if num_tokens else []
    while starts and starts[-1] + room < num_tokens:
        starts.append(starts[-1] + min(room, doc_stride))
    lengths = [min(room, num_tokens - start) for start in starts]
    best = np.zeros(num_tokens, np.intp)
    best_score = np.full(num_tokens, -1.0)
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        inside = np.arange(length)
        # The context of a token is the smaller of its two sides, and a little more in a longer
        # window. Of equal windows the first one counts. The score is a floating-point number, as in
        # the original, whose rounding decides between some equal windows.
        score = np.minimum(inside, inside[::-1]) + 0.01 * length
        window = slice(start, start + length)
        better = score > best_score[window]
        best[window][better] = index
        best_score[window][better] = score[better]
    return _Windows(tuple(starts), tuple(lengths), best)


def _answer_tokens(
    example: SquadExample, doc: _TokenizedDoc, answers: dict[str, list[int]]
) -> tuple[int, int]:
    """Return first and last token of the training answer in its paragraph.

    The answer's words often hold more than the answer ("(1895-1943)." for "1895"). So the first
    sequence of their tokens that spells the answer is taken, if there is one.
    """
    if example.answer_words is None:
        raise ValueError(f"question {example.qas_id} was not read with is_training=True")
    first_word, last_word = example.answer_words
    first = int(doc.first_token[first_word])
    last = int(doc.first_token[last_word + 1]) - 1
    wanted = answers[example.answer_text]
    found = doc.ids[first : last + 1].tolist()
    if wanted:
        for shift in range(len(found) - len(wanted) + 1):
            if found[shift : shift + len(wanted)] == wanted:
                return first + shift, first + shift + len(wanted) - 1
    return first, last


def _tokenize_paragraphs(examples: SquadExamples, tokenizer: Tokenizer) -> dict[int, _TokenizedDoc]:
    """Tokenize each paragraph once and each distinct word once; keyed by `id(paragraph)`."""
    paragraphs = {id(example.paragraph): example.paragraph for example in examples}
    pieces = _encode_distinct(
        (word for paragraph in paragraphs.values() for word in paragraph.doc_tokens), tokenizer
    )
    docs = {}
    for key, paragraph in paragraphs.items():
        words = [pieces[word] for word in paragraph.doc_tokens]
        counts = np.array([len(word) for word in words], np.int32)
        docs[key] = _TokenizedDoc(
            ids=np.array([piece for word in words for piece in word], np.int32),
            token_to_word=np.repeat(np.arange(len(words), dtype=np.int32), counts),
            first_token=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        )
    return docs


def _encode_distinct(texts: Iterable[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))


def _vocab_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    tokens = [""] * tokenizer.vocab_size
    for token, token_id in tokenizer.vocab.items():
        tokens[token_id] = token
    return tuple(tokens)


def _empty_features(n: int, max_seq_length: int, tokenizer: Tokenizer) -> SquadFeatures:
    shape = (n, max_seq_length)
    return SquadFeatures(
        input_ids=np.full(shape, tokenizer.pad_id, np.int32),
        input_mask=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        start_positions=np.zeros(n, np.int32),
        end_positions=np.zeros(n, np.int32),
        is_impossible=np.zeros(n, np.bool_),
        example_index=np.zeros(n, np.int32),
        doc_span_index=np.zeros(n, np.int32),
        token_to_orig=np.full(shape, -1, np.int32),
        token_is_max_context=np.zeros(shape, np.bool_),
        num_tokens=np.zeros(n, np.int32),
        vocab_tokens=_vocab_tokens(tokenizer),
    )


def _check_lengths(max_seq_length: int, doc_stride: int, max_query_length: int) -> None:
    if max_query_length < 0 or doc_stride < 1:
        raise InputError(
            f"doc_stride {doc_stride} or max_query_length {max_query_length} is too small",
            hint="use a positive doc_stride (the original's is 128) and max_query_length (64)",
        )
    room = max_seq_length - max_query_length - _NUM_SPECIAL_TOKENS
    if room < 1:
        raise InputError(
            f"max_seq_length {max_seq_length} leaves no room for the paragraph beside"
            f" max_query_length {max_query_length} and {_NUM_SPECIAL_TOKENS} special tokens",
            hint="raise max_seq_length or lower max_query_length",
        )
