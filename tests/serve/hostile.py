"""Raw requests that no well-meaning client sends: bytes for a connection, each with a name.

Whatever a server answers to them, the status is below 500, or the server closes the connection.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from moespan.serve.bodies import REFUSED, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tests.tiers import every


class Raw(NamedTuple):
    """A request as bytes, and what is odd about it."""

    name: str
    data: bytes


_BODIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "/v1/completions": (CompletionBody, {"prompt": "a", "max_tokens": 2}),
    "/v1/chat/completions": (
        ChatBody,
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    ),
    "/tokenize": (TokenizeBody, {"prompt": "a"}),
    "/detokenize": (DetokenizeBody, {"tokens": [5]}),
}
"""Route → its body, and the least that it takes."""

_VALUES = [
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1.5",
    b"1e400",
    b"-1e-400",
    b"NaN",
    b"1" * 400,
    b"9223372036854775808",
    b"-9223372036854775809",
    b'""',
    b'"\\ud800"',
    b'"\\u0000"',
    b'"a string"',
    b"[]",
    b"{}",
    b"[[]]",
    b"[null]",
    b'["a", 1, null, {}]',
    b"[-1]",
    b"[18446744073709551616]",
    b'{"": ""}',
    b'{"5": 1e999}',
    b'{"type": null}',
    b'{"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}',
    b"[" * 3000 + b"]" * 3000,
    b'{"a":' * 3000 + b"1" + b"}" * 3000,
]
"""JSON, or nearly, for a field that wants something else."""


def all_requests() -> Iterator[Raw]:
    """All of them; of the many values for fields, every fifth unless all cases run."""
    yield from every(list(_odd_fields()), 5)
    yield from _odd_bodies()
    yield from _odd_heads()
    yield from _odd_targets()
    yield from _odd_chunks()


def _odd_fields() -> Iterator[Raw]:
    for path, (kind, least) in _BODIES.items():
        names = [*kind.__struct_fields__, *list(REFUSED)[::7], "nothing"]
        for name in names:
            for value in _VALUES:
                rest = {key: one for key, one in least.items() if key != name}
                body = b'{"' + name.encode() + b'": ' + value
                for key, one in rest.items():
                    body += f', "{key}": {json.dumps(one)}'.encode()
                yield Raw(f"{path}: {name}={value[:60]!r}", post(path, body + b"}"))


def _odd_bodies() -> Iterator[Raw]:
    bodies = [
        b"",
        b" ",
        b"{",
        b"}",
        b"[]",
        b"null",
        b"1",
        b'"a"',
        b"{}",
        b"{} {}",
        b'{"prompt": "a"',
        b'{"prompt": "a",}',
        b"{'prompt': 'a'}",
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a"}\x00',
        b'\xef\xbb\xbf{"prompt": "a"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\xed\xa0\x80"}',
        '{"prompt": "a"}'.encode("utf-16"),
        b'{"prompt": "' + b"a" * 300_000 + b'"}',
        b'{"prompt": [' + b"5," * 100_000 + b"5]}",
        b'{"messages": [' + b'{"role": "user", "content": "a"},' * 5_000 + b"{}]}",
        b'{"messages": [{"role": "system"}, {"role": "tool"}, {"role": "\\u0000"}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "text"}, {}, {"text": null}]}]}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"' + b"k" * 200_000 + b'": 1}',
        b"{" + b",".join(b'"k%d": 1' % number for number in range(5_000)) + b"}",
        b"\x00" * 1000,
        b"%" * 1000,
    ]
    for path in _BODIES:
        for body in bodies:
            yield Raw(f"{path}: {body[:40]!r}", post(path, body))
            yield Raw(f"{path}, not JSON: {body[:40]!r}", post(path, body, kind=b"text/plain"))


def _odd_heads() -> Iterator[Raw]:
    good = b'{"prompt": "a", "max_tokens": 1}'
    for line in (
        b"content-length: -1",
        b"content-length: 1e3",
        b"content-length: 99999999999999999999",
        b"content-length: 4, 4",
        b"content-length: 0x10",
        b"content-length: ",
        b"content-length: 5\r\ncontent-length: 6",
        b"content-length: 5\r\ntransfer-encoding: chunked",
        b"transfer-encoding: identity",
        b"transfer-encoding: chunked, chunked",
        b"transfer-encoding: \x0bchunked",
        b"transfer-encoding : chunked",
    ):
        yield Raw(repr(line), head(b"POST", b"/v1/completions", line) + good)
    for line in (
        b"expect: 100-continue",
        b"expect: a-miracle",
        b"content-encoding: gzip",
        b"content-encoding: br, zstd",
        b"content-type: application/json; charset=utf-16",
        b"content-type: multipart/form-data",
        b"content-type: \xff\xfe",
        b"accept: \x80",
        b"authorization: Basic \xff",
        b"authorization: Bearer " + b"x" * 10_000,
        b"cookie: " + b"a=b; " * 2_000,
        b"origin: null",
        b"origin: http://[",
        b"origin: \xff",
        b"referer: javascript:alert(1)",
        b"traceparent: 00-0-0-0",
        b"traceparent: " + b"f" * 5_000,
        b"x-request-id: " + b"r" * 1_000,
        b"x-request-id: \xff\xfe",
        b"x-forwarded-for: 127.0.0.1, evil",
        b"x-forwarded-proto: gopher",
        b"x-forwarded-host: evil",
        b"forwarded: for=[",
        b"upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: x",
        b"upgrade: h2c\r\nhttp2-settings: AAMAAABkAAQ",
        b"range: bytes=0-1,5-2",
        b"if-none-match: *",
        b"if-modified-since: never",
        b"te: trailers, deflate",
        b"connection: keep-alive, close, upgrade, host",
        b"accept-encoding: gzip;q=x",
        b"accept-language: " + b"en," * 1_000,
        b": empty",
        b"no colon",
        b" folded: yes",
        b"a\tb: c",
        b"n\x00l: x",
        b"nl: x\x00y",
        b"bare: x\ny: z",
        b"cr: x\ry: z",
    ):
        yield Raw(repr(line[:60]), post("/v1/completions", good, line))
        for path in (b"/", b"/v1/models", b"/health", b"/metrics", b"/live"):
            yield Raw(f"{path!r}: {line[:60]!r}", get(path, line))
    for host in (
        b"",
        b" ",
        b"[",
        b"[::1",
        b"a b",
        b"a:b:c",
        b"x:99999999",
        b"x/health",
        b"x?y#z",
        b"\xff",
        b"\xd0\xba",
        b"-",
        b"." * 300,
        b"x" * 5_000,
        b"user@x",
        b"127.0.0.1:0",
    ):
        for path in (b"/", b"/v1/models", b"/nothing", b"/health"):
            yield Raw(f"host {host[:40]!r}: {path!r}", get(path, host=host))


def _odd_targets() -> Iterator[Raw]:
    for target in (
        b"*",
        b"//",
        b"///etc/passwd",
        b"/../../etc/passwd",
        b"/static/../../../etc/passwd",
        b"/static/%2e%2e/%2e%2e/pyproject.toml",
        b"/static/..%2f..%2fetc%2fpasswd",
        b"/static/..%5c..%5cx",
        b"/static/%00",
        b"/static/",
        b"/static//etc/passwd",
        b"/%",
        b"/%zz",
        b"/%ff%fe",
        b"/%c0%ae%c0%ae/",
        b"/%ed%a0%80",
        b"/v1/models/%ff",
        b"/v1/models/%00",
        b"/v1/models/..",
        b"/v1/models/" + b"a" * 5_000,
        b"/v1/models/" + b"/" * 1_000,
        b"/v1//models",
        b"/v1/models?" + b"a=b&" * 1_000,
        b"/v1/models?%ff=%zz",
        b"/v1/models#x",
        b"/v1/completions/",
        b"/health;x",
        b"/health?verbose=%ff",
        b"/health?verbose&verbose",
        b"/metrics?name[]=%ff",
        b"/page/state?" + b"x" * 500,
        b"http://x/v1/models",
        b"http://[/v1/models",
        b"https://x:99999/",
        b"x:443",
        b"ftp://x/",
        b"/\xff",
        b"/\xd0\xba",
        b"/a b",
        b"/\x00",
        b"/" + b"a" * 15_000,
    ):
        for method in (b"GET", b"POST", b"CONNECT", b"OPTIONS"):
            yield Raw(f"{method!r} {target[:50]!r}", get(target, method=method))
    for method in (b"TRACE", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"PROPFIND", b"get", b"G\x00T",
                   b"", b"A" * 5_000, b"PRI"):  # fmt: skip
        for path in (
            b"/",
            b"/v1/models",
            b"/v1/completions",
            b"/health",
            b"/metrics",
            b"/static/x",
        ):
            yield Raw(f"{method[:20]!r} {path!r}", get(path, method=method))
    for line in (
        b"GET /\r\n\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        b"GET / HTTP/2.0\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"GET / HTTP/1.9\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"GET / HTTP/11111111111.1\r\nhost: localhost\r\n\r\n",
        b"GET / http/1.1\r\nhost: localhost\r\n\r\n",
        b"GET  / HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n" * 100 + b"GET /live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"\x16\x03\x01" + b"\x00" * 100 + b"\r\n\r\n",
        b"\x00" * 100 + b"\r\n\r\n",
        b"*1\r\n$4\r\nPING\r\n\r\n",
        b"SSH-2.0-x\r\n\r\n",
        b"GET /live HTTP/1.1\nhost: localhost\nconnection: close\n\n",
    ):
        yield Raw(repr(line[:40]), line)


def _odd_chunks() -> Iterator[Raw]:
    good = b'{"prompt": "a", "max_tokens": 1}'
    whole = b"%x\r\n%s\r\n" % (len(good), good)
    for path in ("/v1/completions", "/tokenize", "/nothing"):
        for body in (
            whole + b"0\r\n\r\n",
            b"".join(b"1\r\n%c\r\n" % byte for byte in good) + b"0\r\n\r\n",
            b"%x;a=b;c\r\n%s\r\n0\r\n\r\n" % (len(good), good),
            b"%x;%s\r\n%s\r\n0\r\n\r\n" % (len(good), b"e" * 20_000, good),
            whole + b"0\r\nx: y\r\n\r\n",
            whole + b"0\r\ncontent-length: 5\r\ntransfer-encoding: x\r\n\r\n",
            whole + b"0\r\n" + b"x: y\r\n" * 3_000 + b"\r\n",
            b"%08x\r\n%s\r\n0\r\n\r\n" % (len(good), good),
            b"0x20\r\n" + good + b"\r\n0\r\n\r\n",
            b"+20\r\n" + good + b"\r\n0\r\n\r\n",
            b"-1\r\n\r\n0\r\n\r\n",
            b"g\r\n\r\n",
            b"ffffffffffffffffffff\r\n",
            b"20\n" + good + b"\n0\n\n",
            b"20\r\n" + good + b"xx0\r\n\r\n",
            b"0\r\n\r\n",
            b"\r\n",
            b"f" * 20_000,
        ):
            lines = b"content-type: application/json", b"transfer-encoding: chunked"
            start = head(b"POST", path.encode(), *lines)
            yield Raw(f"{path}, chunks {body[:40]!r}", start + body)


def head(method: bytes, target: bytes, *lines: bytes, host: bytes = b"localhost") -> bytes:
    """A request up to its body, after whose answer the server closes."""
    start = method + b" " + target + b" HTTP/1.1"
    return b"\r\n".join([start, b"host: " + host, *lines, b"connection: close", b"", b""])


def get(
    target: bytes, line: bytes = b"x: y", *, host: bytes = b"localhost", method: bytes = b"GET"
) -> bytes:
    """A request without a body."""
    return head(method, target, line, host=host)


def post(
    path: str, body: bytes, line: bytes = b"x: y", *, kind: bytes = b"application/json"
) -> bytes:
    """A request with a body."""
    size = b"content-length: %d" % len(body)
    return head(b"POST", path.encode(), b"content-type: " + kind, line, size) + body
