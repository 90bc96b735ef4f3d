"""`baton chat` on a terminal: a pseudo terminal, and a server that says what the test wants."""

import contextlib
import json
import os
import pty
import select
import signal
import stat
import subprocess
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from clusters import baton

# Nothing here takes so long but what hangs.
PATIENCE_S = 60

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def delta(**fields) -> dict:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


class Server(ThreadingHTTPServer):
    """Answers each question as its last word says, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.hung_up = threading.Event()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status: int, body: dict) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.send(200, {"data": [{"id": "scripted"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        last = body["messages"][-1]
        if "fail" in last["content"]:
            return self.send(503, {"error": {"message": "every worker is full"}})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        if "endless" in last["content"]:
            return self.endless()
        if "weather" in last["content"]:
            call = {"index": 0, "id": "call-1", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
            events = [delta(tool_calls=[call])]
        else:
            words = ["# Tit", "le\n", "It is **bo", "ld** and `co", "de`\x1b[2J.\n", "- one"]
            events = [delta(reasoning_content="Hm, well."), *(delta(content=word) for word in words)]
        for event in [*events, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}]:
            self.event(json.dumps(event))
        self.event("[DONE]")

    def event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def endless(self) -> None:
        self.event(json.dumps(delta(content="on and on")))
        # Nothing more comes from a client but its end.
        if self.connection.recv(1) == b"":
            self.server.hung_up.set()


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Terminal:
    """`baton chat` on a pseudo terminal."""

    def __init__(self, server: Server, state, *more):
        self.seen = b""
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(state)}
        environment.pop("NO_COLOR", None)
        # It is its controlling terminal: Ctrl-C is a signal.
        command = ["setsid", "--ctty", baton(), "chat", "--url", server.url, *more]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def reads(self, awaited: str) -> str:
        """Everything that came up to and with `awaited`."""
        deadline = time.monotonic() + PATIENCE_S
        while awaited.encode() not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {awaited!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.master, 65536)
            except OSError as error:
                raise AssertionError(f"it ended without {awaited!r}: {self.seen!r}") from error
        before, _, self.seen = self.seen.partition(awaited.encode())
        return before.decode() + awaited

    def line(self, text: str, prompt="> ") -> None:
        """Types a line when it is asked for one."""
        self.reads(prompt)
        self.type(text)
        self.reads(text)
        self.type("\r")

    def ends(self) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            # What it still writes must be read, or it waits for ever.
            ready, _, _ = select.select([self.master], [], [], 0.05)
            if ready:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.master, 65536)
            if self.process.poll() is not None:
                return self.process.returncode
        raise AssertionError(f"it does not end: {self.seen!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(server, tmp_path):
    with contextlib.ExitStack() as stack:

        def start(*more) -> Terminal:
            started = Terminal(server, tmp_path / "state", *more)
            stack.callback(started.close)
            return started

        yield start


def test_an_answer_is_rendered_and_its_reasoning_is_dim(terminal, server):
    chat = terminal()
    chat.line("question")
    shown = chat.reads("one")
    assert "\x1b[2mHm, well.\x1b[0m" in shown
    assert "\x1b[1;4mTitle\x1b[0m\r\n" in shown
    assert "\x1b[1mbold\x1b[0m and \x1b[36mcode\x1b[0m" in shown and "**" not in shown
    assert "• one" in shown
    # What a model says does not steer the terminal.
    assert "\x1b[2J" not in shown and "[2J." in shown
    chat.reads("> ")
    chat.type("\x04")
    assert chat.ends() == 0


def test_a_tool_call_is_shown_and_its_result_typed(terminal, server, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    chat = terminal("--tools", str(tools))
    chat.line("weather?")
    chat.reads('→ weather({"city": "Paris"})')
    chat.line("sunny", prompt="result of weather> ")
    chat.reads("one")
    first, second = server.asked
    assert first["tools"] == TOOLS
    call, result = second["messages"][-2:]
    assert call["tool_calls"][0]["function"]["name"] == "weather"
    assert result == {"role": "tool", "tool_call_id": "call-1", "content": "sunny"}


def test_a_failed_answer_is_told_and_the_conversation_goes_on(terminal, server):
    chat = terminal()
    chat.line("fail")
    shown = chat.reads("every worker is full")
    assert shown.count("baton: ") == 1
    chat.line("again")
    chat.reads("one")
    # The question that failed is no part of it.
    assert [message["content"] for message in server.asked[-1]["messages"]] == ["again"]
    chat.line("/quit")
    assert chat.ends() == 0


def test_ctrl_c_stops_an_answer_and_ends_the_program_at_an_empty_line_alone(terminal, server):
    chat = terminal()
    chat.line("endless")
    chat.reads("on and on")
    chat.type("\x03")
    chat.reads("> ")
    assert server.hung_up.wait(PATIENCE_S)
    # A line that was begun is cleared.
    chat.type("half a line")
    chat.reads("half a line")
    chat.type("\x03")
    chat.type("whole\r")
    chat.reads("one")
    asked = [message["content"] for message in server.asked[-1]["messages"]]
    assert asked[0] == "endless" and asked[1] == "on and on" and asked[2:] == ["whole"]
    chat.reads("> ")
    chat.type("\x03")
    assert chat.ends() == 0


def test_commands(terminal, server):
    chat = terminal()
    chat.line("/help")
    chat.reads("/system TEXT")
    chat.line("/system be brief")
    chat.line("first")
    chat.reads("one")
    chat.line("/new")
    chat.line("second")
    chat.reads("one")
    messages = server.asked[-1]["messages"]
    assert messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "second"}]
    chat.line("/nothing")
    chat.reads("there is no /nothing")
    chat.line("/quit")
    assert chat.ends() == 0
    assert len(server.asked) == 2


def test_what_is_typed_is_kept_for_its_user_alone_and_comes_back(terminal, server, tmp_path):
    chat = terminal()
    chat.line("remembered")
    chat.reads("one")
    chat.line("/quit")
    assert chat.ends() == 0
    history = tmp_path / "state/baton/chat_history"
    assert "remembered" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600

    again = terminal()
    again.reads("> ")
    # Up twice: /quit, and what was before it.
    again.type("\x1b[A")
    again.reads("/quit")
    again.type("\x1b[A")
    again.reads("remembered")
    again.type("\r")
    again.reads("one")
    assert server.asked[-1]["messages"][-1]["content"] == "remembered"
    again.line("/quit")
    assert again.ends() == 0

    before = history.read_bytes()
    silent = terminal("--no-history")
    silent.line("nobody knows")
    silent.reads("one")
    silent.line("/quit")
    assert silent.ends() == 0
    assert history.read_bytes() == before


def test_a_terminal_is_left_as_it_was(terminal, server):
    chat = terminal()
    chat.reads("> ")
    chat.type("half")
    chat.reads("half")
    chat.process.send_signal(signal.SIGTERM)
    assert chat.ends() == 1
    flags = termios.tcgetattr(chat.master)[3]
    assert flags & termios.ICANON and flags & termios.ECHO
