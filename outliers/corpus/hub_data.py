"""The text of a data set of the hub, streamed row by row; a connection that breaks is continued.

Apart from `documents` because the hub's client takes as long to import as a finished study to be answered.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from outliers.corpus.documents import ORDER, SHUFFLE_BUFFER, DocumentSource, find_local, in_order, shuffled
from outliers.errors import CorpusError
from outliers.hub.client import Patience, Resolved, plain, refusals, resolve, use_patient_client
from outliers.spec import CorpusSpec

log = logging.getLogger(__name__)


def find_documents(spec: CorpusSpec) -> DocumentSource:
    """The source that `spec` names, checked. Raises CorpusError if it can't be read, HubUnavailable."""
    return find_local(spec) or _hub(spec)


def _hub(spec: CorpusSpec) -> DocumentSource:
    found = resolve("dataset", spec.source, spec.corpus_revision, CorpusError)

    def texts(spec: CorpusSpec) -> Iterator[str]:
        use_patient_client()
        data_set = _open_hub(spec, found)
        return shuffled(_rows(data_set, spec, spec.source), spec.seed, SHUFFLE_BUFFER)

    identity = ("hub", spec.source, found.commit, str(spec.subset), spec.split, *ORDER)
    return DocumentSource(name=spec.source, identity=identity, public=found.public, texts=texts)


def _open(path: str, **options: Any) -> Any:
    """A data set that is streamed; only its schema is read at first."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CorpusError("a data set needs: pip install 'outlier-features[flows]'") from error
    # Offline it would use what it has prepared before, of any revision: give it an empty folder.
    with tempfile.TemporaryDirectory() as empty:
        return load_dataset(path, streaming=True, cache_dir=empty, **options)


def _open_hub(spec: CorpusSpec, found: Resolved) -> Any:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise CorpusError(f"no ids were made of {spec.source} before, and the hub is switched off (HF_HUB_OFFLINE)")
    patience = Patience(f"the data set {spec.source}")
    while True:
        try:
            with _reading(spec.source):
                return _open(spec.source, name=spec.subset, split=spec.split, revision=found.commit)
        except _cuts() as error:
            patience.wait(plain(error))


def _rows(data_set: Any, spec: CorpusSpec, place: str) -> Iterator[str]:
    """The text column, shard by shard in the order that the seed fixes; a shard whose connection breaks is continued."""
    shards = int(data_set.num_shards)
    for index in in_order([str(number) for number in range(shards)], spec.seed):
        taken, patience = 0, Patience(f"part {index + 1} of {shards} of {place}")
        while True:
            try:
                with _reading(place):
                    for row in itertools.islice(data_set.shard(num_shards=shards, index=index), taken, None):
                        yield _text(row, place)
                        taken += 1
                        patience.progress()
                break
            except _cuts() as error:
                log.warning("%s was cut off after %d rows of part %d of %d", place, taken, index + 1, shards)
                patience.wait(plain(error))


def _text(row: dict[str, Any], place: str) -> str:
    if "text" not in row:
        raise CorpusError(f"{place} has no column 'text'; its columns: {', '.join(sorted(row))}")
    text = row["text"]
    if text is None:
        return ""  # a row without text is a document without tokens
    if not isinstance(text, str):
        raise CorpusError(f"the column 'text' of {place} holds {type(text).__name__} and no text")
    return text


def _cuts() -> tuple[type[Exception], ...]:
    """Errors of a connection that breaks while reading; `outliers.hub` handles the hub's answers."""
    from outliers.hub.http import httpx

    return (httpx.TransportError, ConnectionError, TimeoutError)


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Turn what `datasets` raises inside the block into CorpusError with its message, which lists subsets and splits."""
    try:
        with refusals("dataset", place, "this revision", CorpusError):
            yield
    except _cuts():
        raise
    except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
        hint = "; code of a data set is never run, but --corpus-revision refs/convert/parquet may have its rows"
        script = "scripts are no longer supported" in str(error)
        # a high limit: the message may list the subsets of a large data set
        raise CorpusError(f"the data set {place} can't be read: {plain(error, 4000)}{hint * script}") from error
