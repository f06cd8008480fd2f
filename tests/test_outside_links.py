"""The weekly check of links out of the repository, on a server of this machine."""

import http.server
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from outside_links import FILES, ROOT, links, main, wrong


class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        if self.path == "/nonsense":
            self.wfile.write(b"nonsense\r\n\r\n")
            return
        if self.path == "/moved":
            self.send_response(301)
            self.send_header("Location", "/there")
        elif self.path == "/busy":  # once
            type(self).asked += 1
            self.send_response(503 if self.asked == 1 else 200)
        else:
            self.send_response({"/there": 200, "/people": 403}.get(self.path, 404))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Handler, "asked", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("(https://a.org/Foo_(bar)).", "https://a.org/Foo_(bar)"),
        ("[a](https://a.org/Foo_(bar)#c)", "https://a.org/Foo_(bar)#c"),
        ("(see https://a.org/b)", "https://a.org/b"),
        ("[a]: https://a.org/b#c\n\n[d]: x", "https://a.org/b#c"),
        ("    J. Doe, 2020, https://a.org/1706.03762.\n", "https://a.org/1706.03762"),
        (r'"source": ["see https://a.org/b\n", "more"]', "https://a.org/b"),
        ('f"https://a.org/{name}"', "https://a.org/"),
        ("| [a](https://a.org/b)|c |", "https://a.org/b"),
        ('<img src="https://a.org/b.png" width="4">', "https://a.org/b.png"),
    ],
)
def test_a_link_ends_where_its_text_goes_on(text, link):
    assert links(text) == {link}


def test_links_end_before_brackets_and_points_and_are_not_those_of_code():
    text = '[a](https://a.org/b#c), <https://d.org>. `https://e.org/f`\n```\nhttps://example.com\n```\nurl = "https://g.org"'
    assert links(text) == {"https://a.org/b#c", "https://d.org", "https://e.org/f", "https://g.org"}


@pytest.mark.parametrize("path", ["/there", "/moved", "/people", "/busy"])
def test_a_page_that_is_there_is_not_wrong(server, path):
    assert wrong(server + path, pause=0) is None


def test_a_page_that_is_gone_is_listed_with_the_file_that_links_to_it(server, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"[a]({server}/there) [b]({server}/gone)")
    assert main([page], pause=0) == 1
    assert capsys.readouterr().out == f"page.md: {server}/gone: 404 Not Found\n2 pages asked for, 1 links broken.\n"
    page.write_text(f"[a]({server}/there)")
    assert main([page], pause=0) == 0


def test_a_page_is_asked_for_once_whatever_its_anchors(server, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"[a]({server}/gone#a) [b]({server}/gone#b)")
    assert main([page], pause=0) == 1
    *broken, end = capsys.readouterr().out.splitlines()
    assert broken == [f"page.md: {server}/gone#{anchor}: 404 Not Found" for anchor in "ab"]
    assert end == "1 pages asked for, 2 links broken."


def test_an_answer_that_is_no_http_is_an_error_of_the_link(server):
    assert "nonsense" in wrong(server + "/nonsense", pause=0)


def test_every_kind_of_page_is_read():
    listed = subprocess.run(
        ["git", "ls-files", *FILES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {Path(name).suffix for name in listed} == {".md", ".rst", ".ipynb", ".py", ".cff", ".toml"}


def test_a_server_that_is_gone_is_named(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "refused" in wrong(f"http://127.0.0.1:{port}/", pause=0)
