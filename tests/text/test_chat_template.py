"""Every chat template renders as it should or is stopped."""

from __future__ import annotations

import gc
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import moespan.text.chat_template
import moespan.text.child
from moespan.errors import RequestError, TokenizerError
from moespan.text.tokenizer import Tokenizer
from tests.text.tokenizer_files import (
    BOS,
    DEEPSEEK,
    DEEPSEEK_CONFIG,
    EOS,
    PLAIN,
    load,
    run_script,
    write,
)

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write(tmp_path_factory.mktemp("deepseek"), DEEPSEEK, DEEPSEEK_CONFIG))


@pytest.fixture
def chat(tmp_path: Path) -> Callable[[str], Tokenizer]:
    """Loads the DeepSeek imitation with another chat template."""

    def with_template(source: str) -> Tokenizer:
        return load(write(tmp_path, DEEPSEEK, {**DEEPSEEK_CONFIG, "chat_template": source}))

    return with_template


def renderer_of(tokenizer: Tokenizer) -> subprocess.Popen[bytes]:
    assert tokenizer._chat_template is not None and tokenizer._chat_template._child is not None
    return tokenizer._chat_template._child._process


# ---- Rendering ----


def test_deepseeks_chat_template_renders_as_it_should(deepseek: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好 <b>&amp;</b>"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who\nare you?"},
    ]
    prompt = deepseek.apply_chat_template(messages)
    assert prompt == (
        f"{BOS}Be brief.\n\nUser: 你好 <b>&amp;</b>\n\nAssistant: Hello!{EOS}"
        "User: Who\nare you?\n\nAssistant:"
    )
    closed = deepseek.apply_chat_template(messages, add_generation_prompt=False)
    assert closed == prompt.removesuffix("Assistant:")
    ids = deepseek.encode(prompt, add_special_tokens=False)
    assert ids.count(deepseek.bos_token_id or 0) == 1
    assert ids == deepseek.encode(prompt)


def test_a_template_file_comes_before_the_configuration(tmp_path: Path) -> None:
    write(tmp_path, DEEPSEEK, DEEPSEEK_CONFIG)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load(tmp_path).apply_chat_template(USER) == "from the file"


def test_the_default_one_of_several_templates_is_used(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    tokenizer = load(write(tmp_path, PLAIN, {"chat_template": templates}))
    assert tokenizer.apply_chat_template(USER) == "yes"


@pytest.mark.parametrize("value", [3, {"default": "x"}, [], [{"name": "rag", "template": "x"}]])
def test_a_malformed_chat_template_entry_is_an_error(tmp_path: Path, value: object) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template"):
        load(write(tmp_path, PLAIN, {"chat_template": value}))


def test_without_a_template_the_fix_is_named(tmp_path: Path) -> None:
    plain = load(write(tmp_path, PLAIN))
    with pytest.raises(RequestError, match=r"no chat template; put one .*chat_template\.jinja"):
        plain.apply_chat_template(USER)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{%- for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}", "x\n"),
        ("{{ {'a': '混<', 'b': [1]} | tojson }}", '{"a": "混<", "b": [1]}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{{ pad_token }}{{ unk_token }}{{ nothing }}", EOS),
        ("{{ messages[0].role }}{{ messages|length }}{{ messages[0].name }}", "user1"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "1"),
        ("{{ 'a b'|wordwrap(1) }}{{ [1]|pprint }}{{ '<'|e }}", "a\nb[1]&lt;"),
        ("a{% generation %}b{{ 1 }}{% endgeneration %}c", "ab1c"),
        ("{%- generation -%} b {%- endgeneration -%} c", "bc"),
        (
            "{% for i in range(3) %}{% generation %}{% if i == 1 %}{% continue %}{% endif %}"
            "{% set x = i %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}",
            "0022",
        ),
    ],
)
def test_templates_find_the_functions_that_they_are_written_for(
    chat: Callable[[str], Tokenizer], source: str, expected: str
) -> None:
    assert chat(source).apply_chat_template(USER) == expected


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages is empty"),
        ("hi", "messages is str"),
        ({"role": "user", "content": "hi"}, "messages is dict"),
        (iter(USER), "messages is list_iterator"),
        ([*USER, "hi"], r"messages\[1\] is str"),
        ([*USER, {"role": "user"}], r"messages\[1\] has no 'content'"),
        ([{"content": "hi"}], r"messages\[0\] has no 'role'"),
        ([{"role": "user", "content": None}], r"messages\[0\]\['content'\] is NoneType"),
        ([{"role": 1, "content": "hi"}], r"messages\[0\]\['role'\] is int"),
        ([{"role": "user", "content": "hi", "name": 5}], r"messages\[0\]\['name'\] is int"),
        ([{"role": "user", "content": "a\udc00"}], r"messages\[0\]\['content'\] has '\\udc00'"),
        ([{"role": "user", "content": "x" * (2 << 20)}], "at most 2097152 can be rendered"),
    ],
)
def test_malformed_messages_are_named(deepseek: Tokenizer, messages: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        deepseek.apply_chat_template(messages)


def test_a_template_may_refuse_the_messages(chat: Callable[[str], Tokenizer]) -> None:
    tokenizer = chat("{{ raise_exception('roles must alternate') }}")
    for _ in range(2):
        with pytest.raises(RequestError, match="refuses the messages: roles must alternate"):
            tokenizer.apply_chat_template(USER)


def test_the_largest_conversations_fit_the_limits(deepseek: Tokenizer) -> None:
    wide = [{"role": "user", "content": "🙂" * 520_000}]
    assert len(deepseek.apply_chat_template(wide)) > 520_000
    many = [{"role": "user", "content": ""}] * 60_000
    assert deepseek.apply_chat_template(many).count("User: ") == 60_000


# ---- Hostile templates ----

REFUSED = {
    "one huge string": "{{ 'a' * 10**9 }}",
    "a string built at compile time": "{{ 'a'|center(10**9) }}",
    "a huge list": "{{ [1] * 10**9 }}",
    "a huge range": "{{ range(10**9)|list }}",
    "a huge number": "{% set x = 10**10**6 %}{{ x ** 1000 }}",
    "doubling by concatenation": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    ),
    "doubling by addition": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}"
    ),
    "a huge join": "{{ (range(100000)|list * 1000)|join('aaaaaaaa') }}",
    "a wide old format": "{{ '%1000000000d' % 1 }}",
    "a wide format filter": "{{ '%1000000000d'|format(1) }}",
    "a wide format": "{{ '{:>1000000000}'.format(1) }}",
    "a wide method": "{{ 'a'.zfill(10**9) }}",
    "a deep indent": "{{ ('a\n' * 10000)|indent(100000) }}",
    "a growing replacement": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "a deep JSON indent": "{{ [1]|tojson(indent=10**9) }}",
    "a filled batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "a gigabyte of output": (
        "{% for i in range(100000) %}{% for j in range(10000) %}x{% endfor %}{% endfor %}"
    ),
    "a gigabyte of reason": "{{ raise_exception('a' * 10**9) }}",
    "an endless macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "classes": "{{ ''.__class__.__mro__ }}",
    "a class alone": "{{ ''.__class__ }}",
    "a class by subscript": "{{ ''['__class__'] }}",
    "a class by filter": "{{ ''|attr('__class__') }}",
    "a class by map": "{{ ['']|map(attribute='__class__')|list }}",
    "a class by format": "{{ '{0.__class__}'.format(1) }}",
    "a class by late format": "{{ '{0.__class__}'|attr('format')(1) }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a class": "{{ cycler.__init__.__globals__ }}",
    "changed messages": "{{ messages.append(1) }}",
    "another file": "{% include '/etc/passwd' %}",
    "bad syntax": "{% for %}",
    "something undefined": "{{ nothing.at.all }}",
}
SLOW = {
    "silent loops": (
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    ),
    "exponential macros": (
        "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a list within itself": (
        "{% set ns = namespace(x=[]) %}{% for i in range(40) %}"
        "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == ns.x[:] }}{{ ns.x|string|length }}"
    ),
    "a key that is slow to hash": (
        "{% set ns = namespace(x=()) %}{% for i in range(40) %}"
        "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1}|length }}"
    ),
}


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED)
def test_hostile_templates_are_refused(chat: Callable[[str], Tokenizer], source: str) -> None:
    with pytest.raises(TokenizerError, match=r"chat template of .* cannot be used"):
        chat(source).apply_chat_template(USER)


@pytest.mark.parametrize("source", SLOW.values(), ids=SLOW)
def test_slow_templates_are_stopped(
    chat: Callable[[str], Tokenizer], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moespan.text.chat_template, "_RENDER_SECONDS", 0.2)
    with pytest.raises(TokenizerError, match=r"takes longer than 0\.2 s"):
        chat(source).apply_chat_template(USER)


def test_a_prompt_that_memory_could_hold_but_no_model_is_refused(
    chat: Callable[[str], Tokenizer],
) -> None:
    tokenizer = chat("{% for i in range(5) %}{{ 'x' * 2**20 }}{% endfor %}")
    with pytest.raises(TokenizerError, match="it writes over 4194304 characters"):
        tokenizer.apply_chat_template(USER)


def test_hostile_templates_cost_some_tens_of_megabytes_at_most(tmp_path: Path) -> None:
    """Measured from outside, with the real limits, in a process that does nothing else."""
    hostile = [REFUSED["one huge string"], REFUSED["doubling by addition"]]
    hostile += [REFUSED["a gigabyte of output"], SLOW["silent loops"]]
    write(tmp_path, DEEPSEEK)
    output = run_script(
        f"""
        import resource
        from pathlib import Path
        from moespan.text.tokenizer import Tokenizer, TokenizerError
        Tokenizer.from_pretrained({str(tmp_path)!r})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for source in {hostile!r}:
            Path({str(tmp_path / "chat_template.jinja")!r}).write_text(source)
            tokenizer = Tokenizer.from_pretrained({str(tmp_path)!r})
            try:
                tokenizer.apply_chat_template([{{"role": "user", "content": "hi"}}])
            except TokenizerError:
                print("refused", end=" ")
            del tokenizer
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, end=" ")
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
        """
    )
    *refused, grown_kib, child_kib = output.split()
    assert len(refused) == len(hostile)
    assert int(grown_kib) < 8 << 10
    assert int(child_kib) < 128 << 10


def test_after_a_broken_limit_the_next_conversation_is_served(
    chat: Callable[[str], Tokenizer],
) -> None:
    tokenizer = chat("{{ messages[0].content * (10**9 if messages|length > 1 else 1) }}")
    for _ in range(2):
        with pytest.raises(TokenizerError, match="it needs over 64 MiB"):
            tokenizer.apply_chat_template(USER * 2)
        assert tokenizer.apply_chat_template(USER) == "hi"


def test_a_faulty_conversation_leaves_the_renderer_in_place(
    chat: Callable[[str], Tokenizer],
) -> None:
    tokenizer = chat("{{ messages[0].content }}{{ messages[1].content }}")
    assert tokenizer.apply_chat_template(USER * 2) == "hihi"
    process = renderer_of(tokenizer)
    with pytest.raises(TokenizerError, match="UndefinedError"):
        tokenizer.apply_chat_template(USER)
    assert tokenizer.apply_chat_template(USER * 2) == "hihi"
    assert renderer_of(tokenizer) is process


# ---- The process that renders ----


def test_one_process_renders_all_conversations(deepseek: Tokenizer) -> None:
    deepseek.apply_chat_template(USER)
    process = renderer_of(deepseek)
    for _ in range(3):
        deepseek.apply_chat_template(USER * 10)
        assert renderer_of(deepseek) is process


def test_a_renderer_that_was_killed_is_replaced(chat: Callable[[str], Tokenizer]) -> None:
    tokenizer = chat("{{ messages[0].content }}")
    assert tokenizer.apply_chat_template(USER) == "hi"
    renderer_of(tokenizer).kill()
    renderer_of(tokenizer).wait()
    assert tokenizer.apply_chat_template(USER) == "hi"


def test_the_renderer_ends_with_its_tokenizer(chat: Callable[[str], Tokenizer]) -> None:
    tokenizer = chat("x")
    tokenizer.apply_chat_template(USER)
    process = renderer_of(tokenizer)
    assert process.poll() is None
    del tokenizer
    gc.collect()
    assert process.poll() is not None


def test_an_interrupted_rendering_does_not_answer_the_next_one(
    chat: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat("{{ messages[0].content }}")
    tokenizer.apply_chat_template(USER)
    pipe = renderer_of(tokenizer).stdout
    assert pipe is not None
    close_pipe = pipe.close

    class Interrupted:
        close = staticmethod(close_pipe)

        def readline(self, _: int) -> bytes:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(renderer_of(tokenizer), "stdout", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            tokenizer.apply_chat_template(USER)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "next"}]) == "next"


def test_threads_may_share_a_tokenizer(chat: Callable[[str], Tokenizer]) -> None:
    tokenizer = chat("{{ messages[0].content }}")

    def render(index: int) -> bool:
        assert threading.current_thread() is not threading.main_thread()
        content = f"conversation {index}"
        return tokenizer.apply_chat_template([{"role": "user", "content": content}]) == content

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(render, range(200)))


def test_a_forked_process_renders_by_itself_and_leaves_its_parents_renderer_alone(
    tmp_path: Path,
) -> None:
    write(tmp_path, DEEPSEEK, DEEPSEEK_CONFIG)
    output = run_script(
        f"""
        import os, sys
        from moespan.text.tokenizer import Tokenizer
        tokenizer = Tokenizer.from_pretrained({str(tmp_path)!r})
        def render(text):
            return tokenizer.apply_chat_template([{{"role": "user", "content": text}}])
        render("warm")
        process = tokenizer._chat_template._child._process
        child = os.fork()
        name = "parent" if child else "child"
        right = all(f"User: {{name}} {{i}}" in render(f"{{name}} {{i}}") for i in range(20))
        shared = tokenizer._chat_template._child._process is process
        if child == 0:
            del tokenizer
            sys.exit(0 if right and not shared else 1)
        status = os.waitpid(child, 0)[1]
        print(right, shared, status, process.poll())
        """
    )
    assert output == "True True 0 None\n"


def test_the_renderer_sees_no_environment_and_opens_no_files(
    chat: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "key")
    tokenizer = chat("x")
    tokenizer.apply_chat_template(USER)
    process = Path(f"/proc/{renderer_of(tokenizer).pid}")
    assert b"SECRET" not in (process / "environ").read_bytes()
    limits = (process / "limits").read_text().splitlines()
    (open_files,) = [line for line in limits if line.startswith("Max open files")]
    assert open_files.split()[3:5] == ["0", "0"]


def test_a_child_that_is_stopped_is_replaced(
    deepseek: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = deepseek.apply_chat_template(USER)
    renderer_of(deepseek).send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:  # a new child may take longer to start
        patch.setattr(moespan.text.child, "_SILENCE_SECONDS", 0.3)
        with pytest.raises(TokenizerError, match="the process that works on it ended"):
            deepseek.apply_chat_template(USER)
    assert deepseek.apply_chat_template(USER) == before
