# SPDX-License-Identifier: Apache-2.0
"""The generated code is what the .proto file says, and nothing that was published has changed its number."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from kvstore.wire import kvstore_pb2

ROOT = Path(__file__).parent.parent
PROTO = "kvstore/wire/kvstore.proto"
GOLDEN = ROOT / "tests" / "golden" / "kvstore_v1.txt"
GENERATED = ("kvstore_pb2.py", "kvstore_pb2.pyi", "kvstore_pb2_grpc.py")


def test_generated_code_is_current(tmp_path: Path) -> None:
    options = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "protos", *options, f"protos/{PROTO}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in GENERATED:
        fresh = (tmp_path / "kvstore" / "wire" / name).read_text()
        assert fresh == (ROOT / "kvstore" / "wire" / name).read_text(), f"{name} is old: run `make proto`"


def lines_of(file: FileDescriptorProto) -> Iterator[str]:
    """Everything a peer of another version relies on, one line each, in an order that does not matter."""
    for service in file.service:
        for method in service.method:
            streams = f"{'stream ' * method.client_streaming}→{' stream' * method.server_streaming}"
            yield f"rpc {service.name}.{method.name} {method.input_type} {streams} {method.output_type}"
    for message in file.message_type:
        yield from _lines_of_message(f"{file.package}.{message.name}", message)


def _lines_of_message(name: str, message: DescriptorProto) -> Iterator[str]:
    for field in message.field:
        label = FieldDescriptorProto.Label.Name(field.label).removeprefix("LABEL_").lower()
        kind = field.type_name or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
        label = "present" if field.proto3_optional else label
        yield f"field {name} {field.number} {field.name} {label} {kind}"
    for enum in message.enum_type:
        for value in enum.value:
            yield f"value {name}.{enum.name} {value.number} {value.name}"
    for nested in message.nested_type:
        yield from _lines_of_message(f"{name}.{nested.name}", nested)


def now() -> set[str]:
    file = FileDescriptorProto()
    kvstore_pb2.DESCRIPTOR.CopyToProto(file)
    return set(lines_of(file))


def changed(published: set[str], lines: set[str]) -> list[str]:
    """Published lines that are gone: what an older peer would trip over."""
    return sorted(published - lines)


def test_nothing_published_has_changed_its_number_name_or_type() -> None:
    """A line that is gone was renumbered, renamed or removed. New lines belong into the golden file."""
    published = set(GOLDEN.read_text().splitlines())
    assert changed(published, now()) == []
    assert sorted(now() - published) == [], f"add these lines to {GOLDEN.name}"


@pytest.mark.parametrize("change", ["number", "name", "type", "label"])
def test_the_golden_file_catches_a_changed_field(change: str) -> None:
    file = FileDescriptorProto()
    kvstore_pb2.DESCRIPTOR.CopyToProto(file)
    field = next(message for message in file.message_type if message.name == "MatchRequest").field[1]
    if change == "number":
        field.number = 99
    elif change == "name":
        field.name = "other"
    elif change == "type":
        field.type = FieldDescriptorProto.TYPE_UINT64
    else:
        field.label = FieldDescriptorProto.LABEL_REPEATED
    lost = changed(now(), set(lines_of(file)))
    assert len(lost) == 1
    assert lost[0].startswith("field kvstore.v1.MatchRequest 2 request")
