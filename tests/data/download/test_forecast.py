import pytest

from kit.data.download import forecast, official
from kit.data.download.forecast import GB, MB
from tests.conftest import ROOT

KNOWN = official.read(ROOT / "datasets_meta/gldv2.json")
ALL = KNOWN.tars(official.SPLITS, None)


class Server:
    """Tells the sizes of train's tars and of nothing else."""

    def size(self, url):
        return 2_000_000_000 if "/train/" in url else None


def test_the_whole_set_costs_what_its_page_says():
    cost = forecast.forecast(KNOWN, ALL, "tars", 0, 1.0, 4)
    assert cost.bytes == cost.kept == 595e9 and cost.passing == 0 == cost.told
    assert cost.fetched["index"] == (100, 85_000_000_000) and cost.tars == 620


def test_sizes_that_a_server_tells_count():
    cost = forecast.forecast(KNOWN, ALL, "tars", 0, 1.0, 4, Server())
    assert cost.bytes == 1095e9 and cost.told == 500
    told = forecast.lines(cost, 10 * MB, 0)
    assert "500 sizes from the server, 120 as the dataset's page says about" in told[3]


def test_a_server_that_does_not_tell_the_first_size_is_not_asked_for_more():
    asked = []

    class Silent:
        def size(self, url):
            asked.append(url)

    cost = forecast.forecast(KNOWN, ALL, "tars", 0, 1.0, 4, Silent())
    assert cost.told == 0 and cost.bytes == 595e9 and len(asked) == 1


def test_originals_pass_through_as_many_at_a_time_as_jobs():
    images = forecast.forecast(KNOWN, ALL, "images", 0, 0.5, 8)
    assert images.kept == 595e9 / 2 and images.passing == 8e9
    shards = forecast.forecast(KNOWN, ALL, "shards", 300, 1.0, 8)
    assert shards.kept == 595e9 / 4 and shards.bytes == 595e9
    large = forecast.forecast(KNOWN, ALL, "shards", 3000, 1.0, 8)
    assert large.kept == 595e9  # no picture grows
    assert shards.shrinking == 595e9 / 12e6 and images.shrinking == 0
    told = forecast.lines(shards, None, 0)
    assert "shrinking: about 13.8 hours of one core" in told
    assert not any("shrinking" in line for line in forecast.lines(images, None, 0))


def test_hours_follow_the_rate_and_an_assumed_one_is_called_so():
    cost = forecast.forecast(KNOWN, ALL, "tars", 0, 1.0, 4)
    assert "16.5 hours at 10 MB/s" in forecast.lines(cost, 10 * MB, 0)
    assert "4.1 hours at 40 MB/s, assumed (--rate)" in forecast.lines(cost, None, 0)


def test_room_is_asked_of_the_disk_where_the_folder_will_be(monkeypatch, tmp_path):
    deep = tmp_path / "not" / "yet"
    assert forecast.free_bytes(deep) == pytest.approx(
        forecast.free_bytes(tmp_path), rel=0.05
    )
    cost = forecast.Forecast({}, 0, round(5 * GB), round(2 * GB), 0.0)
    monkeypatch.setattr(forecast, "free_bytes", lambda path: 7 * GB)
    forecast.refuse_full_disk(cost, deep)
    monkeypatch.setattr(forecast, "free_bytes", lambda path: 7 * GB - 1)
    with pytest.raises(ValueError, match=r"yet: about 7.0 GB are needed and 7.0 GB"):
        forecast.refuse_full_disk(cost, deep)
