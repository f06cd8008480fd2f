import io

import pytest

from attnax.launcher import lines
from attnax.launcher.lines import Lines


@pytest.mark.parametrize("size", [1, 3, 100])
def test_each_line_has_the_prefix_wherever_the_stream_is_cut(size):
    out, stream = io.BytesIO(), "one\ntwo\r\n\nthree \r|##| 5%\r|###| 9%\nö".encode()
    made = Lines("[7] ", out.write)
    for start in range(0, len(stream), size):
        made.feed(stream[start : start + size])
    assert out.getvalue().decode() == "[7] one\n[7] two\n[7] three \n[7] |##| 5%\n[7] |###| 9%\n"
    made.flush()
    made.flush()
    assert out.getvalue().decode().endswith("9%\n[7] ö\n")


def test_a_line_that_does_not_end_is_shown_after_a_while(monkeypatch):
    now, out = [0.0], io.BytesIO()
    monkeypatch.setattr(lines.time, "monotonic", lambda: now[0])
    made = Lines("", out.write)
    made.feed(b"|##| 5%")
    made.tick()
    assert out.getvalue() == b""
    now[0] = 0.6
    made.tick()
    assert out.getvalue() == b"|##| 5%\n"
