"""The example of dates runs at a small size, and its dates are unambiguous without their locales."""

from datetime import date

import dates
import numpy as np
import pytest
import written_dates

LOCALES = "ar_EG en hr ja pl zh"


@pytest.mark.contract
@pytest.mark.parametrize("main", ["dates"], indirect=True)
def test_a_short_run_learns_and_draws(main, tmp_path, capsys):
    out = tmp_path / "dates.png"
    accuracy = main(
        steps=101, batch_size=32, learning_rate=1e-2, d_model=16, num_layers=1, num_test=23, locales=LOCALES, out=out
    )
    first, *progress, last = capsys.readouterr().out.splitlines()
    assert first.startswith("73026 days to learn from, 23 held out")
    assert last == f"held-out accuracy {accuracy:.4f}"
    losses = [float(line.split()[-1]) for line in progress[:2]]
    assert [line.split()[:2] for line in progress[:2]] == [["step", "100"], ["step", "101"]]
    assert losses[1] < losses[0] < np.log(len(dates.TARGET_ALPHABET))
    assert len(progress) == 12
    assert out.read_bytes().startswith(b"\x89PNG")


def test_every_day_is_written_once_so_that_splits_share_no_day():
    isos = [iso for _, iso in written_dates.make_pairs(LOCALES, seed=0)]
    assert len(set(isos)) == len(isos) == 73049
    assert (min(isos), max(isos)) == ("1900-01-01", "2099-12-31")


@pytest.mark.thorough
def test_a_seed_gives_the_same_days_in_the_same_order():
    one, again, other = (written_dates.make_pairs(LOCALES, seed) for seed in (0, 0, 1))
    assert one == again != other


@pytest.mark.thorough
def test_no_text_is_written_for_two_days():
    styles = written_dates.find_styles(written_dates.LOCALES)
    assert len(styles) > 200  # each release of Babel adds some
    meanings = {}
    for day in [date.fromordinal(n) for n in range(date(2023, 1, 1).toordinal(), date(2025, 1, 1).toordinal())]:
        for style in styles:
            assert meanings.setdefault(style(day), day) == day


def test_styles_use_the_digits_of_the_locale_and_leave_out_ambiguous_formats():
    write = lambda locales: [style(date(2021, 4, 3)) for style in written_dates.find_styles(locales)]
    assert write("ar_EG") == ["السبت، ٣ أبريل ٢٠٢١", "٣ أبريل ٢٠٢١"]
    assert write("en") == ["Saturday, April 3, 2021", "April 3, 2021", "Apr 3, 2021"]
    assert write("lv")[0] == "sestdiena, 2021. gada 3. aprīlis"
    assert write("zh") == ["2021年4月3日星期六", "2021年4月3日", "2021/4/3"]


def test_encoding_pads_and_marks_characters_that_the_alphabet_lacks():
    np.testing.assert_array_equal(dates.encode(["ab", "bca"], "\0ab", 4), [[1, 2, 0, 0], [2, 0, 1, 0]])
