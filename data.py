"""Text and tasks: corpora, tokenizers, language modelling, test sets; and the door to every synthetic task.

    text = data.LanguageModel(data.corpus("offline"), data.tokenizer("bytes"), seq_len=128)
    needles = data.MultiNeedle(seq_len=128, vocab_size=256, n_needles=5)        # from needles.py
    batch = needles.sample(64, torch.Generator().manual_seed(0))                # data.Batch
    test = data.test_set(needles, 1000, exclude=batch)                          # no row of it is in `batch`

Names of tasks.py, needles.py, ruler.py, addition.py and cyclic.py are looked up when used rather than copied here, so
that a module edited in a running notebook is seen through `data` too.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import gc
import hashlib
import itertools
import math
import pathlib
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import addition
import cyclic
import needles
import ruler
import tasks

_DOOR = {
    **dict.fromkeys(("Batch", "Task", "RecallTask", "Echo", "MQAR", "Bigrams", "Mixture", "IGNORE"), tasks),
    **dict.fromkeys(("NeedleTask", "SingleNeedle", "MultiNeedle", "SharedMarkerNeedles", "SlotNeedles"), needles),
    **dict.fromkeys(("PassKey", "MultiValue", "VariableTracking", "CommonWords"), ruler),
    "Addition": addition,
    "CyclicWords": cyclic,
}


def __getattr__(name: str):
    if name in _DOOR:
        return getattr(_DOOR[name], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_DOOR])


# ------------------------------------------------------------------------------------------------ corpora


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text in documents. Two corpora are equal when their documents are.

    `max_bytes` and `separator` are the options it was loaded with, so that a saved run can load it again.
    """

    name: str
    documents: tuple[str, ...] = dataclasses.field(repr=False)
    max_bytes: int | None = None
    separator: str | None = None

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the documents in order, 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for document in self.documents:
            encoded = document.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()

    @functools.cached_property
    def n_bytes(self) -> int:
        """Size in UTF-8."""
        return sum(len(document.encode()) for document in self.documents)

    def __eq__(self, other) -> bool:
        return isinstance(other, Corpus) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __str__(self) -> str:
        return (
            f"corpus {self.name}: {len(self.documents):,} documents, {self.n_bytes:,} bytes, sha256 {self.sha256[:12]}"
        )

    def to_dict(self) -> dict:
        """Where the text came from and its hash, not the text."""
        return {
            "name": self.name, "max_bytes": self.max_bytes, "separator": self.separator, "sha256": self.sha256
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict) -> Corpus:
        """Load the corpus again. ValueError when its text is no longer the same."""
        known = {"name", "max_bytes", "separator", "sha256"}
        if set(values) != known:
            raise ValueError(f"corpus: needs the keys {sorted(known)}, got {sorted(values)}")
        loaded = corpus(values["name"], max_bytes=values["max_bytes"], separator=values["separator"], quiet=True)
        if loaded.sha256 != values["sha256"]:
            was, now = values["sha256"][:12], loaded.sha256[:12]
            raise ValueError(f"corpus = {values['name']!r}: its text has changed, sha256 was {was} and is {now}")
        return loaded

    def split(self, *, validation_share: float = 0.1, seed: int = 0) -> tuple[Corpus, Corpus]:
        """(train, validation), whole documents each: no window of one side neighbours a window of the other.

        Documents are drawn for validation in an order shuffled by `seed` until they hold `validation_share` of the
        bytes; at least one document stays on each side. ValueError when there is only one document.
        """
        if not 0 < validation_share < 1:
            raise ValueError(f"validation_share = {validation_share!r}: needs a share between 0 and 1")
        if len(self.documents) < 2:
            why = "one document cannot be split; give a folder of documents, or a separator that divides the text"
            raise ValueError(f"corpus = {self.name!r}: {why}")
        order = torch.randperm(len(self.documents), generator=torch.Generator().manual_seed(seed)).tolist()
        wanted, held, held_out = validation_share * self.n_bytes, 0, set()
        for i in order[:-1]:
            if held >= wanted:
                break
            held_out.add(i)
            held += len(self.documents[i].encode())
        sides = [[], []]
        for i, document in enumerate(self.documents):
            sides[i in held_out].append(document)
        train, validation = (Corpus(f"{self.name}[{side}]", tuple(d)) for side, d in zip(SPLITS, sides, strict=False))
        return train, validation


SPLITS = ("train", "validation", "all")


def corpus(name, *, max_bytes: int | None = None, separator: str | None = None, quiet: bool = False) -> Corpus:
    """Load text and print what was loaded: documents, size and hash. Nothing is ever substituted for what was asked.

    name: "wikitext-103" or "pile" (streamed from the Hugging Face hub; `max_bytes` bounds the download), "offline" (the
        running Python's own documentation and docstrings, a document a module, about 2 MB of English, no download),
        "packages" (the docstrings of the packages installed beside this Python, a document a package, no download; with
        requirements.txt about 40 MB of technical English, read in half a minute; other packages or versions are another
        text, which the hash printed tells), or the path of a text file (one document) or of a folder (each .txt file in
        it, by name, one document).
    max_bytes: keep whole documents until so many bytes are reached.
    separator: divide every text at this string into documents of their own, for a file that holds several.
    Raises OSError when the text cannot be reached and ValueError when there is no text in it.
    """
    if max_bytes is not None and (not isinstance(max_bytes, int) or max_bytes < 1):
        raise ValueError(f"max_bytes = {max_bytes!r}: needs a number of bytes of at least 1, or None for everything")
    if separator == "":
        raise ValueError("separator = '': needs a string to divide the text at, or None")
    name = str(name)
    readers = {"wikitext-103": _wikitext, "pile": _pile, "offline": _offline, "packages": _packages}
    texts = readers[name]() if name in readers else _files(pathlib.Path(name))
    documents, size = [], 0
    for text in texts:
        for document in text.split(separator) if separator else [text]:
            if document.strip():
                documents.append(document)
                size += len(document.encode())
        if max_bytes is not None and size >= max_bytes:
            break
    if not documents:
        raise ValueError(f"corpus = {name!r}: there is no text in it")
    loaded = Corpus(name, tuple(documents), max_bytes=max_bytes, separator=separator)
    if not quiet:
        print(loaded)
    return loaded


def _hub(dataset: str, *config_name: str) -> Iterator[str]:
    """The "text" of every row of a hub data set's training split, streamed."""
    import datasets  # slow to import, and only needed here

    try:
        for row in datasets.load_dataset(dataset, *config_name, split="train", streaming=True):
            yield row["text"]
    except Exception as error:  # the hub client's own errors are of many kinds, not all of them OSError
        instead = "'offline', 'packages' or the path of a text file or folder"
        why = f"the Hugging Face hub did not give it; without a network use {instead}"
        raise OSError(f"corpus: {dataset} cannot be reached ({type(error).__name__}: {error}); {why}") from error


def _wikitext() -> Iterator[str]:
    """WikiText-103 (raw) comes a line a row; an article begins at a heading of level one, ` = Title = `."""
    title, article = re.compile(r"^ = [^=].*[^=] = \n?$"), []
    for line in _hub("Salesforce/wikitext", "wikitext-103-raw-v1"):
        if title.match(line) and article:
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


def _pile() -> Iterator[str]:
    return _hub("EleutherAI/the_pile_deduplicated")


def _files(path: pathlib.Path) -> Iterator[str]:
    if path.is_dir():
        found = sorted(path.glob("*.txt"))
        if not found:
            raise ValueError(f"corpus = {str(path)!r}: the folder holds no .txt file; put one document in each")
    elif path.is_file():
        found = [path]
    else:
        choices = "'wikitext-103', 'pile', 'offline', 'packages', or the path of a text file or folder"
        why = f"no such file or folder; choose {choices}"
        raise FileNotFoundError(f"corpus = {str(path)!r}: {why}")
    for file in found:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"corpus = {str(file)!r}: not UTF-8 text ({error.reason} at byte {error.start})"
            ) from error


# Folders of a library that hold tests, tables of one and the same sentence, or other people's packages. Copies of other
# packages are often of another version: their docstrings would stand on both sides of a split in nearly the same words.
_NOT_LIBRARY = {
    "site-packages", "dist-packages", "test", "tests", "encodings", "idlelib", "lib2to3", "ensurepip", "__pycache__",
    "_vendor", "_vendored",
}  # fmt: skip


def _offline() -> Iterator[str]:
    """The documentation topics of `help()`, then each standard library module's docstrings; read, never imported."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in root.rglob("*.py") if not _NOT_LIBRARY.intersection(p.relative_to(root).parts[:-1])]
    if not files:
        version = platform.python_version()
        raise OSError(f"corpus = 'offline': Python {version} has no library sources in {root}; give the path of a text")
    for file in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        tree = _parse(file)
        if tree is None:
            continue
        if file.parent.name == "pydoc_data" and file.name == "topics.py":
            yield from _topics(tree)
        else:
            yield _docstrings(tree)


# Characters in a document of `_packages`. With less, a package is hardly more than its name; with more, it is divided.
_SMALLEST, _LARGEST = 2_000, 1_000_000


def _packages() -> Iterator[str]:
    """The docstrings of the packages in this Python's site-packages, by name; read, never imported.

    A document is one top-level package or module, because a package repeats its own phrases and validation should hold
    none that training has read. One with more than a million characters would be too large a share of the text to stand
    on one side, so each of its sub-packages is a document (torch/nn with all below it) and the modules that lie in it
    directly are one more. Documents with less than 2,000 characters are left out, and so is a docstring that has been
    read before, word for word, in whatever package: subclasses often copy theirs.
    """
    paths = sysconfig.get_paths()
    roots = list(dict.fromkeys(pathlib.Path(paths[kind]) for kind in ("purelib", "platlib")))
    files = {}  # by the path below its root, so that one folder under two names is read once
    for root in roots:
        for file in root.rglob("*.py"):
            parts = file.relative_to(root).parts
            # What no import statement can name is no package: *.dist-info, *-stubs, the ~remains of an upgrade.
            named = parts[0].removesuffix(".py").isidentifier()
            if named and not _NOT_LIBRARY.intersection(parts[:-1]) and file.is_file():
                files[parts] = file
    if not files:
        where = " or ".join(map(str, roots))
        why = f"Python {platform.python_version()} has no packages in {where}; give the path of a text"
        raise OSError(f"corpus = 'packages': {why}")
    seen: set[str] = set()
    for _, package in itertools.groupby(sorted(files), key=lambda parts: parts[0]):
        texts = {parts: _docstrings(tree, seen) for parts in package if (tree := _parse(files[parts]))}
        depth = 2 if sum(map(len, texts.values())) > _LARGEST else 1
        documents: dict[tuple[str, ...], list[str]] = {}
        for parts, text in texts.items():
            if text:
                documents.setdefault(parts[:-1][:depth], []).append(text)
        for document in map("\n".join, documents.values()):
            if len(document) >= _SMALLEST:
                # An escape in a docstring can name half a surrogate pair, which UTF-8 has no bytes for: it becomes "?".
                yield document.encode(errors="replace").decode()


def _parse(file: pathlib.Path) -> ast.Module | None:
    """Syntax tree, or None for a library's few files that are broken on purpose or in an old encoding."""
    collecting = gc.isenabled()
    gc.disable()  # a tree is thousands of objects and no cycle: looking for cycles in it takes longer than parsing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in library sources are none of our business
            return ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # ValueError: no UTF-8, or in the first releases of Python 3.11 a null byte
        return None
    finally:
        if collecting:
            gc.enable()


def _topics(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for value in node.value.values:
                yield ast.literal_eval(value)


# Where a statement may hold definitions; expressions hold none.
_BODIES = ("body", "handlers", "orelse", "finalbody", "cases")


def _docstrings(tree: ast.Module, seen: set[str] | None = None) -> str:
    """Docstrings of a module, its classes and functions, in the order of the source, each under its name.

    seen: docstrings to leave out; those of this module are added to it.
    """
    parts = []

    def visit(node: ast.AST, name: str) -> None:
        text = ast.get_docstring(node)
        if text and (seen is None or text not in seen):
            parts.append(f"{name}\n{text}\n" if name else f"{text}\n")
            if seen is not None:
                seen.add(text)
        pending = list(node.body)
        while pending:
            child = pending.pop(0)
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"{name}.{child.name}" if name else child.name)
            else:
                pending[:0] = [inner for field in _BODIES for inner in getattr(child, field, [])]

    visit(tree, "")
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------------ tokenizers

PROBE = "The quick brown fox jumps over 13 lazy dogs."
END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; documents are joined by a newline."""

    name: str = "bytes"
    vocab_size = 256
    end_of_text = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. ValueError for an id of 256 or more."""
        return bytes(_ids(ids, self.vocab_size)).decode(errors="replace")

    def encode_documents(self, documents: Iterable[str]) -> Tensor:
        """int32 [tokens]: all documents in one stream."""
        return torch.from_numpy(np.frombuffer("\n".join(documents).encode(), dtype=np.uint8).astype(np.int32))

    def to_dict(self) -> dict:
        return {"name": self.name, "sha256": None}


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer of the `tokenizers` library. Documents are joined by its end-of-text id, or by a newline without one.

    vocab_size: the highest id + 1, tokens added after training included. Counting tokens gives less where ids have
        gaps, and less again without the added ones.
    """

    name: str
    sha256: str
    vocab_size: int
    end_of_text: int | None
    backend: Any = dataclasses.field(repr=False, compare=False)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        """Text of `ids`. ValueError for an id outside the vocabulary."""
        return self.backend.decode(_ids(ids, self.vocab_size), skip_special_tokens=False)

    def encode_documents(self, documents: Iterable[str]) -> Tensor:
        """int32 [tokens]: all documents in one stream."""
        between = self.encode("\n") if self.end_of_text is None else [self.end_of_text]
        pieces = []
        for encoding in self.backend.encode_batch_fast(list(documents), add_special_tokens=False):
            pieces += [np.asarray(encoding.ids, dtype=np.int32), np.asarray(between, dtype=np.int32)]
        return torch.from_numpy(np.concatenate(pieces[:-1]))

    def to_dict(self) -> dict:
        return {"name": self.name, "sha256": self.sha256}


def _ids(ids, vocab_size: int) -> list[int]:
    ids = ids.flatten().tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"ids: {wrong} is outside the tokenizer's vocabulary of {vocab_size}")
    return ids


def tokenizer(name) -> ByteTokenizer | TextTokenizer:
    """A tokenizer: "bytes", the path of a tokenizer.json, or the name of a model on the Hugging Face hub.

    It must give back a plain English sentence that it has encoded (case and spacing apart), because some loaders build
    a tokenizer that knows one token and say nothing. Raises OSError when it cannot be reached, ValueError when it is
    corrupt or loses text.
    """
    name = str(name)
    if name == "bytes":
        return ByteTokenizer()
    if name.endswith(".json") or pathlib.Path(name).exists():
        backend = _tokenizer_file(pathlib.Path(name))
    else:
        backend = _tokenizer_hub(name)
    # A tokenizer.json may ask for padding or truncation; a text must come back whole.
    backend.no_padding()
    backend.no_truncation()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    end_of_text = next((vocabulary[token] for token in END_OF_TEXT if token in vocabulary), None)
    sha256 = hashlib.sha256(backend.to_str().encode()).hexdigest()
    loaded = TextTokenizer(name, sha256, max(vocabulary.values(), default=-1) + 1, end_of_text, backend)
    _require_round_trip(loaded)
    return loaded


def _tokenizer_file(path: pathlib.Path):
    import tokenizers

    if not path.is_file():
        raise FileNotFoundError(f"tokenizer = {str(path)!r}: no such tokenizer.json; 'bytes' needs no file")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise ValueError(
            f"tokenizer = {str(path)!r}: not a tokenizer.json of the tokenizers library ({error})"
        ) from error


def _tokenizer_hub(name: str):
    import transformers  # slow to import, and only needed here

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub client's own errors are of many kinds, not all of them OSError
        why = "the Hugging Face hub did not give it; use 'bytes' or the path of a tokenizer.json"
        raise OSError(f"tokenizer = {name!r}: {why} ({type(error).__name__}: {error})") from error
    if not getattr(loaded, "is_fast", False):
        raise ValueError(
            f"tokenizer = {name!r}: has no form for the tokenizers library; choose one with a tokenizer.json"
        )
    return loaded.backend_tokenizer


def _require_round_trip(loaded: TextTokenizer) -> None:
    def plain(text):
        return "".join(text.split()).casefold()

    back = loaded.decode(loaded.encode(PROBE))
    if plain(back) != plain(PROBE):
        why = f"with {loaded.vocab_size} ids it turns {PROBE!r} into {back!r}, so it loses text; check its files"
        raise ValueError(f"tokenizer = {loaded.name!r}: {why}")


# ------------------------------------------------------------------------------------------------ language modelling


@functools.lru_cache(maxsize=8)
def _stream(text: Corpus, coder, split: str, validation_share: float, seed: int) -> Tensor:
    """int32 [tokens] of one side of a corpus; shared by tasks that differ in length only."""
    if split != "all":
        text = text.split(validation_share=validation_share, seed=seed)[SPLITS.index(split)]
    return coder.encode_documents(text.documents)


@dataclass(frozen=True)
class LanguageModel(tasks.Task):
    """Predict every next token of real text.

    Rows are windows of seq_len + 1 tokens at uniformly random places of one side of the corpus, its documents joined in
    order; sides are divided by document. `floor` and `ceiling` are nan: nobody knows the entropy of real text. `chance`
    is a uniform guess over the vocabulary. There is no oracle.

    vocab_size: None means the tokenizer's. A larger one leaves ids free, for the markers of a task trained beside it.
    """

    corpus: Corpus
    tokenizer: ByteTokenizer | TextTokenizer = ByteTokenizer()
    seq_len: int = 128
    split: str = "train"  # train | validation | all (no division, for a haystack or a text of one document)
    validation_share: float = 0.1
    split_seed: int = 0
    vocab_size: int | None = None

    floor = math.nan
    ceiling = math.nan

    def __post_init__(self):
        if self.vocab_size is None:
            object.__setattr__(self, "vocab_size", getattr(self.tokenizer, "vocab_size", None))
        super().__post_init__()

    def validate(self):
        self.require(isinstance(self.corpus, Corpus), "corpus", "needs what data.corpus(...) returns")
        known = isinstance(self.tokenizer, (ByteTokenizer, TextTokenizer))
        self.require(known, "tokenizer", "needs what data.tokenizer(...) returns")
        self.require_positive("seq_len", "vocab_size")
        self.require_choice("split", SPLITS)
        self.require(0 < self.validation_share < 1, "validation_share", "needs a share between 0 and 1")
        why = f"needs at least the {self.tokenizer.vocab_size} ids of the tokenizer {self.tokenizer.name!r}"
        self.require(self.vocab_size >= self.tokenizer.vocab_size, "vocab_size", why)
        size = len(self.stream)
        why = f"the {self.split} side of {self.corpus.name!r} has {size} tokens, a row needs seq_len + 1"
        self.require(size > self.seq_len, "seq_len", why)
        top = int(self.stream.max())
        self.require(top < self.vocab_size, "vocab_size", f"the text holds id {top}; needs more than that")

    @property
    def stream(self) -> Tensor:
        """int32 [tokens]: this side of the corpus, encoded once and shared between tasks."""
        return _stream(self.corpus, self.tokenizer, self.split, self.validation_share, self.split_seed)

    @property
    def chance(self) -> float:
        """1 / vocab_size."""
        return 1 / self.vocab_size

    @property
    def scored_per_row(self) -> int:
        return self.seq_len

    def draw_text(self, n: int, length: int, generator: torch.Generator) -> Tensor:
        """int64 [n, length]: random windows of the text. ValueError when it is shorter than that."""
        stream = self.stream
        if length > len(stream):
            why = f"the {self.split} side of {self.corpus.name!r} has {len(stream)} tokens"
            raise ValueError(f"length = {length}: {why}; use a shorter row or more text")
        starts = torch.randint(len(stream) - length + 1, (n,), generator=generator)
        return stream.unfold(0, length, 1)[starts].long()

    def _draw(self, n: int, generator: torch.Generator) -> tasks.Batch:
        return self._rows(self.draw_text(n, self.seq_len + 1, generator))

    def windows(self, limit: int | None = None) -> tasks.Batch:
        """The whole side as consecutive rows, so that every token but the first is scored once (less a last part-row).

        limit: only so many rows, at equal distances: the first ones would be those of the first documents alone.
        """
        count, step = (len(self.stream) - 1) // self.seq_len, 1
        if limit is not None:
            if not isinstance(limit, int) or limit < 1:
                raise ValueError(f"limit = {limit!r}: needs a number of rows of at least 1, or None for all")
            step = max(1, count // limit)
            count = min(count, limit * step)
        return self._rows(self.stream.unfold(0, self.seq_len + 1, self.seq_len)[:count:step].long())

    def _rows(self, text: Tensor) -> tasks.Batch:
        return tasks.Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous())

    def example(self) -> str:
        """The beginning of one row (seed 0) as text, and its first ids."""
        row = self.sample(1, torch.Generator().manual_seed(0)).tokens[0, :60]
        return f"text    {self.tokenizer.decode(row)!r}\ntokens  {' '.join(map(str, row[:20].tolist()))} ..."

    @classmethod
    def _revive(cls, field: str, value: Any) -> Any:
        if field == "corpus" and isinstance(value, dict):
            return Corpus.from_dict(value)
        if field == "tokenizer" and isinstance(value, dict):
            loaded = tokenizer(value.get("name"))
            if loaded.to_dict() != value:
                raise ValueError(f"tokenizer = {value.get('name')!r}: its files have changed since this was saved")
            return loaded
        return super()._revive(field, value)


# ------------------------------------------------------------------------------------------------ test sets

TEST_STREAM = 0x9E3779B9  # added to test seeds, so that test seed 0 is never training seed 0


def row_hashes(rows: tasks.Batch | Tensor) -> Tensor:
    """int64 [n]: a 64-bit hash of each row of tokens [n, T]. Equal rows hash alike, others practically never."""
    tokens = rows.tokens if isinstance(rows, tasks.Batch) else rows
    ends = torch.iinfo(torch.int64)
    generator = torch.Generator().manual_seed(tokens.shape[1])
    factors = torch.randint(ends.min, ends.max, (2, tokens.shape[1]), generator=generator) | 1
    # Multiply, fold the high bits down and multiply again (all modulo 2^64), so that sums of tokens do not collide.
    mixed = (tokens.cpu() + 1) * factors[0]
    return ((mixed ^ (mixed >> 29)) * factors[1]).sum(dim=1)


def overlap(a: tasks.Batch | Tensor, b: tasks.Batch | Tensor) -> int:
    """How many rows of `a` are also rows of `b`: batches, or hashes from `row_hashes` (int64 [n])."""
    return int(torch.isin(_hashes(a), _hashes(b)).sum())


def _hashes(rows: tasks.Batch | Tensor) -> Tensor:
    return row_hashes(rows) if isinstance(rows, tasks.Batch) or rows.dim() == 2 else rows


def test_set(task: tasks.Task, n: int, *, seed: int = 0, exclude: tasks.Batch | Tensor | None = None) -> tasks.Batch:
    """`n` different rows from a generator seed that training does not use.

    exclude: a training batch, or the hashes of all rows seen (`row_hashes`); none of those rows is in the result.
    ValueError when the task has too few different rows.
    """
    # A CPU generator reads the low 32 bits of its seed only: a distinction higher up would be none.
    generator = torch.Generator().manual_seed((TEST_STREAM + seed) % 2**32)
    seen = torch.empty(0, dtype=torch.int64) if exclude is None else _hashes(exclude)
    kept: list[tasks.Batch] = []
    missing, fruitless = n, 0
    while missing:
        batch = task.sample(max(missing, 64) if kept else n, generator)
        hashes = row_hashes(batch)
        first = torch.from_numpy(np.unique(hashes.numpy(), return_index=True)[1]).sort().values
        fresh = first[~torch.isin(hashes[first], seen)][:missing]
        seen = torch.cat([seen, hashes[fresh]])
        kept.append(batch.rows(fresh))
        missing -= len(fresh)
        fruitless = 0 if len(fresh) else fruitless + 1
        if fruitless == 20:
            why = f"after {n - missing} rows nothing new came in 20 draws; ask for fewer rows or a larger task"
            raise ValueError(f"n = {n}: {type(task).__name__} has too few different rows: {why}")
    info = {name: torch.cat([part.info[name] for part in kept]) for name in kept[0].info}
    return tasks.Batch(torch.cat([b.tokens for b in kept]), torch.cat([b.targets for b in kept]), info)
