"""The files that the project writes for itself and reads again, each with its schema.

They may come back cut, altered or exchanged: disks fail, copies are interrupted, people edit. So
each is written atomically with the sha256 of its content, and checked when it is read; a file that
differs is an error that names it, never a traceback and never a different result. Files of older
versions have no sha256 and are checked by their schema alone.

    project_files.RUN.write(workdir / "config.json", facts)
    facts = project_files.RUN.read(workdir / "config.json")

Logs, `metrics.jsonl` and `starts.jsonl`, have one JSON object a line. A process that is killed may
leave its last line incomplete, and such a line does not count.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Generic, Literal, NotRequired, TypeVar, cast

import pydantic
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from spectral_pod import storage
from spectral_pod.errors import DataError

CHECKSUM = "checksum"  # the key of a file's sha256, in the file

_Count = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
_Size = Annotated[int, pydantic.Field(ge=1, lt=2**31)]  # of a dimension of an array
_Sha256 = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]
# Names that become parts of paths: of splits, and of a split's parts.
_NAME = r"^[^/\\\x00.][^/\\\x00]{0,199}$"
_Name = Annotated[str, pydantic.Field(pattern=_NAME)]
_File = Annotated[str, pydantic.Field(pattern=r"^[^\x00]+$")]  # the path or URL of a file
_PartName = Annotated[str, pydantic.Field(pattern="^[0-9]{5,18}$")]


class _Open(TypedDict):
    """A part of a file that may have other keys, too."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]


class RecordedData(_Open):
    """The section `data`, of which other fields may come and go with versions."""

    task: str


class RecordedConfig(_Open):
    """A configuration as it was recorded; `config.defaults_of` checks its sections."""

    data: RecordedData


class _Closed(TypedDict):
    """A file without other keys than those of its schema."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[misc]


class Run(_Closed):
    """WORKDIR/config.json: whose a workdir is. Its checksum is the identity of the run."""

    config: RecordedConfig
    data_digest: str
    classes: NotRequired[list[str]]  # missing in workdirs of older versions
    tokenizer_sha256: NotRequired[_Sha256]  # of models of tokens; missing in older ones


class Origin(TypedDict):
    """The run whose parameters another one starts from."""

    workdir: str
    run: str  # its identity
    step: _Count
    differences: list[str]  # of the models, beside their parameters


class Start(TypedDict):
    """A line of WORKDIR/starts.jsonl."""

    wall_time: float  # seconds since 1970
    step: _Count
    processes: _Count
    devices: str
    mesh: dict[str, int]
    code: str
    jax: str
    operations: NotRequired[dict[str, str]]  # their methods; missing in lines of older versions
    reasons: NotRequired[dict[str, str]]  # why these methods
    start_from: NotRequired[Origin]  # of a start from another run's parameters


class Evaluation(_Open):
    """Metrics on a split, beside its name."""

    split: str


class Result(TypedDict):
    """WORKDIR/result.json."""

    step: _Count
    eval: Evaluation


class FileDigest(TypedDict):
    bytes: _Count
    sha256: _Sha256


class Seal(_Closed):
    """WORKDIR/seals/STEP.json: the files of a checkpoint, by their relative names."""

    step: _Count
    run: NotRequired[str]  # missing in seals of older versions
    metrics: dict[str, float] | None
    window: NotRequired[dict[str, list[float]]]  # of Progress.window; missing in older ones
    files: dict[str, FileDigest]


class PackPart(TypedDict):
    name: Annotated[str, pydantic.Field(pattern="^part-[0-9]{5,9}$")]
    bytes: _Count
    sha256: _Sha256


class Pack(_Closed):
    """PACK/manifest.json, written last; see `tools/pack.py`."""

    format: Literal["spectral_pod.pack/1"]
    run: _Sha256  # its identity
    step: _Count  # of its newest checkpoint
    bytes: _Count
    sha256: _Sha256  # of all parts in a row
    parts: Annotated[list[PackPart], pydantic.Field(min_length=1)]


class Arrays(TypedDict):
    bytes: _Sha256
    offsets: _Sha256
    labels: _Sha256


class Part(TypedDict):
    name: _PartName
    records: _Count
    bytes: _Count
    sha256: Arrays


class Split(TypedDict):
    records: _Count
    bytes: _Count
    longest: _Count
    class_counts: list[_Count]
    parts: list[Part]


class Manifest(_Closed):
    """STORE/manifest.json; see `data/byte_store.py`."""

    format: Literal["spectral_pod.byte_store/2"]
    classes: list[str]
    documents: Annotated[int, pydantic.Field(ge=1)]
    splits: dict[_Name, Split]
    provenance: dict[str, Any]


class WrittenPart(Part):
    """What is known about a part once it is written."""

    longest: _Count
    class_counts: list[_Count]


class Item(_Closed):
    """STORE/unfinished/ITEM.json; see `data/parallel_write.py`."""

    parts: dict[_Name, WrittenPart]
    facts: Any


class Export(_Closed):
    """EXPORT/config.json; see `generate/export.py`."""

    config: RecordedConfig
    num_classes: _Size
    vocab_size: _Size
    step: _Count
    data_digest: str
    classes: list[str]
    sha256: _Sha256
    tokenizer_sha256: NotRequired[_Sha256]  # of models of tokens


class LeftOut(_Closed):
    name: str
    reason: str


class PassageIndex(_Closed):
    """INDEX/index.json, written last; see `agent/retrieval.py`."""

    format: Literal["spectral_pod.passages/1"]
    source: str  # what was indexed
    passage_bytes: _Size  # of a passage, at most
    files: Annotated[list[_File], pydantic.Field(min_length=1)]  # those with passages
    left_out: list[LeftOut]  # files that are no text
    passages: Annotated[int, pydantic.Field(ge=1, lt=2**31)]
    sha256: _Sha256  # of passages.safetensors


class TraceTurn(_Closed):
    """A turn of a trace; its bytes are `text` where they are UTF-8, and else `base64`."""

    role: Literal["user", "thought", "call", "result", "answer"]
    text: NotRequired[str]
    base64: NotRequired[str]
    ended: NotRequired[Literal[False]]  # of a turn that was cut off, the last one


class TraceLine(_Closed):
    """A line of a file of traces, one conversation; see `agent/traces.py`."""

    format: Literal["spectral_pod.trace/1"]
    turns: Annotated[list[TraceTurn], pydantic.Field(min_length=1)]
    end: NotRequired[Literal["answered", "calls", "bytes", "time", "malformed"]]
    note: NotRequired[str]  # the end in a sentence


class Rejection(TypedDict):
    """FOLDER/asked.json: what a model was asked; see `tools/agent_reject.py`."""

    run: _Sha256  # its identity
    step: _Count
    questions: _Count
    samples: _Count
    temperature: float
    digits: _Count
    batch: _Count
    seed: int
    generated: float


def _has_step(line: Any) -> Any:
    step = line.get("step")
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError("it has no step")
    return line


T = TypeVar("T")


class Kind(Generic[T]):
    """A kind of file: its schema, and what a user can do about a damaged one."""

    def __init__(self, schema: Any, remedy: str):
        self._schema, self.remedy = schema, remedy

    def read(self, file: Any) -> T:
        """The content of an `epath.Path`, without its checksum.

        Raises:
          DataError: the file is damaged; says how and what to do.
          OSError: it cannot be read.
        """
        try:
            raw = file.read_bytes()
        except (IsADirectoryError, FileNotFoundError) as error:
            is_folder = isinstance(error, IsADirectoryError)
            raise DataError(
                f"{file} is {'a folder' if is_folder else 'missing'}; {self.remedy}"
            ) from error
        except OSError as error:
            error.filename = error.filename or str(file)  # a failed read does not name it
            raise
        return self.parse(raw, str(file))

    def parse(self, raw: bytes, name: str) -> T:
        """As `read`, from the bytes of the file `name`."""
        try:
            return self.content(raw)
        except ValueError as error:
            raise DataError(f"{name} cannot be used: {error}; {self.remedy}") from error

    def content(self, raw: bytes) -> T:
        """The content of the bytes of a file, or of a line of one.

        Raises:
          ValueError: says how they are damaged.
        """
        value = _json(raw)
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        recorded = value.pop(CHECKSUM, None)
        if recorded is not None and recorded != checksum(value):
            raise ValueError(f"its content differs from its {CHECKSUM}")
        self._check(value)
        return cast(T, value)

    def encode(self, content: Mapping[str, Any]) -> bytes:
        """The bytes of a file with this content.

        Raises:
          DataError: it could not be read again.
        """
        try:
            value = _json(json.dumps(content).encode())  # as it will be read: keys are strings
            self._check(value)
        except ValueError as error:
            raise DataError(f"what is to be written could not be read: {error}") from error
        return json.dumps(value | {CHECKSUM: checksum(value)}, indent=1).encode()

    def write(self, file: Any, content: Mapping[str, Any]) -> None:
        """Writes an `epath.Path` atomically."""
        storage.write_whole(file, self.encode(content))

    def _check(self, value: Any) -> None:
        try:
            self._adapter.validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            raise ValueError(_first(error)) from None

    @functools.cached_property
    def _adapter(self) -> Any:
        return pydantic.TypeAdapter(self._schema)


_WRITTEN_AGAIN = "delete it, and the same command writes it again"
RUN: Kind[Run] = Kind(Run, "restore it from a copy, or train in another --workdir")
RESULT: Kind[Result] = Kind(Result, _WRITTEN_AGAIN)
SEAL: Kind[Seal] = Kind(Seal, "its checkpoint cannot be trusted")
MANIFEST: Kind[Manifest] = Kind(Manifest, "delete the store to have it written again")
ITEM: Kind[Item] = Kind(Item, _WRITTEN_AGAIN)
EXPORT: Kind[Export] = Kind(Export, "get or export the model again")
PACK: Kind[Pack] = Kind(Pack, "copy it again from where the run was packed, or pack the run again")
PASSAGES: Kind[PassageIndex] = Kind(
    PassageIndex, "make the index again, in another folder: python -m tools.rag index"
)
REJECTION: Kind[Rejection] = Kind(Rejection, "start again in another --out")
TRACE: Kind[TraceLine] = Kind(TraceLine, "correct this line, or leave it out")
START: Kind[Start] = Kind(Start, "")
METRICS: Kind[dict[str, float]] = Kind(
    Annotated[dict[str, float], pydantic.BeforeValidator(_has_step)], ""
)


class Log(Generic[T]):
    """The lines of a log.

    Attributes:
      lines: those that can be read, in order.
      damaged: the number of others, without an incomplete one at the end.
    """

    def __init__(self, file: Any, kind: Kind[T]):
        """Reads an `epath.Path`, which may be missing.

        Raises:
          DataError: it is a folder.
        """
        self._file = file
        try:
            self._raw = file.read_bytes() if file.exists() else b""
        except IsADirectoryError as error:
            raise DataError(f"{file} is a folder; move it away") from error
        self.lines: list[T] = []
        self.damaged = 0
        for line in self._raw.split(b"\n")[:-1]:
            if not line.strip():
                continue
            try:
                self.lines.append(kind.content(line))
            except ValueError:
                self.damaged += 1

    def keep_damaged(self) -> Any:
        """Copies the file next to itself, before it is written without its damaged lines.

        Returns:
          The path of the copy.
        """
        n = 0
        while (copy := self._file.with_name(f"{self._file.name}.damaged-{n}")).exists():
            n += 1
        storage.write_whole(copy, self._raw)
        return copy


def is_name(text: str) -> bool:
    """Whether a text can be the name of a split."""
    return re.fullmatch(_NAME, text) is not None


def checksum(content: Mapping[str, Any]) -> str:
    """The sha256 of JSON content, whatever its formatting and the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def run_id(run: Run) -> str:
    """The identity of a run: of its configuration and its data."""
    return checksum(run)


def _json(raw: bytes) -> Any:
    try:
        value = json.loads(raw.decode())
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be printed
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _first(error: pydantic.ValidationError) -> str:
    """The first of the differences from a schema."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
