"""``plan.effcc``: a plan as one file that can be made on one machine, read by people, and run on another.

A deterministic zip (fixed order and timestamps: same input, same bytes) with fixed member names:

- ``manifest.json``: format, schema version, versions, device, input specs, graph hashes, sha256 of every other member;
- ``plan.json``: the ``ir.plan.Plan``; ``graph.ir``: text of the graphs;
- ``sources/*.py|cpp``: generated code, to read only.

Nothing in it is executed when it is loaded: JSON goes through typed decoding, the rest stays text. A file from
elsewhere is untrusted, so names, sizes, compression, digests and every field are checked before the plan is handed on.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import msgspec

from ..errors import OutputError, PlanError
from .plan import InputSpec, Plan
from .plan_validator import validate as validate_plan

FORMAT = "effcc-plan"
SCHEMA_MAJOR, SCHEMA_MINOR = 1, 2
SCHEMA_VERSION = f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}"

MANIFEST, PLAN, GRAPH, SOURCES = "manifest.json", "plan.json", "graph.ir", "sources/"
SOURCE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,126}\.(?:py|cpp)")
#: Largest size of each member once unpacked, of all together, and of their number: a small file must not unpack to a
#: disk's worth. The plan of 62,000 buffers takes about 30 MB.
MEBIBYTE = 1 << 20
LIMITS = {MANIFEST: 16 * MEBIBYTE, PLAN: 512 * MEBIBYTE, GRAPH: 512 * MEBIBYTE}
SOURCE_LIMIT, TOTAL_LIMIT, MEMBER_LIMIT = 16 * MEBIBYTE, 1024 * MEBIBYTE, 10_000

_TIMESTAMP = (1980, 1, 1, 0, 0, 0)
_GRAPH_HEADER = re.compile(r'# graph ("(?:[^"\\]|\\.)*") (\d{1,9}) lines')
#: What zipfile and zlib raise on damaged input.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    ValueError,
    LookupError,
    OSError,
)
_REMAKE = "make the plan again with `effcc plan`"

_T = TypeVar("_T")


class GraphIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Name and device-neutral structural hash of a captured graph."""

    name: str
    graph_hash: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What the file is, made by what, for what; ``sha256`` maps each other member to its digest (hexadecimal)."""

    format: str
    schema: str
    versions: dict[str, str]
    model: str
    device: str
    inputs: tuple[InputSpec, ...]
    graphs: tuple[GraphIdentity, ...]
    sha256: dict[str, str]


class _Header(msgspec.Struct, frozen=True):
    """The part of the manifest that every schema version has."""

    format: str
    schema: str


@dataclass(frozen=True)
class PlanFile:
    """A loaded ``plan.effcc``: graph texts by name, generated sources by file name."""

    plan: Plan
    graphs_text: dict[str, str]
    sources: dict[str, str]
    manifest: Manifest


def save_plan(
    path: str | os.PathLike[str], plan: Plan, graphs_text: Mapping[str, str], sources: Mapping[str, str]
) -> None:
    """Write ``plan.effcc`` at ``path``: whole and new, or not at all.

    Raises:
        PlanError: a plan that could not be loaded again (a NaN, a wrong type), or an unfit source name.
        OutputError: the file cannot be written (no space, no permission, no folder).
    """
    write_atomically(Path(path), encode_plan(plan, graphs_text, sources))


def load_plan(path: str | os.PathLike[str], *, validate: bool = True) -> PlanFile:
    """Read and check ``plan.effcc``; ``validate`` also runs the independent validator on the plan.

    Raises:
        PlanError: the file cannot be read, is damaged, was changed, is of a newer major version, or holds a bad plan.
    """
    place = os.fspath(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > TOTAL_LIMIT:
                raise _damaged(place, f"the file has {size} bytes, more than the {TOTAL_LIMIT} a plan may have")
            data = file.read(TOTAL_LIMIT + 1)
    except OSError as error:
        raise PlanError(f"cannot read the plan: {error.strerror}", where=place, remedy="check the path") from error
    return decode_plan(data, place, validate=validate)


def encode_plan(plan: Plan, graphs_text: Mapping[str, str], sources: Mapping[str, str]) -> bytes:
    """The bytes of ``plan.effcc``. See ``save_plan`` for what is raised."""
    plan_json = msgspec.json.format(msgspec.json.encode(plan, order="deterministic"), indent=1)
    _decode(plan_json, Plan, PLAN, "the plan being saved")
    members = {PLAN: plan_json, GRAPH: _join_graphs(graphs_text).encode("utf-8", "surrogatepass")}
    for name in sorted(sources):
        if not SOURCE_NAME.fullmatch(name):
            raise PlanError(f"source name {name!r} is not a plain .py or .cpp file name", where=SOURCES)
        members[SOURCES + name] = sources[name].encode("utf-8", "surrogatepass")
    manifest = Manifest(
        format=FORMAT,
        schema=SCHEMA_VERSION,
        versions=_versions(),
        model=plan.model,
        device=plan.device,
        inputs=plan.inputs,
        graphs=_identities(plan),
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in members.items()},
    )
    manifest_json = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {MANIFEST: manifest_json, **members}.items():
            if len(content) > _limit(name):
                raise PlanError(f"{name} has {len(content)} bytes, more than a plan file may hold", where=name)
            info = zipfile.ZipInfo(name, _TIMESTAMP)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, content, compresslevel=6)
    return buffer.getvalue()


def decode_plan(data: bytes, place: str = "plan.effcc", *, validate: bool = True) -> PlanFile:
    """Inverse of ``encode_plan``. ``place`` is named in errors. Raises PlanError only."""
    members = _unpack(data, place)
    for required in (MANIFEST, PLAN, GRAPH):
        if required not in members:
            raise _damaged(place, f"member {required} is missing")
    manifest = _read_manifest(members[MANIFEST], place)
    if set(manifest.sha256) != set(members) - {MANIFEST}:
        different = sorted(set(manifest.sha256) ^ (set(members) - {MANIFEST}))
        raise _damaged(place, f"the manifest and the members disagree about {different[0]!r}")
    for name, digest in manifest.sha256.items():
        if hashlib.sha256(members[name]).hexdigest() != digest:
            raise PlanError(f"{name} was changed: its digest is not the manifest's", where=place, remedy=_REMAKE)
    plan = _decode(members[PLAN], Plan, PLAN, place)
    for field, written, expected in (
        ("device", manifest.device, plan.device),
        ("model", manifest.model, plan.model),
        ("inputs", manifest.inputs, plan.inputs),
        ("graphs", manifest.graphs, _identities(plan)),
    ):
        if written != expected:
            raise _damaged(place, f"{MANIFEST} and {PLAN} disagree about {field}")
    texts = {name: _text(content, name, place) for name, content in members.items() if name not in (MANIFEST, PLAN)}
    graphs_text = _split_graphs(texts.pop(GRAPH), place)
    if validate:
        validate_plan(plan)
    sources = {name.removeprefix(SOURCES): text for name, text in texts.items()}
    return PlanFile(plan=plan, graphs_text=graphs_text, sources=sources, manifest=manifest)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old one or the whole new one. Raises OutputError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        remedy = {
            errno.ENOSPC: f"free {len(data)} bytes there, or write to another disk",
            errno.EDQUOT: f"the quota is used up: free {len(data)} bytes there, or write to another disk",
            errno.EROFS: "that file system is read-only: write to another folder",
            errno.EACCES: "there is no permission to write there: write to another folder",
            errno.ENOENT: "make the folder first",
            errno.EISDIR: "name a file, not a folder",
        }.get(error.errno or 0, "write to another place")
        raise OutputError(f"cannot write the file: {error.strerror}", where=str(path), remedy=remedy) from error


def _damaged(place: str, what: str) -> PlanError:
    return PlanError(f"not a usable plan file: {what}", where=place, remedy=_REMAKE)


def _limit(name: str) -> int:
    return LIMITS.get(name, SOURCE_LIMIT)


def _unpack(data: bytes, place: str) -> dict[str, bytes]:
    """All members by name, after every check that does not need their content."""
    members: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if len(infos) > MEMBER_LIMIT:
                raise _damaged(place, f"{len(infos)} members, more than {MEMBER_LIMIT}")
            if sum(info.file_size for info in infos) > TOTAL_LIMIT:
                raise _damaged(place, f"it would unpack to more than {TOTAL_LIMIT} bytes")
            for info in infos:
                _check_member(info, members, place)
                with archive.open(info) as member:
                    # The header's size may lie: read at most one byte more than allowed.
                    content = member.read(_limit(info.filename) + 1)
                if len(content) != info.file_size or len(content) > _limit(info.filename):
                    raise _damaged(place, f"member {info.filename} does not have the size that its header says")
                members[info.filename] = content
    except _DAMAGE as error:
        raise _damaged(place, f"damaged archive ({type(error).__name__}: {error})") from error
    return members


def _check_member(info: zipfile.ZipInfo, members: Mapping[str, bytes], place: str) -> None:
    name = info.filename
    is_source = name.startswith(SOURCES) and SOURCE_NAME.fullmatch(name.removeprefix(SOURCES)) is not None
    # orig_filename is what the archive says before zipfile cuts it at a NUL byte.
    if info.orig_filename != name or not (name in LIMITS or is_source):
        raise _damaged(place, f"member {info.orig_filename!r} does not belong in a plan")
    if name in members:
        raise _damaged(place, f"member {name} is there twice")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 0x1:
        raise _damaged(place, f"member {name} is packed in a way that plans do not use")
    if info.file_size > _limit(name):
        raise _damaged(place, f"member {name} would unpack to {info.file_size} bytes, more than {_limit(name)}")


def _read_manifest(content: bytes, place: str) -> Manifest:
    header = _decode(content, _Header, MANIFEST, place)
    if header.format != FORMAT:
        raise _damaged(place, f"format is {header.format!r}, not {FORMAT!r}")
    version = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", header.schema, re.ASCII)
    if version is None:
        raise _damaged(place, f"schema version {header.schema!r} is not of the form major.minor")
    major = int(version[1])
    if major > SCHEMA_MAJOR:
        raise PlanError(
            f"the plan has schema {header.schema}, and this effcc reads up to {SCHEMA_MAJOR}.x",
            where=place,
            remedy="update effcc (`pip install --upgrade effcc`), or make the plan again with this version",
        )
    if major < SCHEMA_MAJOR:
        raise PlanError(
            f"the plan has schema {header.schema}; this effcc reads {SCHEMA_MAJOR}.x", where=place, remedy=_REMAKE
        )
    return _decode(content, Manifest, MANIFEST, place)


def _decode(content: bytes, kind: type[_T], member: str, place: str) -> _T:
    """Typed decoding; any failure becomes a PlanError naming member and field."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # msgspec ends its message with the path of the field: "... - at `$.steps[3].reads`".
        raise PlanError(f"{member}: {error}", where=place, remedy=_REMAKE) from error


def _text(content: bytes, member: str, place: str) -> str:
    try:
        return content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise _damaged(place, f"{member} is not UTF-8 text ({error})") from error


def _identities(plan: Plan) -> tuple[GraphIdentity, ...]:
    return tuple(GraphIdentity(name=graph.name, graph_hash=graph.graph_hash) for graph in plan.graphs)


def _versions() -> dict[str, str]:
    """Installed versions, from package metadata: nothing is imported for it."""
    versions = {}
    for name in ("effcc", "torch", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    return versions


def _join_graphs(graphs_text: Mapping[str, str]) -> str:
    """One text of all graphs, each under a comment line with its name and length in lines."""
    parts = []
    for name, text in graphs_text.items():
        parts.append(f"# graph {json.dumps(name)} {text.count(chr(10)) + 1} lines\n{text}\n")
    return "".join(parts)


def _split_graphs(text: str, place: str) -> dict[str, str]:
    graphs: dict[str, str] = {}
    lines = text.split("\n")
    position = 0
    while position < len(lines) - 1:
        header = _GRAPH_HEADER.fullmatch(lines[position])
        length = int(header[2]) if header else 0
        if header is None or not 1 <= length <= len(lines) - 2 - position:
            raise _damaged(place, f"{GRAPH} line {position + 1}: not the head of a graph")
        try:
            name = json.loads(header[1])
        except ValueError as error:
            raise _damaged(place, f"{GRAPH} line {position + 1}: {error}") from error
        if name in graphs:
            raise _damaged(place, f"{GRAPH} line {position + 1}: graph {name!r} is there twice")
        graphs[name] = "\n".join(lines[position + 1 : position + 1 + length])
        position += 1 + length
    if lines[-1]:
        raise _damaged(place, f"{GRAPH} does not end with a whole line")
    return graphs
